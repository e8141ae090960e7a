"""PyramidTrainer and TernaryTrainer on tiny models of different sizes: losses, optimization, folders and errors."""

import gc
import json
import math
import shutil
import weakref

import peft
import pytest
import torch
import transformers as hf
import zoo
from eager import coupled
from test_seed_trainer import Gradients, Widest, assert_same
from transformers import HfArgumentParser, LlavaForConditionalGeneration
from zoo import Rows, one_thread  # noqa: F401

from hkdfast import UNLABELED
from hkdfast.batch import answer_rows
from hkdfast.hf import (
    PyramidConfig,
    PyramidTrainer,
    QuestionCollator,
    SeedTrainer,
    TernaryConfig,
    TernaryTrainer,
    family,
)
from hkdfast.hf.adapter import seed_lora_config
from hkdfast.hf.coupled import CoupledTrainer

STACK = hf.default_data_collator  # of examples that are tensors
SIZES = ((48, 61), (32, 64), (16, 62))  # hidden size and padded vocabulary of a chain
QUIET = dict(use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, learning_rate=1e-3)


def sized(place, text=hf.LlamaConfig, dropout=0.0, **others):
    """The model at this place of the chain."""
    width, vocab = SIZES[place]
    torch.manual_seed(place)
    layers = zoo.GROUPED | dict(hidden_size=width, vocab_size=vocab, attention_dropout=dropout) | others
    model = zoo.llava(text(**layers, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=128))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def chain(count=3, **options):
    return [sized(place, **options) for place in range(count)]


def batch(size=8, unlabeled=(), seed=1):
    """Three answer tokens each; those of `unlabeled` are not known, but where the first would stand."""
    found = zoo.batch(size=size, answers=3, seed=seed)
    found["labels"][0, -3:-1] = -100  # another number of answers
    if unlabeled:
        found["labels"][list(unlabeled)] = -100
        found["distill_only"] = torch.zeros_like(found["labels"], dtype=torch.bool)
        found["distill_only"][list(unlabeled), -1] = True
    return found


def pyramid(folder, models, found, kind=PyramidTrainer, peft_config=None, **options):
    args = PyramidConfig(str(folder), **(QUIET | dict(max_steps=2, per_device_train_batch_size=4) | options))
    return kind(models, args, train_dataset=Rows(found), data_collator=STACK, peft_config=peft_config)


def ternary(folder, models, found, peft_config=None, **options):
    args = TernaryConfig(str(folder), **(QUIET | dict(max_steps=2, per_device_train_batch_size=4) | options))
    return TernaryTrainer(models, args, train_dataset=Rows(found), data_collator=STACK, peft_config=peft_config)


def stage(folder, models, found, eval_dataset=None, **options):
    """The trainer of a pyramid's first stage."""
    args = PyramidConfig(str(folder), **(QUIET | dict(max_steps=2, per_device_train_batch_size=4) | options))
    rates = {"teacher": args.rate_of(0), "student": args.rate_of(1)}
    models = dict(zip(("teacher", "student"), models, strict=True))
    data = dict(train_dataset=Rows(found), eval_dataset=eval_dataset)
    return CoupledTrainer(models, args, args.loss, rates, data_collator=STACK, **data)


def saved(folder, count=3, **options):
    """The chain as folders with a processor."""
    names = []
    for place, model in enumerate(chain(count, **options)):
        names.append(str(folder / f"model-{place}"))
        model.save_pretrained(names[-1])
        zoo.processor().save_pretrained(names[-1])
    return names


def logged(history):
    keep = ("stage", "step", "loss", "grad_norm", "teacher_grad_norm", "student_divergence", "student_cross_entropy")
    return [tuple(entry.get(name) for name in keep) for entry in history if "loss" in entry]


def one_loss(trainer, found, **others):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, found, **others)
    loss.backward()
    return loss.detach(), gradients(trainer)


def gradients(trainer):
    named = trainer.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None and p.grad.any()}


def written_out(trainer, found, edges, hard, **options):
    """The same from full logits, pair by pair."""
    rows, labels = answer_rows(found)
    trainer.model.zero_grad()
    inputs = {name: x for name, x in found.items() if name not in ("labels", "distill_only")}
    logits = [model(**inputs).logits[rows] for model in trainer.model.models.values()]
    words = min(z.shape[-1] for z in logits)
    loss = coupled(logits, edges, labels, hard, vocab=words, **options)
    loss.backward()
    return loss.detach(), gradients(trainer)


# the loss

JSD = ("jensen_shannon", 0.3, True)
STAGES = {
    "concurrent": ([(1, 0, 0.7, *JSD)], (0.4, 0.9)),
    "mutual": ([(1, 0, 0.7, *JSD), (0, 1, 0.7, *JSD)], (0.4, 0.9)),
    "frozen": ([(1, 0, 0.7, *JSD)], (0.0, 0.9)),
}


