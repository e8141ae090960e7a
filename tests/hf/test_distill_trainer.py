"""DistillTrainer on tiny models: the loss of an eager Trainer, several teachers, and what users of Trainer know."""

import copy
import math

import peft
import pytest
import torch
import transformers as hf
import zoo
from torch.nn import functional as F
from zoo import one_thread  # noqa: F401

from hkdfast.batch import answer_rows
from hkdfast.hf import DistillArguments, DistillConfig, DistillMixin, DistillTrainer, TextCollator, seed_lora_config
from hkdfast.hf.distill import TeacherCollator

QUIET = dict(
    use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1, max_steps=3,
    learning_rate=1e-3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
)  # fmt: skip


def config(folder, **options):
    return DistillConfig(str(folder), **QUIET | options)


def lm(seed=0, vocab=61, **others):
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(zoo.llama(vocab, **others)).eval()
    with torch.no_grad():  # at 0.02 the usual initialization leaves nothing to distill
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def examples(count=12, seed=3):
    """Token sequences of unequal length, the first two tokens of each without a label."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(4, 11, (count,), generator=draw).tolist():
        ids = torch.randint(8, 25, (length,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.processor("llava").tokenizer


def trainer(folder, tokenizer, model=None, teacher=None, data=None, kind=DistillTrainer, **options):
    others = {name: options.pop(name) for name in ("eval_dataset", "peft_config", "compute_metrics") if name in options}
    return kind(
        model or lm(),
        teacher=teacher or lm(1),
        args=config(folder, **options),
        train_dataset=data or examples(),
        processing_class=tokenizer,
        **others,
    )


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def eager_rows(student, teacher, batch, divergence="forward_kl", hard=0.0, temperature=1.0):
    """(N,) losses from logits, as plain PyTorch computes them."""
    rows, labels = answer_rows(batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    q = student(**inputs, use_cache=False).logits[rows]  # with a cache packed text is one sequence
    with torch.no_grad():
        p = teacher(**inputs, use_cache=False).logits[rows]
    vocab = min(q.shape[-1], p.shape[-1])
    log_q, log_p = ((x[:, :vocab] / temperature).log_softmax(-1) for x in (q, p))
    one, other = (log_q, log_p) if divergence == "forward_kl" else (log_p, log_q)
    soft = F.kl_div(one, other, reduction="none", log_target=True).sum(-1)
    known = F.cross_entropy(q[:, :vocab], labels.clamp_min(0), reduction="none").where(labels >= 0, 0)
    return soft + hard * known


class Eager(hf.Trainer):
    """What people write in Trainer.compute_loss."""

    teacher = options = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        rows = eager_rows(model, self.teacher, inputs, **self.options)
        count = len(rows) if num_items_in_batch is None else num_items_in_batch
        return rows.sum() / count


@pytest.mark.parametrize("options", [{}, {"divergence": "reverse_kl", "hard_weight": 0.5, "temperature": 2.0}])
def test_three_steps_are_those_of_an_eager_trainer(tmp_path, tokenizer, options):
    ours = trainer(tmp_path / "ours", tokenizer, **options)
    arguments = hf.TrainingArguments(str(tmp_path / "eager"), **QUIET | {"remove_unused_columns": False})
    eager = Eager(lm(), arguments, train_dataset=examples(), data_collator=TextCollator(tokenizer))
    eager.teacher = lm(1)
    eager.options = {"hard" if name == "hard_weight" else name: value for name, value in options.items()}
    for one in (ours, eager):
        one.train()
    assert losses(ours) == pytest.approx(losses(eager), rel=1e-6)
    assert len(losses(ours)) == 3
    for name, weight in ours.model.state_dict().items():
        assert (weight - eager.model.state_dict()[name]).abs().max() <= 1e-4 * 1e-3 * 3, name


def test_what_is_logged_is_of_the_answers(tmp_path, tokenizer):
    ours = trainer(tmp_path, tokenizer, max_steps=1, hard_weight=0.25, divergence_weight=0.5)
    batch = ours.data_collator(examples(4))
    rows = eager_rows(ours.model, lm(1), batch)
    with torch.no_grad():
        loss = ours.compute_loss(ours.model, batch)
    means = ours.means(ours.sums["eval"])
    assert set(means) == {
        "agreement", "confidence", "cross_entropy", "divergence", "student_entropy", "teacher_entropy",
    }  # fmt: skip
    assert means["divergence"] == pytest.approx(rows.mean().item(), rel=1e-5)
    expected = 0.5 * means["divergence"] + 0.25 * means["cross_entropy"]
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_model_without_its_adapter_teaches(tmp_path, tokenizer):
    made = trainer(tmp_path, tokenizer, teacher="self", lora_r=4)
    base = lm()
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    batch = made.data_collator(examples(4))
    expected = eager_rows(made.model, base, batch).mean()
    torch.testing.assert_close(made.compute_loss(made.model, batch), expected)
    made.train()
    with made.model.disable_adapter():
        batch = made.data_collator(examples(4))
        torch.testing.assert_close(made.model(batch["input_ids"]).logits, base(batch["input_ids"]).logits)


# several teachers


def named(data):
    return [each | {"teacher_id": ("math", "code", "self")[n % 3]} for n, each in enumerate(data)]


def test_each_example_learns_from_its_teacher(tmp_path, tokenizer):
    others = {"math": lm(1, vocab=64), "code": lm(2)}
    adapted = peft.get_peft_model(lm(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    made = trainer(tmp_path, tokenizer, adapted, others | {"self": "self"}, named(examples()), hard_weight=0.5)
    batch = made.data_collator(named(examples(7)))
    assert batch["teacher_id"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    base = lm()
    parts = []
    for number, teacher in enumerate([*others.values(), base]):
        chosen = batch["teacher_id"] == number
        part = {name: x[chosen] for name, x in batch.items() if name != "teacher_id"}
        parts.append(eager_rows(made.model, teacher, part, hard=0.5))
    expected = torch.cat(parts)
    loss = made.compute_loss(made.model, batch)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(
        made.compute_loss(made.model, batch, num_items_in_batch=torch.tensor(50)), expected.sum() / 50
    )
    names = [name for name, p in made.model.named_parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad(x, [made.model.get_parameter(name) for name in names]) for x in (loss, expected.mean())
    )
    for name, x, y in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=name)
    means = made.means(made.sums["train" if made.model.training else "eval"])
    assert {"divergence_math", "divergence_code", "divergence_self"} <= set(means)
    made.train()
    assert len(losses(made)) == 3


def test_a_teacher_of_every_position_of_packed_text(tmp_path, tokenizer):
    teachers = {"a": lm(1), "b": lm(2)}
    made = trainer(tmp_path, tokenizer, teacher=teachers)
    parts = examples(4)
    ids = torch.tensor([sum((each["input_ids"] for each in parts), [])])
    labels = torch.tensor([sum(([-100, *each["labels"][1:]] for each in parts), [])])
    lengths = [len(each["input_ids"]) for each in parts]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    chosen = torch.cat([torch.full((length,), n % 2) for n, length in enumerate(lengths)])[None]
    packed = {"input_ids": ids, "labels": labels, "position_ids": positions}
    loss = made.compute_loss(made.model, packed | {"teacher_id": chosen})
    rows = answer_rows(packed)[0]
    one, two = (eager_rows(made.model, teacher, packed) for teacher in teachers.values())
    torch.testing.assert_close(loss, torch.where(chosen[rows] == 0, one, two).mean())


def test_teachers_of_images_run_on_the_whole_batch(tmp_path):
    processor = zoo.processor("llava")
    data = [
        {"image": zoo.picture(n), "text": "is there a cat ?", "answer": ("yes", "no", None)[n % 3], "teacher_id": n % 2}
        for n in range(5)
    ]
    teachers = {n: zoo.build("llava", seed=n + 1) for n in range(2)}
    made = DistillTrainer(
        zoo.build("llava"), teachers, config(tmp_path, max_steps=1), train_dataset=data, processing_class=processor
    )
    batch = made.data_collator(data)
    assert batch["distill_only"].sum() == 1
    loss = made.compute_loss(made.model, batch)
    rows, _ = answer_rows(batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    log_q = made.model(**inputs).logits[rows].log_softmax(-1)
    both = [teacher(**inputs).logits[rows].log_softmax(-1) for teacher in teachers.values()]
    mine = batch["teacher_id"][:, None].expand(rows.shape)[rows]
    log_p = torch.where(mine[:, None] == 0, *both)
    expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    made.train()


def test_a_batch_without_answers_has_a_loss_of_zero(tmp_path, tokenizer):
    for teacher in (lm(1), {"a": lm(1), "b": lm(2)}):
        made = trainer(tmp_path, tokenizer, teacher=teacher)
        batch = TextCollator(tokenizer)(examples(2))
        batch["labels"][:] = -100
        if isinstance(teacher, dict):
            batch["teacher_id"] = torch.tensor([0, 1])
        loss = made.compute_loss(made.model, batch, num_items_in_batch=5)
        loss.backward()
        assert loss == 0
        made.model.zero_grad()


# data


def collated(name, tokenizer):
    if name == "seq2seq":
        return hf.DataCollatorForSeq2Seq(tokenizer)(examples(4))
    if name == "language modeling":
        collator = hf.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        return collator([{"input_ids": each["input_ids"]} for each in examples(4)])
    if name == "flattening":
        return hf.DataCollatorWithFlattening()(examples(4))
    batch = dict(hf.DataCollatorForSeq2Seq(tokenizer)(examples(4)))
    labels = batch.pop("labels")
    return batch | {"shift_labels": F.pad(labels[:, 1:], (0, 1), value=-100)}


@pytest.mark.parametrize("name", ["seq2seq", "language modeling", "flattening", "shift_labels"])
def test_batches_of_the_collators_that_people_have(tmp_path, tokenizer, name):
    made = trainer(tmp_path, tokenizer)
    batch = collated(name, tokenizer)
    expected = eager_rows(made.model, made.teachers[None].model, dict(batch)).mean()
    torch.testing.assert_close(made.compute_loss(made.model, batch), expected)


def test_unused_columns_may_be_removed_but_those_of_the_loss_stay(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(
        [{"input_ids": each["input_ids"], "note": "x", "teacher_id": "ab"[n % 2]} for n, each in enumerate(examples())]
    )
    made = trainer(
        tmp_path, tokenizer, teacher={"a": lm(1), "b": lm(2)}, data=data, remove_unused_columns=True, max_steps=1
    )
    made.train()
    assert "divergence_b" in made.state.log_history[0]


def test_vision_language_models_learn_by_the_processor_alone(tmp_path):
    processor = zoo.processor("internvl")
    data = [{"image": zoo.picture(n), "text": "is there a cat ?", "answer": "yes"} for n in range(4)]
    made = DistillTrainer(
        zoo.build("internvl"), zoo.build("internvl", 1), config(tmp_path, max_steps=2), train_dataset=data,
        processing_class=processor,
    )  # fmt: skip
    made.train()
    assert all(math.isfinite(loss) and loss > 0 for loss in losses(made))


# what users of Trainer know


def test_metrics_of_logits_and_predictions(tmp_path, tokenizer):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"right": float((prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    made = trainer(tmp_path, tokenizer, eval_dataset=examples(5), compute_metrics=compute_metrics)
    found = made.evaluate()
    assert "eval_right" in found
    batch = made.data_collator(examples(5))
    assert found["eval_loss"] == pytest.approx(eager_rows(made.model, lm(1), batch).mean().item(), rel=1e-5)
    logits = made.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.tensor(seen[0].predictions), logits.detach())
    assert (seen[0].label_ids == batch["labels"].numpy()).all()
    output = made.predict(examples(5))
    assert output.predictions.shape == logits.shape
    assert output.metrics["test_divergence"] == pytest.approx(found["eval_divergence"])
    without = trainer(tmp_path, tokenizer, eval_dataset=examples(5)).evaluate()  # makes no logits
    assert without["eval_loss"] == pytest.approx(found["eval_loss"])


@pytest.mark.parametrize("lora_r", [None, 4])
def test_resumed_to_the_same_losses_bit_for_bit(tmp_path, tokenizer, lora_r):
    options = dict(save_strategy="steps", save_steps=2, max_steps=4, lora_r=lora_r)
    whole = trainer(tmp_path / "whole", tokenizer, **options)
    whole.train()
    resumed = trainer(tmp_path / "whole", tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    finished = trainer(tmp_path / "whole", tokenizer, **options)
    assert finished.train(resume_from_checkpoint=True) is None
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, finished.model.state_dict()[name]), name


def test_models_and_teachers_by_name(tmp_path, tokenizer):
    for name, model in (("student", lm()), ("teacher", lm(1))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    adapter = peft.get_peft_model(lm(1), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "teacher")
    adapter.save_pretrained(tmp_path / "adapter")
    made = DistillTrainer(
        str(tmp_path / "student"),
        {"plain": str(tmp_path / "teacher"), "adapted": tmp_path / "adapter"},
        config(tmp_path / "out", max_steps=1, attn_implementation="eager"),
        train_dataset=[each | {"teacher_id": "adapted"} for each in examples()],
    )
    assert made.processing_class.get_vocab() == tokenizer.get_vocab()
    assert made.model.config._attn_implementation == "eager"
    assert made.teachers["adapted"].model.get_base_model().config._attn_implementation == "eager"
    batch = made.data_collator([each | {"teacher_id": "adapted"} for each in examples(4)])
    plain = {name: x for name, x in batch.items() if name != "teacher_id"}
    expected = eager_rows(made.model, adapter.eval(), plain).mean()
    torch.testing.assert_close(made.compute_loss(made.model, batch), expected)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(plain["input_ids"]).logits, made.model(plain["input_ids"]).logits)


def test_the_config_is_ready_for_the_argument_parser():
    parser = hf.HfArgumentParser(DistillConfig)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "out", "--divergence", "skew_kl", "--beta", "0.1", "--hard_weight", "0.5", "--use_cpu"]
    )
    assert (
        args.loss_options()
        == DistillConfig("out", divergence="skew_kl", beta=0.1, hard_weight=0.5, use_cpu=True).loss_options()
    )


def test_pushed_to_the_hub_as_trainer_does(tmp_path, tokenizer, monkeypatch):
    pushed = {}

    class Api:
        def create_repo(self, name, **_):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, **options):
            pushed.update(options)

    monkeypatch.setattr(hf.trainer, "hf_api", Api)
    made = trainer(tmp_path / "student", tokenizer, push_to_hub=True, hub_token="token")
    made.push_to_hub()
    assert pushed["repo_id"] == "me/student"
    assert {"model.safetensors", "README.md"} <= {file.name for file in (tmp_path / "student").iterdir()}


def test_the_mixin_serves_a_trainer_of_trl(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from dataclasses import dataclass

    @dataclass
    class MyConfig(DistillArguments, trl.SFTConfig):
        pass

    class MyTrainer(DistillMixin, trl.SFTTrainer):
        pass

    data = datasets.Dataset.from_list([{"input_ids": each["input_ids"]} for each in examples()])
    args = MyConfig(str(tmp_path), **QUIET | {"bf16": False, "hard_weight": 0.5})
    made = MyTrainer(lm(), args, teacher=lm(1), train_dataset=data, processing_class=tokenizer)
    batch = made.data_collator([data[n] for n in range(4)])
    torch.testing.assert_close(
        made.compute_loss(made.model, batch), eager_rows(made.model, lm(1), batch, hard=0.5).mean()
    )
    made.train()
    assert len(losses(made)) == 3


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, tokenizer):
    options = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=2)
    whole = trainer(tmp_path / "one", tokenizer, **options)
    whole.train()
    body = """
