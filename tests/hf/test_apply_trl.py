"""hkdfast.hf.apply to trl's DistillationTrainer, GKDTrainer and GOLDTrainer: the same training, without logits."""

import peft
import pytest
import torch
import trainers
import transformers as hf
from test_seed_trainer import Widest
from zoo import one_thread  # noqa: F401

import hkdfast.hf
from hkdfast.hf import apply

pytest.importorskip("trl")
BETAS = (0.0, 0.3, 1.0)
DIVERGENCES = {
    "forward_kl": lambda p, q: (p.exp() * (p - q)).sum(-1),
    "reverse_kl": lambda p, q: (q.exp() * (q - p)).sum(-1),
    "total_variation": lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["distillation", "gkd", "gold"])
def test_a_patched_trainer_trains_as_before(name, beta, tmp_path):
    make = getattr(trainers, name)
    options = dict(beta=beta, **({} if name == "gkd" else {"temperature": 0.7}))
    plain = trainers.trained(make(tmp_path, **options))
    patched = make(tmp_path, **options)
    apply(patched)
    names = ("loss", "entropy") if name == "distillation" else ("loss",)
    trainers.assert_same(trainers.trained(patched), plain, names)
    assert plain[0][0]["loss"] > 1e-2


@pytest.mark.parametrize("name", ["gkd", "gold"])
def test_answers_of_the_student_itself(name, tmp_path):
    make = getattr(trainers, name)
    plain = trainers.trained(make(tmp_path, lmbda=1.0))
    patched = make(tmp_path, lmbda=1.0)
    apply(patched)
    trainers.assert_same(trainers.trained(patched), plain)