@pytest.mark.parametrize("unlabeled", [(), (1, 2), range(4)], ids=["labeled", "mixed", "unlabeled"])
@pytest.mark.parametrize("mode", STAGES)
def test_the_loss_of_a_stage_is_its_terms(tmp_path, mode, unlabeled):
    options = dict(stage_weights=0.7, divergence="jensen_shannon", beta=0.3, hard_weight=[0.4, 0.9], temperature=2.0)
    found = batch(size=4, unlabeled=unlabeled)
    trainer = stage(tmp_path, chain(2), found, mode=mode, unlabeled_weight=0.5, **options)
    edges, hard = STAGES[mode]
    exact = dict(temperature=2.0, unlabeled_weight=0.5)
    assert_same(one_loss(trainer, found), written_out(trainer, found, edges, hard, **exact))
    ours = one_loss(trainer, found, num_items_in_batch=torch.tensor(32))
    assert_same(ours, written_out(trainer, found, edges, hard, num_items=32, **exact))
    teacher = trainer.model.models["teacher"]
    assert teacher.training == (mode != "frozen") and trainer.model.models["student"].training


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["concurrent", "frozen"])
def test_hard_weights_go_by_place_in_the_chain(tmp_path, mode):
    options = dict(mode=mode, hard_weight=[0.25, 0.5, 2.0], stage_weights=0.7, max_steps=1)
    trainer = pyramid(tmp_path, chain(), batch(), **options)
    trainer.train()
    stages = [entry for entry in trainer.history if "loss" in entry]
    for entry, (teacher, student) in zip(stages, [(0.25, 0.5), (0.5, 2.0)], strict=True):
        terms = [student * entry["student_cross_entropy"], 0.7 * entry["student_divergence"]]
        terms += [teacher * entry["teacher_cross_entropy"]] if mode == "concurrent" else []
        assert math.isclose(entry["loss"], sum(terms), rel_tol=1e-5)


