"""PyramidTrainer and TernaryTrainer on tiny models of different sizes: losses and optimization."""

import math

import pytest
import torch
import transformers as hf
from coupled_models import batch, chain, one_loss, pyramid, sized, stage, ternary, trained, written_out
from test_seed_trainer import Widest, assert_same
from zoo import Rows, one_thread  # noqa: F401

from hkdfast.batch import answer_rows

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
