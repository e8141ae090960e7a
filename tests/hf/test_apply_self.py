"""hkdfast.hf.apply to SDFTTrainer and SDPOTrainer of trl.experimental: the same training, without logits."""

import peft
import pytest
import torch
import trainers
from test_seed_trainer import Widest
from zoo import one_thread  # noqa: F401

from hkdfast.hf import apply

pytest.importorskip("trl")
NAMES = ("loss", "self_distillation/distillation_loss")


def compare(name, folder, names=NAMES, change=None, **options):
    """Train with and without a patch; returns the losses."""
    runs = []
    for patch in (lambda trainer: None, apply):
        trainer = getattr(trainers, name)(folder, **options)
        if change:
            change(trainer)
        patch(trainer)
        runs.append(trainers.trained(trainer))
    trainers.assert_same(*reversed(runs), names)
    losses = [entry["loss"] for entry in runs[0][0]]
    assert losses[-1] > 1e-2
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["sdft", "sdpo"])
def test_a_patched_trainer_trains_as_before(name, alpha, tmp_path):
    compare(name, tmp_path, distillation_alpha=alpha, temperature=0.8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdft", "sdpo"])
def test_samples_of_an_older_student_are_weighted(name, tmp_path):
    """Completions that serve for two steps: the clipped ratio of probabilities is no longer 1."""
    options = dict(num_iterations=2, distillation_alpha=1.0, temperature=0.8, learning_rate=0.1, max_grad_norm=0.1)
    clipped = compare(name, tmp_path, distillation_is_clip=1.05, **options)
    assert clipped != compare(name, tmp_path, distillation_is_clip=None, **options)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_policy_loss_beside_it(weight, tmp_path):
    names = (*NAMES, "self_distillation/policy_loss") if weight < 1 else NAMES
    compare("sdpo", tmp_path, names, distillation_weight=weight, temperature=1.2)


def test_the_first_tokens_are_skipped(tmp_path):
    compare("sdft", tmp_path, num_loss_tokens_to_skip=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["live", "base", "ema"])
@pytest.mark.parametrize("adapted", [False, True])
def test_every_kind_of_teacher(kind, adapted, tmp_path):
    config = None
    if adapted:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    compare("sdft", tmp_path, teacher_model_kind=kind, peft_config=config)


def test_no_logits_are_made(tmp_path):
    vocab = 997
    trainer = trainers.sdft(tmp_path, trainers.language_model(0, 16, vocab), max_completion_length=24)
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
    trainer.current_gradient_accumulation_steps = 1
    with Widest(vocab) as plain:
        trainer.compute_loss(trainer.model, inputs).backward()
    apply(trainer, tile_memory=3 * 4 * vocab * 4)
    trainer.compute_loss(trainer.model, inputs)  # verifies
    with Widest(vocab) as ours:
        trainer.compute_loss(trainer.model, inputs).backward()
    assert plain.numbers >= inputs["completion_ids"].numel() * vocab
    assert 0 < ours.numbers <= trainer.model.lm_head.weight.numel() < plain.numbers


def test_a_step_without_tokens(tmp_path):
    trainer = trainers.sdft(tmp_path, num_loss_tokens_to_skip=0)
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
    trainer.current_gradient_accumulation_steps = 1
    trainer.num_loss_tokens_to_skip = 99
    apply(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss == 0 and all(not x.grad.any() for x in trainer.model.parameters() if x.grad is not None)
    assert trainer._metrics["train"]["self_distillation/distillation_loss"][-1] == 0


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_options_of_the_loss(weight, tmp_path):
    """A temperature of one's own, with and without logits: of the divergence, not of the samples."""
    trainer = trainers.sdpo(tmp_path, distillation_weight=weight, temperature=0.5)
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
    trainer.current_gradient_accumulation_steps = 1
    patch = apply(trainer, "forward_kl", temperature=2.0, t_squared=True)
    trainer.compute_loss(trainer.model, inputs)
    found = trainer._metrics["train"]["self_distillation/distillation_loss"][-1]
    patch.undo()
    trainer.temperature = 2.0
    trainer.args.distillation_alpha = 0.0
    trainer.compute_loss(trainer.model, inputs)
    truth = trainer._metrics["train"]["self_distillation/distillation_loss"][-1]
    assert found == pytest.approx(4 * truth, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"distillation_mode": "topk_logits", "distillation_topk": 5}, "'topk_logits' reads few words only: expected"),
        ({"distillation_weight": 0.0}, "distillation_weight=0.0 leaves no divergence"),
    ],
)
def test_what_is_refused(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        apply(trainers.sdpo(tmp_path, **options))
    with pytest.raises(ValueError, match="hard_weight 1"):
        apply(trainers.sdpo(tmp_path), hard_weight=1)


def test_rollouts_keep_their_logits(tmp_path):
    trainer = trainers.sdft(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = trainer._forward_logits(trainer.model, ids, torch.ones_like(ids), 2)
    apply(trainer)
    assert torch.equal(trainer._forward_logits(trainer.model, ids, torch.ones_like(ids), 2), plain)
