"""hkdfast.hf.apply: patching, undoing, refusing; and transformers.Trainer with a teacher against eager logits."""

import copy
import itertools

import pytest
import torch
import trainers
import transformers as hf
import zoo
from accelerate.utils import is_compiled_module
from trainers import Eager
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from zoo import one_thread, two_processes  # noqa: F401

from hkdfast.hf import LanguageHead, apply


def examples(size=24, length=12, vocab=61):
    draw = torch.Generator().manual_seed(0)
    found = []
    for i in range(size):
        ids = torch.randint(3, vocab, (length,), generator=draw)
        labels = ids.clone()
        labels[: 2 + i % 7] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def make(kind, folder, model=None, data=None, collator=None, **options):
    args = TrainingArguments(**trainers.options(folder, **{"remove_unused_columns": False} | options))
    data = data or examples()
    model = model or trainers.language_model(0)
    return kind(model, args, train_dataset=data, eval_dataset=data[:7], data_collator=collator)


def teacher():
    return trainers.language_model(1, 48)


def both(folder, hard_weight=0.0, change=lambda trainer: None, **others):
    """An eager and a patched trainer."""
    eager, patched = make(Eager, folder, **copy.deepcopy(others)), make(Trainer, folder, **copy.deepcopy(others))
    eager.teacher, eager.hard_weight = teacher(), hard_weight
    change(eager), change(patched)
    return eager, patched, apply(patched, teacher=teacher(), hard_weight=hard_weight)


# transformers.Trainer


@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_a_trainer_with_a_teacher(hard_weight, tmp_path):
    eager, patched, _ = both(tmp_path, hard_weight)
    trainers.assert_same(trainers.trained(patched), trainers.trained(eager))


def test_accumulation_is_exact(tmp_path):
    """Four batches of one are one batch of four, whatever their numbers of labels."""
    runs = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = make(
            Trainer, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, use_cpu=True
        )
        apply(trainer, teacher=teacher())
        runs.append(trainers.trained(trainer))
    trainers.assert_same(*runs)


def test_a_model_whose_labels_trainer_does_not_count(tmp_path):
    """As of Qwen2.5-VL and 25 other classes: the answers are counted all the same."""

    def change(trainer):
        trainer.model_accepts_loss_kwargs = False

    eager, patched, _ = both(tmp_path)
    change(patched)
    trainers.assert_same(trainers.trained(patched), trainers.trained(eager))


def test_no_count_is_the_mean_of_each_batch(tmp_path):
    eager, patched, _ = both(tmp_path)
    for trainer in (eager, patched):
        trainer._get_num_items_in_batch = lambda *_: None
    trainers.assert_same(trainers.trained(patched), trainers.trained(eager))
    assert patched.loss_is_scaled_for_ga is False


def test_evaluation(tmp_path):
    eager, patched, _ = both(tmp_path, per_device_eval_batch_size=3)
    assert patched.evaluate()["eval_loss"] == pytest.approx(eager.evaluate()["eval_loss"], rel=1e-6)
    # and with the logits, where they are asked for
    mine, truth = patched.predict(patched.eval_dataset), eager.predict(eager.eval_dataset)
    assert mine.metrics["test_loss"] == pytest.approx(truth.metrics["test_loss"], rel=1e-6)
    torch.testing.assert_close(torch.tensor(mine.predictions), torch.tensor(truth.predictions))


def test_shifted_labels(tmp_path):
    plain = examples()
    shifted = []
    for example in plain:
        labels = torch.nn.functional.pad(example["labels"][1:], (0, 1), value=-100)
        shifted.append({"input_ids": example["input_ids"], "shift_labels": labels})
    runs = []
    for data in (plain, shifted):
        trainer = make(Trainer, tmp_path, data=data, per_device_eval_batch_size=3)
        apply(trainer, teacher=teacher())
        loss = trainer.evaluate()["eval_loss"]
        runs.append((loss, trainers.trained(trainer)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    trainers.assert_same(runs[1][1], runs[0][1])


def test_packed_batches(tmp_path):
    """[1, T] with position_ids: no example reads or predicts another."""
    data = [{"input_ids": one["input_ids"].tolist(), "labels": one["labels"].tolist()} for one in examples()]
    runs = []
    for collator in (DataCollatorWithFlattening(), None):
        model = trainers.language_model(0)
        trainer = make(Trainer, tmp_path, model, data if collator else examples(), collator)
        apply(trainer, teacher=teacher())
        runs.append(trainers.trained(trainer))
    trainers.assert_same(*runs)


def test_columns_of_the_loss_stay_in_the_dataset(tmp_path):
    from datasets import Dataset

    data = Dataset.from_list(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "distill_only": [False, True, False], "note": "x"}
            for _ in range(8)
        ]
    )
    args = TrainingArguments(**trainers.options(tmp_path))
    trainer = Trainer(trainers.language_model(0), args, train_dataset=data)
    with apply(trainer, teacher=teacher()):
        kept = next(iter(trainer.get_train_dataloader())).keys()
    assert set(kept) == {"input_ids", "labels", "distill_only"}