def test_no_logits_are_made(tmp_path):
    """No tensor over the vocabulary is larger than a tile of a few rows, but for the weight itself."""
    vocab = 997
    models = [trainers.language_model(seed, 16, vocab) for seed in (0, 1)]
    trainer = trainers.gkd(tmp_path, *models, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    with Widest(vocab) as plain:
        trainer.compute_loss(trainer.model, batch).backward()
    apply(trainer, tile_memory=3 * 4 * vocab * 4)
    trainer.compute_loss(trainer.model, batch)  # verifies
    with Widest(vocab) as ours:
        trainer.compute_loss(trainer.model, batch).backward()
    assert plain.numbers >= batch["input_ids"].numel() * vocab
    assert 0 < ours.numbers <= models[0].lm_head.weight.numel() < plain.numbers / 3


@pytest.mark.parametrize("name", ["distillation", "gkd", "gold"])
def test_evaluation(name, tmp_path):
    trainer = getattr(trainers, name)(tmp_path, per_device_eval_batch_size=3)
    data = trainer.train_dataset
    torch.manual_seed(0)
    before = trainer.evaluate(data)["eval_loss"]
    with apply(trainer):
        torch.manual_seed(0)
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(before, rel=1e-6)


def test_outputs_have_logits_where_they_are_asked_for(tmp_path):
    trainer = trainers.gkd(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    apply(trainer)
    again, others = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(others.logits, outputs.logits)
    torch.testing.assert_close(again, loss)


def eager(trainer, inputs, divergence, vocab=None, student=None):
    """The loss of a step of DistillationTrainer from the logits that the models themselves make, in float64."""
    from hkdfast.hf.patches.distillation import model_batch

    batch, size = model_batch(inputs), inputs["completion_ids"].shape[1]
    logs = []
    for model in (student or trainer.model, trainer.teacher_model):
        logits = model(**batch).logits[:, -size - 1 : -1, :vocab].double()
        logs.append((logits / trainer.temperature).log_softmax(-1))
    rows = DIVERGENCES[divergence](logs[1].detach(), logs[0])
    return (rows * inputs["completion_mask"]).sum() / inputs["num_items_in_batch"]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_close(model, ours, truth):
    torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=0)
    mine, right = gradients(model, ours), gradients(model, truth)
    assert mine.keys() == right.keys()
    widest = max(grad.abs().max() for grad in right.values())
    for name, grad in right.items():
        assert (mine[name] - grad).abs().max() <= 1e-4 * widest, name
    return mine


def test_a_vision_model_is_compared_as_it_computes_its_logits(tmp_path):
    """TRL reads a scale in the configuration of LLaVA-NeXT's text model, which LLaVA-NeXT does not apply."""
    models = [trainers.llava_next_granite(seed) for seed in (0, 1)]
    trainer = trainers.distillation(tmp_path, *models, beta=1.0)
    inputs = trainers.llava_next_step()
    trainer.model.train()
    truth = eager(trainer, inputs, "reverse_kl")
    theirs = trainer.compute_loss(trainer.model, inputs)
    assert abs(theirs.item() / truth.item() - 1) > 0.1
    apply(trainer)
    assert_close(trainer.model, trainer.compute_loss(trainer.model, inputs), truth)


def text_step(vocab=61):
    inputs = trainers.llava_next_step()
    words = torch.randint(8, vocab, (2, 9), generator=torch.Generator().manual_seed(5))
    inputs |= {"prompt_ids": words[:, :5], "prompt_mask": torch.ones(2, 5, dtype=torch.long)}
    inputs["completion_ids"] = words[:, 5:]
    return {name: x for name, x in inputs.items() if name not in ("pixel_values", "image_sizes")}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_of_ones_own(divergence, tmp_path):
    trainer = trainers.distillation(tmp_path, beta=0.5, temperature=1.3)
    trainer.model.train()
    apply(trainer, divergence)
    inputs = text_step()
    truth = eager(trainer, inputs, divergence)
    assert_close(trainer.model, trainer.compute_loss(trainer.model, inputs), truth)


def test_tokens_of_a_tool_are_left_out(tmp_path):
    trainer = trainers.distillation(tmp_path)
    inputs = text_step() | {"tool_mask": torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]])}
    expected = trainer._compute_loss(trainer.model, inputs, torch.tensor(5.0))
    apply(trainer)
    trainer.compute_loss(trainer.model, inputs)  # verifies
    for mine, other in zip(trainer._compute_loss(trainer.model, inputs, torch.tensor(5.0)), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_a_step_without_tokens(tmp_path):
    trainer = trainers.distillation(tmp_path)
    apply(trainer)
    trainer.model.train()
    inputs = text_step()
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss == 0 and all(not x.grad.any() for x in trainer.model.parameters() if x.grad is not None)


# what TRL's constructors refuse


def lora_on_the_head(model):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_lora_on_the_head(tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        trainers.distillation(tmp_path, lora_on_the_head(trainers.language_model(0)))
    student = lora_on_the_head(trainers.language_model(0))
    trainer = trainers.distillation(tmp_path, student, kind=hkdfast.hf.DistillationTrainer, beta=1.0)
    assert "get_output_embeddings" not in vars(student)
    trainer.model.train()
    inputs = text_step()
    truth = eager(trainer, inputs, "reverse_kl")
    found = assert_close(trainer.model, trainer.compute_loss(trainer.model, inputs), truth)
    assert all(found[f"base_model.model.lm_head.lora_{x}.default.weight"].any() for x in "AB")


def test_the_head_is_shown_whole_again_after_an_error(tmp_path):
    student = lora_on_the_head(trainers.language_model(0))
    with pytest.raises(TypeError, match="processing_class"):
        trainers.distillation(tmp_path, student, kind=hkdfast.hf.DistillationTrainer, processor=3)
    assert "get_output_embeddings" not in vars(student)


@pytest.mark.parametrize("name", ["DistillationTrainer", "GKDTrainer"])
def test_vocabularies_of_two_sizes(name, tmp_path):
    make = {"DistillationTrainer": trainers.distillation, "GKDTrainer": trainers.gkd}[name]
    models = trainers.language_model(0, vocab=61), trainers.language_model(1, 48, vocab=70)
    for kind in (None, getattr(hkdfast.hf, name)):
        with pytest.raises(ValueError, match="61.*70"):
            make(tmp_path, *models, kind=kind)

    def kind(*args, **others):
        return getattr(hkdfast.hf, name)(*args, **others, loss_options={"vocab": "common"})

    trainer = make(tmp_path, *models, kind=kind, beta=1.0)
    assert models[1].config.vocab_size == 70
    trainer.model.train()
    inputs = text_step()
    truth = eager(trainer, inputs, "reverse_kl", 61) if name == "DistillationTrainer" else None
    if truth is not None:
        assert_close(trainer.model, trainer.compute_loss(trainer.model, inputs), truth)
    log, _ = trainers.trained(trainer)
    assert all(entry["loss"] > 0.1 for entry in log)


def test_a_vocabulary_needs_models(tmp_path):
    with pytest.raises(ValueError, match="model must be a model, got 'name'"):
        hkdfast.hf.DistillationTrainer("name", "other", loss_options={"vocab": "common"})


# what apply refuses


class Squared(hf.LlamaForCausalLM):
    def forward(self, *args, **others):
        outputs = super().forward(*args, **others)
        return outputs.__class__(logits=outputs.logits * outputs.logits.abs())


@pytest.mark.parametrize("wrong", ["student", "teacher"])
@pytest.mark.parametrize("name", ["distillation", "gkd", "gold"])
def test_a_head_that_no_probe_explains(name, wrong, tmp_path):
    models = {"student": trainers.language_model(0), "teacher": trainers.language_model(1, 48)}
    odd = Squared(models[wrong].config)
    odd.load_state_dict(models[wrong].state_dict())
    trainer = getattr(trainers, name)(tmp_path, **models | {wrong: odd.eval()})
    apply(trainer)
    with pytest.raises(ValueError, match=r"Squared \(\w+\) changes the logits behind its head"):
        trainer.train()


@pytest.mark.parametrize("name", ["distillation", "gkd", "gold"])
def test_a_teacher_on_another_device(name, tmp_path):
    trainer = getattr(trainers, name)(tmp_path)
    trainer.teacher_model.to("meta")
    with pytest.raises(ValueError, match=r"student is on cpu, that of the teacher on meta: move .*teacher.to\('cpu'\)"):
        apply(trainer)


@pytest.mark.parametrize("name", ["DistillationTrainer", "GKDTrainer"])
def test_our_subclasses_are_patched_already(name, tmp_path):
    make = {"DistillationTrainer": trainers.distillation, "GKDTrainer": trainers.gkd}[name]
    trainer = make(tmp_path, kind=getattr(hkdfast.hf, name))
    with pytest.raises(ValueError, match=f"applied to this {name} already"):
        apply(trainer)


def test_a_version_without_the_method(tmp_path, monkeypatch):
    import trl

    trainer = trainers.distillation(tmp_path)
    monkeypatch.delattr(trl.DistillationTrainer, "_compute_loss")
    with pytest.raises(ValueError, match="DistillationTrainer._compute_loss of trl .* is missing, expected .self"):
        apply(trainer)


def test_cross_entropy_of_the_students_own_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hard_weight 0.5"):
        apply(trainers.distillation(tmp_path), hard_weight=0.5)


def test_labels_of_gkd_can_weigh_too(tmp_path):
    trainer = trainers.gkd(tmp_path, beta=1.0)
    batch = next(iter(trainer.get_train_dataloader()))
    soft = trainer.compute_loss(trainer.model, batch).item()
    outputs = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hard = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    apply(trainer, hard_weight=0.5)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(soft + 0.5 * hard.item(), rel=1e-5)


def test_a_loss_between_tokenizers_is_refused(tmp_path):
    trainer = trainers.gold(tmp_path)
    trainer.use_uld_loss, trainer.teacher_tokenizer = True, trainers.letters()
    with pytest.raises(ValueError, match="use_uld_loss=True"):
        apply(trainer)


def test_gold_keeps_its_function_of_probabilities(tmp_path):
    trainer = trainers.gold(tmp_path)
    function = trainer.generalized_jsd_loss
    apply(trainer)
    assert trainer.generalized_jsd_loss is function


def test_a_method_with_other_arguments_names_the_version_that_was_tried(tmp_path, monkeypatch):
    import trl

    trainer = trainers.distillation(tmp_path)
    monkeypatch.setattr(trl.DistillationTrainer, "_compute_loss", lambda self, student, inputs: None)
    with pytest.raises(
        ValueError, match=r"_compute_loss of trl .* is \(self, student, inputs\), .* tried with trl 1.16.0"
    ):
        apply(trainer)


def test_a_trainer_has_its_teacher(tmp_path):
    with pytest.raises(ValueError, match="teacher is of transformers.Trainer alone"):
        apply(trainers.gkd(tmp_path), teacher=trainers.language_model(3))