SKEW = ("skew_kl", 0.2, True)
FORMS = {
    "two_teachers": ([(2, 0, 0.7, *SKEW), (2, 1, 0.2, *SKEW)], (0.0, 0.0, 0.6)),
    "mutual": ([(i, j, (0.7, 0.2, 0.4)[j], *SKEW) for i in range(3) for j in range(3) if i != j], (0.6, 0.6, 0.6)),
    "one_pair": ([(1, 0, 0.7, "forward_kl", 0.5, True), (1, 0, 0.2, "reverse_kl", 0.5, True)], (0.0, 0.6)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_a_refinement_is_its_terms(tmp_path, form):
    edges, hard = FORMS[form]
    weights = (0.7, 0.2, 0.4) if form == "mutual" else (0.7, 0.2)
    found = batch(size=4, unlabeled=(3,))
    options = dict(form=form, teacher_weights=list(weights), divergence="skew_kl", beta=0.2, hard_weight=0.6)
    trainer = ternary(tmp_path, chain(len(hard)), found, **options)
    assert_same(one_loss(trainer, found), written_out(trainer, found, edges, hard))


@pytest.mark.parametrize("text", [hf.GraniteConfig, hf.Gemma2Config], ids=["granite", "gemma2"])
def test_each_model_has_its_own_scale_and_softcap(tmp_path, text):
    """The wrapper applies neither: what counts is what each model does, not what its configuration says."""
    bend = dict(logits_scaling=8.0) if text is hf.GraniteConfig else dict(final_logit_softcapping=5.0, head_dim=8)
    models, found = [sized(0, text, **bend), sized(1)], batch(size=4)
    trainer = stage(tmp_path, models, found)
    assert_same(
        one_loss(trainer, found), written_out(trainer, found, [(1, 0, 1.0, "forward_kl", 0.5, True)], (1.0, 1.0))
    )


def test_autocast_and_checkpointing_change_little_and_nothing(tmp_path):
    found, models = batch(size=4, unlabeled=(1,)), chain(2)
    trainer = stage(tmp_path, models, found)
    exact = one_loss(trainer, found)
    trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(one_loss(trainer, found), exact, rtol=1e-5)
    runs = [stage(tmp_path / str(bf16), chain(2), found, bf16=bf16, max_steps=1) for bf16 in (False, True)]
    norms = []
    for run in runs:
        run.train()
        norms.append(run.state.log_history[0])
    for name in ("loss", "teacher_grad_norm", "student_grad_norm"):
        assert 0 < abs(norms[1][name] - norms[0][name]) < 0.1 * norms[0][name], name


@pytest.mark.parametrize("unlabeled", [(), (1,)], ids=["labeled", "mixed"])
def test_logits_exist_as_tiles_only(tmp_path, unlabeled):
    """Three answers a sequence, 32 sequences, 8192 words: full logits would be about 90 x 8192, twice. No tensor of
    that vocabulary is larger than the heads (48 x 8192) or a block of tiles, forward or backward."""
    vocab, rows, found = 8192, 50, batch(size=32, unlabeled=unlabeled)
    models = [sized(place, vocab_size=vocab) for place in (0, 1)]
    trainer = stage(tmp_path, models, found, tile_memory=2 * rows * vocab * 4 + 4096)  # two tiles of so many rows
    trainer.model.train()
    trainer.model.verify(found)
    with Widest(vocab) as seen:
        trainer.compute_loss(trainer.model, found).backward()
    assert vocab <= seen.numbers <= rows * vocab < answer_rows(found)[0].sum() * vocab


# the optimization


def trained(folder, found, models=None, **options):
    trainer = stage(folder, models or chain(2), found, **options)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.steps


def test_accumulated_batches_are_the_large_batch(tmp_path):
    found, runs = batch(unlabeled=(2, 7)), []
    for size, steps in ((8, 1), (2, 4)):
        accumulated = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        runs.append(trained(tmp_path / str(size), found, max_steps=1, max_grad_norm=0.0, **accumulated))
    whole = runs[0][1][0]
    scale = max(grad.abs().max() for grad in whole.values())
    for name, grad in runs[1][1][0].items():
        assert (grad - whole[name]).abs().max() <= 1e-5 * scale, name
    first, second = (trainer.state.log_history[0] for trainer, _ in runs)
    for name in ("loss", "student_divergence", "student_cross_entropy", "teacher_cross_entropy", "student_agreement"):
        assert math.isclose(first[name], second[name], rel_tol=1e-5), name


def test_each_model_is_clipped_by_its_own_norm(tmp_path):
    found = batch(size=4)
    trainer = stage(tmp_path, chain(2), found)
    one_loss(trainer, found)
    grads = {
        role: [p.grad for p in model.parameters() if p.grad is not None] for role, model in trainer.model.models.items()
    }
    for role, factor in (("teacher", 100.0), ("student", 1e-3)):
        for grad in grads[role]:
            grad *= factor
    before = [grad.clone() for grad in grads["student"]]
    norm = trainer._clip_grad_norm(trainer.model)
    clipped = torch.stack([grad.norm() for grad in grads["teacher"]]).norm()
    assert math.isclose(clipped.item(), 1.0, rel_tol=1e-4) and norm > 1.0  # max_grad_norm is 1
    assert all(torch.equal(grad, old) for grad, old in zip(grads["student"], before, strict=True))


def test_norms_of_models_without_gradients_stand_beside_the_others(tmp_path, monkeypatch):
    trainer = stage(tmp_path, chain(2), batch(size=4))
    monkeypatch.setattr(hf.TrainingArguments, "device", torch.device("meta"))  # where no batch has put a gradient yet
    assert trainer.clip(1.0).device.type == "meta"
    assert [norm.device.type for norm in trainer.grad_norms.values()] == ["meta", "meta"]


def test_each_model_has_its_own_learning_rate_and_decay(tmp_path):
    trainer = stage(tmp_path, chain(2), batch(), learning_rates=[1e-3, 5e-3], weight_decay=0.1, max_steps=4)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.create_optimizer_and_scheduler(4)
    for role, rate in (("teacher", 1e-3), ("student", 5e-3)):
        groups = [group for group in trainer.optimizer.param_groups if group["lr"] == rate]
        ours = {id(p) for group in groups for p in group["params"]}
        assert ours == {id(p) for p in trainer.model.models[role].parameters()}
        assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1]
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    rates = sorted({group["initial_lr"] for group in trainer.optimizer.param_groups})
    assert rates == [1e-3, 5e-3] and {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}
    moved = {name.split(".")[1]: 0.0 for name in before}
    for name, parameter in trainer.model.named_parameters():
        moved[name.split(".")[1]] = max(moved[name.split(".")[1]], (parameter - before[name]).abs().max().item())
    assert 3 < moved["student"] / moved["teacher"] < 7  # AdamW's steps are as large as its rate


def test_frozen_weights_stay(tmp_path):
    models = chain(2)
    before = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in models]
    trainer = pyramid(tmp_path, models, batch(), freeze=["vision_tower"], max_steps=1)
    trainer.train()
    for model, old in zip(models, before, strict=True):
        for name, parameter in model.named_parameters():
            if "vision_tower" in name or "lm_head" in name:
                assert torch.equal(parameter, old[name]) == ("vision_tower" in name), name


# the chain


class Memory:
    """Stands in for load_model: how many models live when the next is loaded."""

    def __init__(self, load):
        self.load, self.made, self.living = load, [], []

    def __call__(self, name, dtype):
        self.living.append(sum(ref() is not None for ref in self.made))
        model = self.load(name, dtype)
        self.made.append(weakref.ref(model))
        return model


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["concurrent", "frozen"])
def test_two_models_of_the_chain_are_in_memory(tmp_path, monkeypatch, mode):
    names = [*saved(tmp_path), *saved(tmp_path / "more", 1)]
    memory = Memory(family.load_model)
    monkeypatch.setattr("hkdfast.hf.pyramid.load_model", memory)
    # autocast is put into a model's own forward, which then holds the model
    trainer = pyramid(tmp_path / "out", names, batch(), max_steps=1, mode=mode, bf16=True)
    gc.disable()  # what is free at the next load must not be luck
    try:
        trainer.train()
    finally:
        gc.enable()
    assert memory.living == [0, 1, 1, 1]
    gc.collect()
    assert [ref() is trainer.model for ref in memory.made] == [False, False, False, True]
    assert [ref() is None for ref in memory.made] == [True, True, True, False]