def test_a_teacher_is_left_as_it_was(tmp_path):
    mine = teacher()
    mine.train()
    before = copy.deepcopy(mine.state_dict())
    trainer = make(Trainer, tmp_path)
    apply(trainer, teacher=mine)
    trainers.trained(trainer)
    assert mine.training and all(torch.equal(x, before[name]) for name, x in mine.state_dict().items())
    assert all(x.grad is None for x in mine.parameters())


def test_a_vision_language_model(tmp_path):
    """A wrapper of Granite that ignores its scale; images in the batch."""
    batch = zoo.batch("llava_ignored_scale", answers=3)
    student, other = zoo.build("llava_ignored_scale"), zoo.build("llava_ignored_scale", 1)
    data = list(zoo.Rows(batch).rows)
    eager, patched = (make(kind, tmp_path, copy.deepcopy(student), data) for kind in (Eager, Trainer))
    eager.teacher = other
    apply(patched, teacher=other)
    truth = eager.compute_loss(eager.model, batch)
    torch.testing.assert_close(patched.compute_loss(patched.model, batch), truth, rtol=1e-6, atol=0)


BODY = """
import torch.distributed as dist, test_apply, trainers
from transformers import Trainer
from hkdfast.hf import apply
trainer = test_apply.make(Trainer, FOLDER, per_device_train_batch_size=2, gradient_accumulation_steps=2)
apply(trainer, teacher=test_apply.teacher())
run = trainers.trained(trainer)
if dist.get_rank() == 0:
    torch.save(run, FOLDER + "/run.pt")
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """average_tokens_across_devices, which is Trainer's default."""
    two_processes(tmp_path, BODY)
    log, parameters = torch.load(tmp_path / "run.pt", weights_only=False)
    single = make(Trainer, tmp_path, per_device_train_batch_size=4)
    apply(single, teacher=teacher())
    expected, truth = trainers.trained(single)
    for name, x in parameters.items():
        right = truth[name.removeprefix("module.")]
        assert (x - right).abs().max() <= 1e-4 * trainers.RATE * trainers.STEPS
    assert [entry["loss"] for entry in log] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *itertools.product(("trainer", "distillation"), ("aot_eager", "inductor")),
        *itertools.product(("gkd", "gold", "sdft", "sdpo"), ("aot_eager",)),
    ],
)
def test_a_compiled_model_learns_the_same(name, backend, tmp_path):
    runs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        torch._dynamo.reset()
        models = [trainers.language_model(seed, num_hidden_layers=1) for seed in (0, 1)]
        if name == "trainer":
            trainer = make(Trainer, tmp_path, models[0], **options)
            apply(trainer, teacher=models[1], hard_weight=0.5)
        else:
            models = models[:1] if name in ("sdft", "sdpo") else models
            trainer = getattr(trainers, name)(tmp_path, *models, **options)
            apply(trainer)
        runs.append(trainers.trained(trainer))
    assert is_compiled_module(trainer.model_wrapped)
    torch._dynamo.reset()
    trainers.assert_same(*reversed(runs))


# patching and undoing


def test_undo_brings_the_very_objects_back(tmp_path):
    for trainer, given in ((make(Trainer, tmp_path), {"teacher": teacher()}), (trainers.distillation(tmp_path), {})):
        trainer.loss_is_scaled_for_ga = scaled = object()
        before = dict(vars(trainer))
        patch = apply(trainer, **given)
        assert vars(trainer).keys() != before.keys()
        patch.undo()
        patch.undo()
        assert vars(trainer).keys() - before.keys() <= {"_signature_columns"}
        assert all(vars(trainer)[name] is x for name, x in before.items() if name != "_signature_columns")
        assert trainer.loss_is_scaled_for_ga is scaled
        with apply(trainer, **given) as patch:
            assert patch.trainer is trainer
        assert vars(trainer).keys() - before.keys() <= {"_signature_columns"}


def test_an_undone_trainer_trains_as_if_nothing_had_been(tmp_path):
    untouched = trainers.trained(trainers.gkd(tmp_path))
    trainer = trainers.gkd(tmp_path)
    apply(trainer).undo()
    log, parameters = trainers.trained(trainer)
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in untouched[0]]
    assert all(torch.equal(x, untouched[1][name]) for name, x in parameters.items())


def test_twice_is_refused(tmp_path):
    trainer = trainers.gkd(tmp_path)
    patch = apply(trainer)
    with pytest.raises(ValueError, match="applied to this GKDTrainer already"):
        apply(trainer)
    patch.undo()
    apply(trainer)