import test_distill_trainer as t
tokenizer = zoo.processor("llava").tokenizer
made = t.trainer(FOLDER + "/two", tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=2)
made.train()
if made.is_world_process_zero():
    torch.save((t.losses(made), made.model.state_dict()), FOLDER + "/two.pt")
"""
    zoo.two_processes(tmp_path, body)
    found, weights = torch.load(tmp_path / "two.pt")
    assert found == pytest.approx(losses(whole), rel=1e-5)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4 * 1e-3 * 2, msg=name)


@pytest.mark.slow
def test_compiled_models_learn_the_same(tmp_path, tokenizer):
    data = [{"input_ids": each["input_ids"][:4]} for each in examples()]
    found = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "inductor"}):
        torch._dynamo.reset()
        student, teacher = (hf.LlamaForCausalLM(zoo.llama(**{"attn_implementation": "eager"})) for _ in "st")
        for number, model in enumerate((student, teacher)):
            del model.model.layers[1:]
            model.load_state_dict(lm(number).state_dict(), strict=False)
        made = trainer(
            tmp_path, tokenizer, student, teacher, data, gradient_accumulation_steps=1, max_steps=2, **options
        )
        made.train()
        found.append(losses(made))
    torch._dynamo.reset()
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][0] != found[0][1]


# bad input


def test_what_cannot_teach_is_refused(tmp_path, tokenizer):
    model = lm()
    wrong = {
        "teacher is NoneType, expected a model": None,
        "teacher 'a' is int, expected": {"a": 3},
        "teacher is an empty dict": {},
        "teacher is the model itself": model,
        'teacher is "self", the model without its adapter, but it has none': "self",
        "no-such-model": str(tmp_path / "no-such-model"),
    }
    for message, teacher in wrong.items():
        with pytest.raises((ValueError, OSError), match=message):
            DistillTrainer(model, teacher, config(tmp_path), train_dataset=examples(), processing_class=tokenizer)
    tied = copy.copy(lm(1))
    tied.lm_head = model.lm_head
    with pytest.raises(ValueError, match="share the weight lm_head.weight"):
        trainer(tmp_path, tokenizer, model, tied)
    with pytest.raises(ValueError, match=r"the model \(61 tokens\) and teacher \(64\) differ: set vocab"):
        trainer(tmp_path, tokenizer, teacher=lm(1, vocab=64), vocab=None)
    with pytest.raises(ValueError, match="head of teacher has 20 tokens, fewer than the tokenizer's 25"):
        trainer(tmp_path, tokenizer, teacher=lm(1, vocab=20))


def test_tokenizers_that_differ_are_refused_by_name(tmp_path, tokenizer):
    lm(1).save_pretrained(tmp_path / "teacher")
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["horse"])
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="processing_class.*differ in 1 of 25 and 26 words, e.g. 'horse'"):
        trainer(tmp_path, tokenizer, teacher=str(tmp_path / "teacher"))


def test_bad_options_are_refused_before_any_work(tmp_path, tokenizer):
    wrong = {
        "unknown divergence 'kl'": dict(divergence="kl"),
        "divergence_weight must be": dict(divergence_weight=-1.0),
        "max_length must be at least 2": dict(max_length=1),
        "label_smoothing_factor cannot be used": dict(label_smoothing_factor=0.1),
        "lora_r must be at least 1": dict(lora_r=0),
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **options)
    with pytest.raises(TypeError, match="no option 'tiles': it is called precision now"):
        config(tmp_path, tiles="float32")
    with pytest.raises(TypeError, match="args must have the options of DistillArguments"):
        DistillTrainer(lm(), lm(1), hf.TrainingArguments(str(tmp_path)), processing_class=tokenizer)
    with pytest.raises(TypeError, match="DistillTrainer has no argument 'teachers'"):
        DistillTrainer(lm(), lm(1), config(tmp_path), processing_class=tokenizer, teachers=[])
    with pytest.raises(ValueError, match="compute_loss_func is not used"):
        DistillTrainer(lm(), lm(1), config(tmp_path), processing_class=tokenizer, compute_loss_func=print)
    with pytest.raises(ValueError, match="max_length is used by the default text collator"):
        DistillTrainer(lm(), lm(1), config(tmp_path, max_length=9), data_collator=hf.default_data_collator)
    with pytest.raises(ValueError, match="attn_implementation 'fastest'"):
        trainer(tmp_path, tokenizer, attn_implementation="fastest")


def test_batches_without_what_is_needed_are_refused(tmp_path, tokenizer):
    made = trainer(tmp_path, tokenizer)
    batch = TextCollator(tokenizer)(examples(2))
    del batch["labels"]
    with pytest.raises(ValueError, match="the batch has no labels"):
        made.compute_loss(made.model, batch)
    collate = TeacherCollator(TextCollator(tokenizer), ["a", "b"])
    with pytest.raises(ValueError, match=r"have no teacher_id, expected one of \['a', 'b'\]"):
        collate(examples(2))
    with pytest.raises(ValueError, match="example 1 of the batch: teacher_id is 'c', expected one of"):
        collate([each | {"teacher_id": name} for each, name in zip(examples(2), "ac", strict=True)])
    with pytest.raises(ValueError, match="there is a single teacher"):
        TeacherCollator(TextCollator(tokenizer), [None])([each | {"teacher_id": "a"} for each in examples(2)])


def test_weights_outside_an_adapter_are_refused_where_the_model_teaches_itself(tmp_path, tokenizer):
    model = lm()
    adapter = seed_lora_config(model, r=2)
    adapter.bias = "all"
    with pytest.raises(ValueError, match="switching the adapter off does not undo it"):
        trainer(tmp_path, tokenizer, hf.Qwen2ForCausalLM(zoo.qwen()), "self", peft_config=adapter)