@pytest.mark.slow
def test_every_finished_model_is_an_ordinary_folder(tmp_path):
    names = saved(tmp_path)
    trainer = pyramid(tmp_path / "out", names, batch(), stage_epochs=[1, 2], max_steps=-1, stage_weights=[1.0, 0.5])
    student = trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("final", "out/stage-2/student"):
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / folder)
        hf.AutoProcessor.from_pretrained(tmp_path / folder)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))
    assert [entry["stage"] for entry in trainer.history if "loss" in entry] == [1] * 2 + [2] * 4
    first, second = (LlavaForConditionalGeneration.from_pretrained(tmp_path / f"out/stage-{k}/{role}")
                     for k, role in ((1, "student"), (2, "teacher")))  # fmt: skip
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)  # it went on learning as a teacher


@pytest.mark.slow
def test_a_frozen_teacher_does_not_change_and_is_not_saved_again(tmp_path):
    names = saved(tmp_path)
    trainer = pyramid(tmp_path / "out", names, batch(), mode="frozen")
    trainer.train()
    assert sorted(each.name for each in (tmp_path / "out/stage-2").iterdir()) == ["done.json", "run.json", "student"]
    assert not any("teacher_cross_entropy" in entry for entry in trainer.history)


LORA = dict(lora_r=4, lora_alpha=8, lora_dropout=0.2, learning_rate=1e-2)


@pytest.mark.slow
def test_adapters_are_trained_and_the_weights_below_stay(tmp_path):
    names = saved(tmp_path)
    student = pyramid(tmp_path / "out", names, batch(), max_steps=3, **LORA).train()
    found = zoo.batch(seed=9)
    for folder, base in (("stage-1/teacher", names[0]), ("stage-2/teacher", names[1]), ("stage-2/student", names[2])):
        below = LlavaForConditionalGeneration.from_pretrained(base).eval()
        before = below(**found).logits
        loaded = peft.PeftModel.from_pretrained(below, tmp_path / "out" / folder).eval()
        assert not torch.allclose(loaded(**found).logits, before, atol=1e-3), folder
        assert peft.PeftConfig.from_pretrained(tmp_path / "out" / folder).base_model_name_or_path == base
    assert torch.allclose(loaded(**found).logits, student.eval()(**found).logits, atol=1e-5)
    # and an adapter can be refined as it is
    refined = ternary(
        tmp_path / "on", [names[0], names[1], str(tmp_path / "out/stage-2/student")], batch(), max_steps=1
    )
    refined.train()
    refined.save_model(str(tmp_path / "refined"))
    again = peft.PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(names[2]), tmp_path / "refined"
    )
    with torch.no_grad():
        assert not torch.allclose(again.eval()(**found).logits, student(**found).logits, atol=1e-4)


def test_one_configuration_makes_adapters_of_all_models(tmp_path):
    """PEFT writes a model's name into the configuration that its adapter is made of."""
    names, config = saved(tmp_path), peft.LoraConfig(r=2, target_modules=["q_proj"])
    pyramid(tmp_path / "out", names, batch(), peft_config=config, max_steps=1).train()
    assert config.base_model_name_or_path is None
    for folder, name in zip(("stage-1/teacher", "stage-2/teacher", "stage-2/student"), names, strict=True):
        assert family.base_of(tmp_path / "out" / folder) == name, folder