def test_a_method_that_was_replaced_since_is_not_lost(tmp_path):
    trainer = trainers.gkd(tmp_path)
    patch = apply(trainer)
    ours, trainer.compute_loss = trainer.compute_loss, lambda *_: None
    with pytest.raises(RuntimeError, match="compute_loss was replaced again"):
        patch.undo()
    trainer.compute_loss = ours
    patch.undo()
    assert "compute_loss" not in vars(trainer)


def test_an_error_leaves_the_trainer_alone(tmp_path):
    trainer = trainers.gkd(tmp_path, teacher=teacher())
    before = dict(vars(trainer))
    with pytest.raises(ValueError, match="hard_weight"):
        apply(trainer, hard_weight=-1)
    assert vars(trainer) == before


# what is refused


class Own(Trainer):
    def compute_loss(self, *args, **others):
        return super().compute_loss(*args, **others)


def test_unknown_trainers(tmp_path):
    with pytest.raises(TypeError, match="unknown trainer LanguageHead, expected one of trl.DistillationTrainer"):
        apply(LanguageHead(teacher()))
    with pytest.raises(ValueError, match="Own has its own compute_loss"):
        apply(make(Own, tmp_path), teacher=teacher())
    trainer = make(Trainer, tmp_path)
    trainer.compute_loss = lambda *_: None
    with pytest.raises(ValueError, match="compute_loss of this Trainer was replaced already"):
        apply(trainer, teacher=teacher())


def test_a_method_with_other_arguments(tmp_path, monkeypatch):
    trainer = make(Trainer, tmp_path)
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, model, inputs: None)
    with pytest.raises(
        ValueError, match=r"\(self, model, inputs\), expected .*tried with transformers 5.19.0, 5.23.0 and"
    ):
        apply(trainer, teacher=teacher())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"teacher": None}, ValueError, r"apply\(trainer, teacher=model\)"),
        ({"temprature": 2}, TypeError, "no option 'temprature': expected some of beta, .*hard_weight"),
        ({"reduction": "sum"}, TypeError, "no option 'reduction': the trainer decides it"),
        ({"labels": 1}, TypeError, "no option 'labels': the trainer decides it"),
        ({"floor": -3}, TypeError, "it is called teacher_floor now"),
        ({"beta": 0.3}, ValueError, "beta is of a divergence that is named"),
        ({"divergence": "kl"}, ValueError, "unknown divergence 'kl'"),
        ({"divergence": "jensen_shannon", "beta": 0}, ValueError, "forward_kl"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
    ],
)
def test_wrong_options(options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        apply(make(Trainer, tmp_path), **{"teacher": teacher()} | options)


def test_a_teacher_on_another_device(tmp_path):
    with pytest.raises(ValueError, match=r"student is on cpu, that of the teacher on meta: move .*teacher.to\('cpu'\)"):
        apply(make(Trainer, tmp_path), teacher=teacher().to("meta"))


def test_a_teacher_of_another_vocabulary(tmp_path):
    other = trainers.language_model(1, vocab=70)
    with pytest.raises(ValueError, match='61 and 70 tokens differ: vocab="common"'):
        apply(make(Trainer, tmp_path), teacher=other)
    trainer = make(Trainer, tmp_path)
    apply(trainer, teacher=other, vocab="common")
    assert trainers.trained(trainer)[0][0]["loss"] > 0


def test_a_teacher_that_is_the_student(tmp_path):
    trainer = make(Trainer, tmp_path)
    with pytest.raises(ValueError, match="the student itself"):
        apply(trainer, teacher=trainer.model)


def test_tokenizers_that_differ(tmp_path):
    trainer = trainers.gkd(tmp_path)
    apply(trainer, teacher_tokenizer=trainers.tokenizer()).undo()
    with pytest.raises(ValueError, match="tokenizers of 'student' and 'teacher' differ in .* words, e.g."):
        apply(trainer, teacher_tokenizer=trainers.letters())
    with pytest.raises(ValueError, match="processing_class, which is None"):
        apply(make(Trainer, tmp_path), teacher=teacher(), teacher_tokenizer=trainers.letters())


class Cubed(hf.LlamaForCausalLM):
    def forward(self, *args, **others):
        outputs = super().forward(*args, **others)
        return outputs.__class__(logits=outputs.logits**3)


def test_a_head_that_no_probe_explains(tmp_path):
    trainer = make(Trainer, tmp_path, Cubed(trainers.language_model(0).config))
    apply(trainer, teacher=teacher())
    with pytest.raises(ValueError, match=r"Cubed \(\w+\) changes the logits behind its head"):
        trainer.train()


def test_settings_that_would_be_ignored(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1"):
        apply(make(Trainer, tmp_path, label_smoothing_factor=0.1), teacher=teacher())
    trainer = make(Trainer, tmp_path)
    trainer.compute_loss_func = len
    with pytest.raises(ValueError, match="compute_loss_func"):
        apply(trainer, teacher=teacher())
    trainer = make(Trainer, tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process"):
        apply(trainer, teacher=teacher())