@pytest.mark.slow
def test_adapters_know_their_models_from_everywhere(tmp_path, monkeypatch):
    saved(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    first = pyramid("first", ["model-0", "model-1"], batch(), lora_r=2).train()
    second = pyramid("second", ["first/stage-1/teacher", "first/stage-1/student"], batch()).train()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name, trained in (("first", first), ("second", second)):
        loaded = family.load_model(f"../{name}/stage-1/student")
        for ours, theirs in zip(loaded.parameters(), trained.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_an_adapter_is_known_by_its_hub_name(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--zoo--adapter/snapshots/abc"
    peft.LoraConfig(base_model_name_or_path="zoo/base").save_pretrained(snapshot)
    (tmp_path / "models--zoo--adapter/refs").mkdir()
    (tmp_path / "models--zoo--adapter/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert family.is_adapter("zoo/adapter") and family.base_of("zoo/adapter") == "zoo/base"
    assert not family.is_adapter("zoo/nothing") and family.base_of("zoo/nothing") == "zoo/nothing"


# resuming

STEPS = dict(max_steps=3, save_strategy="steps", save_steps=1, per_device_train_batch_size=2,
             gradient_accumulation_steps=2, keep_checkpoints=True)  # fmt: skip


@pytest.fixture(scope="module", params=["full", "lora"])
def whole(request, tmp_path_factory):
    """A training of two stages, with dropout, whose every step is kept."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    names = saved(folder, dropout=0.1)
    options = STEPS | (LORA if request.param == "lora" else {})
    trainer = pyramid(folder / "out", names, batch(unlabeled=(1, 5)), **options)
    trainer.train()
    return folder / "out", names, options, trainer


def kept(source, target, stage, steps, done):
    """What a run leaves that is killed in a stage: its checkpoints so far, and stages before."""
    for number in range(1, stage + 1):
        for each in (source / f"stage-{number}").iterdir():
            if number < stage or done or each.name in ["run.json", *(f"checkpoint-{step}" for step in steps)]:
                where = target / f"stage-{number}" / each.name
                where.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(each, where) if each.is_dir() else shutil.copy(each, where)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, steps, done",
    [(1, (1,), False), (1, (1, 2, 3), False), (1, (), True), (2, (1, 2), False), (2, (1, 2, 3), False), (2, (), True)],
    ids=["amid 1", "end of 1", "after 1", "amid 2", "end of 2", "after 2"],
)
def test_a_killed_run_goes_on_to_the_same_losses_bit_for_bit(whole, tmp_path, stage, steps, done):
    folder, names, options, expected = whole
    kept(folder, tmp_path / "out", stage, steps, done)
    # a kill while a checkpoint is written leaves one without a state
    broken = tmp_path / f"out/stage-{stage}/checkpoint-9"
    shutil.copytree(folder / "stage-1/checkpoint-1", broken)
    (broken / "trainer_state.json").unlink()
    stamps = {each: each.stat().st_mtime_ns for each in (tmp_path / "out").glob("stage-1/done.json")}
    trainer = pyramid(tmp_path / "out", names, batch(unlabeled=(1, 5)), **options)
    torch.manual_seed(123)  # whatever ran before
    student = trainer.train(resume_from_checkpoint=True)
    assert logged(trainer.history) == logged(expected.history)
    for ours, theirs in zip(student.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(each.stat().st_mtime_ns == stamp for each, stamp in stamps.items())  # not done again
    assert (tmp_path / "out/stage-2/done.json").is_file()


@pytest.mark.slow
def test_stages_are_not_overwritten_nor_mixed(whole, tmp_path):
    folder, names, options, _ = whole
    kept(folder, tmp_path / "out", 1, (), True)
    with pytest.raises(
        ValueError, match="stage-1 already holds a training run: pass resume_from_checkpoint=True or choose another"
    ):
        pyramid(tmp_path / "out", names, batch(), **options).train()
    other = [names[1], names[0], names[2]]
    with pytest.raises(ValueError, match=r"another run: models was \['.*model-0', '.*model-1'.* is \['.*model-1'"):
        pyramid(tmp_path / "out", other, batch(), **options).train(True)
    for change, told in (
        (dict(stage_weights=0.5), r"stage_weights was \[1.0\] and is \[0.5\]"),
        (dict(learning_rates=[1.0, 2.0, 3.0]), "learning_rates was .* and is .1.0, 2.0. now"),
        (dict(seed=7), "seed was 42 and is 7"),
    ):
        with pytest.raises(ValueError, match=f"stage-1 is another run: {told}"):
            pyramid(tmp_path / "out", names, batch(), **(options | change)).train(True)
    (tmp_path / "out/stage-1/run.json").unlink()
    with pytest.raises(ValueError, match="stage-1 cannot be resumed: it has no run.json"):
        pyramid(tmp_path / "out", names, batch(), **options).train(True)
    with pytest.raises(ValueError, match="nothing to resume: no folder"):
        pyramid(tmp_path / "nowhere", names, batch(), **options).train(True)
    with pytest.raises(ValueError, match="must be True or False, got '.*checkpoint-1'"):
        pyramid(tmp_path / "out", names, batch(), **options).train(str(folder / "stage-1/checkpoint-1"))
    shutil.copytree(folder, tmp_path / "gap")
    shutil.rmtree(tmp_path / "gap/stage-1")
    with pytest.raises(ValueError, match="stage-2 already holds a training run, but .*stage-1 is not finished"):
        pyramid(tmp_path / "gap", names, batch(), **options).train(True)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_refinement_resumes_bit_for_bit(tmp_path, form):
    count = 2 if form == "one_pair" else 3
    options = STEPS | dict(form=form, teachers="trained")
    runs = []
    for folder, resume in (("one", None), ("two", True), ("three", None)):
        trainer = ternary(tmp_path / folder, chain(count, dropout=0.1), batch(unlabeled=(1, 5)), **options)
        if resume:
            shutil.copytree(tmp_path / "one/checkpoint-1", tmp_path / "two/checkpoint-1")
            shutil.copy(tmp_path / "one/run.json", tmp_path / "two")
        torch.manual_seed(len(runs))  # whatever ran before
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    first, *others = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in runs)
    assert others == [first, first] and len(first) == 3
    for run in runs[1:]:
        for ours, theirs in zip(run.model.parameters(), runs[0].model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    other = ternary(tmp_path / "two", chain(count), batch(), **(options | dict(temperature=2.0)))
    with pytest.raises(ValueError, match="two is another run: temperature was 1.0 and is 2.0 now"):
        other.train(resume_from_checkpoint=str(tmp_path / "two/checkpoint-1"))
    with pytest.raises(
        ValueError, match="two already holds a training run: pass resume_from_checkpoint=True or choose another"
    ):
        ternary(tmp_path / "two", chain(count), batch(), **options).train()  # its checkpoints would be taken for this


def test_checkpoints_go_when_their_stage_is_finished(tmp_path):
    found = dict(STEPS, max_steps=1, keep_checkpoints=False)
    student = pyramid(tmp_path, chain(2), batch(), **found).train()
    assert not list(tmp_path.glob("stage-1/checkpoint-*"))
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stage-1/student")
    assert torch.equal(loaded.lm_head.weight, student.lm_head.weight)


def test_a_refinement_saves_its_student_or_all_that_are_mutual(tmp_path):
    models = chain()
    trainer = ternary(tmp_path / "run", models, batch(), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded.lm_head.weight, models[2].lm_head.weight)
    assert not any(parameter.requires_grad for model in models[:2] for parameter in model.parameters())
    trainer = ternary(tmp_path / "run2", chain(), batch(), max_steps=1, form="mutual")
    trainer.save_model(str(tmp_path / "all"))
    assert sorted(each.name for each in (tmp_path / "all").iterdir()) == ["model1", "model2", "model3"]


def test_the_best_checkpoint_ends_a_stage(tmp_path):
    best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rates=[0.0, 0.5])
    models, found = chain(2), batch()
    before = models[1].lm_head.weight.detach().clone()
    trainer = stage(tmp_path, models, found, Rows(batch(seed=5)), **STEPS | best)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert len(losses) == 3 and all(
        "eval_student_divergence" in e for e in trainer.state.log_history if "eval_loss" in e
    )
    step = min(losses, key=losses.get)
    kept = LlavaForConditionalGeneration.from_pretrained(tmp_path / f"checkpoint-{step}/student")
    assert torch.equal(models[1].lm_head.weight, kept.lm_head.weight)
    assert not torch.equal(before, kept.lm_head.weight)


# two processes


def steps_of(folder, **options):
    """Gradients and log of every step of a pyramid of two stages over eight examples, the last two without answers."""
    seen = Gradients()
    trainer = pyramid(folder, chain(), batch(unlabeled=(6, 7)), max_grad_norm=0.0, **options)
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.steps


@pytest.mark.slow
def test_two_processes_are_one_large_batch(tmp_path):
    """An answer that nobody knows is met by one of the processes in some steps, by both or none in others."""
    trainer, expected = steps_of(tmp_path / "one", per_device_train_batch_size=4)
    zoo.two_processes(
        tmp_path,
        """
import test_coupled_trainers
trainer, steps = test_coupled_trainers.steps_of(FOLDER + "/two", ddp_backend="gloo", per_device_train_batch_size=1,
    gradient_accumulation_steps=2)
if torch.distributed.get_rank() == 0:
    torch.save((steps, trainer.history), FOLDER + "/found.pt")
""",
    )
    found, history = torch.load(tmp_path / "found.pt")
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(grad.abs().max() for grad in theirs.values())
        for name, grad in theirs.items():
            assert (ours[name] - grad).abs().max() <= 1e-3 * scale, name
    for ours, theirs in zip(logged(history), logged(trainer.history), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    ended = sorted(each.name for each in (tmp_path / "two/stage-2").iterdir())
    assert ended == ["done.json", "run.json", "student", "teacher"]


def evaluated(folder, kind, **options):
    """Metrics of five examples, with and without labels, and of as many answers."""
    if kind == "stage":
        found = batch(size=5, unlabeled=(1,))
        return stage(folder, chain(2), found, **options).evaluate(Rows(found))
    found = zoo.batch(size=5, answers=2 if kind == "labels" else None)
    return SeedTrainer(zoo.build("llava"), zoo.config(folder, **options)).evaluate(Rows(found))


KINDS = ("prompts", "labels", "stage")


@pytest.mark.slow
def test_an_evaluation_by_two_processes_counts_each_example_once(tmp_path):
    """Of five examples in batches of two, one process gets three and the other two: the last batches are filled up."""
    zoo.two_processes(
        tmp_path,
        """
import test_coupled_trainers as tests
found = {kind: tests.evaluated(f"{FOLDER}/{kind}", kind, ddp_backend="gloo", per_device_eval_batch_size=2)
    for kind in tests.KINDS}
if torch.distributed.get_rank() == 0:
    torch.save(found, FOLDER + "/found.pt")
""",
    )
    found = torch.load(tmp_path / "found.pt")
    for kind in KINDS:
        expected = evaluated(tmp_path / "one" / kind, kind, per_device_eval_batch_size=5)
        names = [name for name in expected if not name.endswith(("runtime", "per_second", "preparation_time"))]
        assert len(names) > 4
        for name in names:
            assert found[kind][name] == pytest.approx(expected[name], rel=1e-4), (kind, name)


# from pictures


@pytest.mark.slow
def test_pictures_with_and_without_answers(tmp_path):
    """Processor, collator, both systems; the rows without an answer are those where it would begin."""
    processor = zoo.processor()
    examples = [
        {"image": zoo.picture(i), "text": "Is there a cat in the image ?" if i % 2 else "cat ?", "answer": answer}
        for i, answer in enumerate(("Yes", None, "No", None))
    ]
    found = QuestionCollator(processor, answers=True)(examples)
    words = [processor.tokenizer.decode(row[row != -100]) for row in found["labels"]]
    assert words == ["yes </s>", "", "no </s>", ""]
    rows, labels = answer_rows(found)
    assert rows.sum(1).tolist() == [2, 1, 2, 1] and (labels == UNLABELED).sum() == 2
    # the row without an answer sees what the first answer token follows
    said = [found["input_ids"][i][rows[i]][0] for i in range(4)]
    assert len(set(map(int, said))) == 1
    for kind, config, models in (
        (PyramidTrainer, PyramidConfig, chain(3)),
        (TernaryTrainer, TernaryConfig, chain(3)),
    ):
        args = config(str(tmp_path / kind.__name__), **QUIET, max_steps=2, per_device_train_batch_size=2)
        trainer = kind(models, args, train_dataset=examples, processing_class=processor)
        trainer.train()
        history = trainer.history if kind is PyramidTrainer else trainer.state.log_history
        assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)


def test_an_example_without_an_answer_is_told(tmp_path):
    examples = [{"image": zoo.picture(0), "text": "cat ?"}]
    with pytest.raises(ValueError, match="example 0 of the batch has no 'answer', only image, text"):
        QuestionCollator(zoo.processor(), answers=True)(examples)


# errors


def test_every_option_explains_itself_and_parses():
    for config in (PyramidConfig, TernaryConfig):
        (parsed,) = HfArgumentParser(config).parse_args_into_dataclasses(["--output_dir", "x", "--hard_weight", "0.5"])
        assert parsed.hard_weight == [0.5]
        own = [
            f
            for name, f in config.__dataclass_fields__.items()
            if name not in hf.TrainingArguments.__dataclass_fields__
        ]
        assert all(field.metadata["help"].endswith(".") for field in own)


@pytest.mark.parametrize(
    "config, options, message",
    [
        (PyramidConfig, dict(mode="online"), "concurrent, mutual, frozen"),
        (PyramidConfig, dict(stage_weights=[1.0, -1.0]), r"stage_weights must be numbers that are not negative.*-1.0"),
        (PyramidConfig, dict(stage_weights=[]), "at least one"),
        (PyramidConfig, dict(stage_epochs=[-1.0]), "stage_epochs must be"),
        (PyramidConfig, dict(learning_rates=[float("nan")]), "learning_rates must be"),
        (PyramidConfig, dict(hard_weight=-1.0), "hard_weight"),
        (TernaryConfig, dict(hard_weight=[1.0] * 4), "hard_weight must be one number per model at most.*for 3 models"),
        (PyramidConfig, dict(mode="frozen", detach=False), "detach=False"),
        (PyramidConfig, dict(divergence="kl"), "unknown divergence 'kl'"),
        (PyramidConfig, dict(temperature=0.0), "temperature"),
        (PyramidConfig, dict(divergence="jensen_shannon", beta=1.0), "0 < beta < 1"),
        (PyramidConfig, dict(unlabeled_weight=-1.0), "unlabeled_weight"),
        (PyramidConfig, dict(lora_r=0), "lora_r must be at least 1"),
        (PyramidConfig, dict(backend="cudnn"), "unknown backend"),
        (PyramidConfig, dict(vocab="all"), "vocab must be None"),
        (PyramidConfig, dict(label_smoothing_factor=0.1), "label_smoothing_factor"),
        (PyramidConfig, dict(learning_rates=-1.0), r"learning_rates must be numbers .* got \[-1.0\]"),
        (PyramidConfig, dict(stage_epochs=-2), r"stage_epochs must be numbers .* got \[-2.0\]"),
        (
            PyramidConfig,
            dict(mode="mutual", detach=False, teacher_floor=-5.0),
            "teacher_floor=-5.0 takes constant teachers",
        ),
        (PyramidConfig, dict(mode="frozen", stage_weights=[0.0], hard_weight=0.0), "every weight of the coupling is 0"),
        (TernaryConfig, dict(form="triple"), "two_teachers, mutual, one_pair"),
        (TernaryConfig, dict(teachers="dead"), "frozen, trained"),
        (TernaryConfig, dict(teacher_weights=[1.0, 1.0, 1.0]), r"one number or 2 \(teacher1, teacher2\)"),
        (TernaryConfig, dict(teacher_coupling=1.0), "two trained teachers"),
    ],
)
def test_wrong_options_are_told_before_any_work(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_wrong_models_are_told_before_any_work(tmp_path):
    names, out = saved(tmp_path, 2), tmp_path / "out"
    other = zoo.processor()
    other.tokenizer.add_tokens(["giraffe"])
    other.save_pretrained(shutil.copytree(names[1], tmp_path / "words"))
    other = zoo.processor()
    other.image_processor.image_mean = [0.4] * 3
    other.save_pretrained(shutil.copytree(names[1], tmp_path / "pixels"))
    model = sized(0)
    small = zoo.llava(zoo.llama(vocab=20))
    cases = [
        (names[:1], "at least two models"),
        (names[0], "at least two models"),
        ([model, sized(1), model], "occurs twice"),
        (
            [names[0], str(tmp_path / "words")],
            "tokenizers of '.*model-0' and '.*words' differ in 1 of 25 and 26.*giraffe",
        ),
        ([names[0], str(tmp_path / "pixels")], "image processors of '.*model-0' and '.*pixels' differ in image_mean"),
    ]
    for models, message in cases:
        with pytest.raises(ValueError, match=message):
            pyramid(out, models, batch())
        assert not out.exists()
    with pytest.raises(OSError, match="nowhere"):
        pyramid(out, [*names, str(tmp_path / "nowhere")], batch())
    with pytest.raises(ValueError, match=r"couples 3 models \(teacher1, teacher2, student\)"):
        ternary(out, names, batch())
    with pytest.raises(ValueError, match="must be different objects"):
        ternary(out, [model, model, sized(1)], batch())
    with pytest.raises(ValueError, match="head of model 2 has 20 tokens, fewer than the tokenizer's 25"):
        PyramidTrainer([model, small], PyramidConfig(str(out), **QUIET), processing_class=zoo.processor())
    with pytest.raises(ValueError, match="'nothing' is in the name of no weight"):
        pyramid(out, names, batch(), freeze=["nothing"]).train()
    with pytest.raises(ValueError, match="no language-model head"):
        pyramid(out, [model.model, sized(1)], batch()).train()
    with pytest.raises(TypeError, match="PyramidConfig"):
        PyramidTrainer(names, TernaryConfig(str(out)))
    with pytest.raises(ValueError, match="one or 2, one per model"):
        pyramid(out, names, batch(), peft_config=[None] * 3)
    with pytest.raises(ValueError, match="learning_rates must be one number per model at most.*for 2 models"):
        pyramid(out, names, batch(), learning_rates=[1e-3] * 3)
    with pytest.raises(ValueError, match="stage_epochs must be one number per stage at most.*for 1 stages"):
        pyramid(out, names, batch(), stage_epochs=[1, 2])


def test_later_models_of_a_chain_are_looked_at_before_the_first_is_trained(tmp_path):
    names, out = saved(tmp_path, 3), tmp_path / "out"
    sized(2, num_hidden_layers=1).save_pretrained(names[2])
    with pytest.raises(ValueError, match="'language_model.layers.1.' is in the name of no weight"):
        pyramid(out, names, batch(), freeze=["language_model.layers.1."])
    adapted = seed_lora_config(sized(1))
    peft.get_peft_model(family.load_model(names[1]), adapted).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="has an adapter already"):
        pyramid(out, [names[0], names[1], tmp_path / "adapter"], batch(), peft_config=[None, None, adapted])
    pyramid(out, [names[0], tmp_path / "adapter"], batch(), freeze=["lora_A"], mode="frozen")
    with pytest.raises(ValueError, match="init_lora_weights 'pissa' changes the frozen weights"):
        pyramid(out, names, batch(), peft_config=peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    zoo.llava(zoo.llama(vocab=20)).save_pretrained(names[2])
    with pytest.raises(ValueError, match="head of model 3 has 20 tokens, fewer than the tokenizer's 25"):
        pyramid(out, names, batch())
    assert not out.exists()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_distillation_a_frozen_teacher_is_not_run(tmp_path, weight):
    models, found = chain(2), batch()
    trainer = stage(tmp_path, models, found, mode="frozen", stage_weights=[weight])
    trainer.evaluate(Rows(found))  # the first batch of all has every head looked at
    run = []
    models[0].register_forward_hook(lambda *_: run.append(1))
    metrics = trainer.evaluate(Rows(found))
    assert bool(run) == bool(weight)
    if not weight:
        truth = models[1](**found).loss.item()
        assert math.isclose(metrics["eval_loss"], metrics["eval_student_cross_entropy"], rel_tol=1e-6)
        assert math.isclose(metrics["eval_loss"], truth, rel_tol=1e-4)


def test_a_batch_without_labels_is_told(tmp_path):
    found = batch()
    del found["labels"]
    with pytest.raises(ValueError, match="needs labels in the batch, which has input_ids"):
        pyramid(tmp_path, chain(2), found).train()
    trainer = pyramid(tmp_path / "soft", chain(2), found, mode="frozen", hard_weight=0.0)  # needs none
    trainer.train()
    assert json.loads((tmp_path / "soft/stage-1/done.json").read_text())["stage"] == 1
