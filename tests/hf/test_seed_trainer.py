"""SeedTrainer on tiny models of the LLaVA and InternVL families and others: the loss it computes, and what it costs."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import HfArgumentParser, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from zoo import Rows, config, one_thread  # noqa: F401

from hkdfast.batch import answer_rows, derive_seed, noised
from hkdfast.hf import (
    LanguageHead,
    SeedConfig,
    SeedTrainer,
    as_teacher,
    head_fn,
    hidden_states,
    language_linear_names,
    seed_lora_config,
)
from hkdfast.hf.frozen import settle
from hkdfast.seed import identify


def make_trainer(folder, model, batch, kind=SeedTrainer, peft_config=None, **options):
    made = kind(model, config(folder, **options), train_dataset=Rows(batch), peft_config=peft_config)
    made.remove_callback(PrinterCallback)
    return made


def noisy_adapter(model, **options):
    """An adapter that does something, so that student and teacher differ from the first step on."""
    return seed_lora_config(model, r=4, alpha=8).__class__(
        **{"r": 4, "lora_alpha": 8, "init_lora_weights": False}
        | {"target_modules": seed_lora_config(model).target_modules}
        | options
    )


def one_loss(trainer, batch, **others):
    """Loss and gradients of one batch, as a training step computes them."""
    trainer.model.train()
    trainer.places["train"] = None
    torch.manual_seed(0)  # of a student's own dropout: the teacher draws nothing
    loss = trainer.compute_loss(trainer.model, batch, **others)
    trainer.model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def written_out(trainer, batch, num_items=None):
    """The same loss and gradients from full logits in plain PyTorch: the definition."""
    model, args = trainer.model, trainer.args
    rows, labels = answer_rows(batch)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    seed = derive_seed(args.seed, "train", 1, 0)
    with as_teacher(model):
        clean = model(**inputs).logits[rows].double()
        draws = [
            noised(inputs, args.noise_step, sigma=args.noise_sigma, seed=seed, draw=i) for i in range(args.noise_draws)
        ]
        noisy = torch.stack([model(**draw).logits[rows].double() for draw in draws]).mean(0)
    log_clean = clean.log_softmax(-1)
    inside = log_clean >= log_clean.amax(-1, keepdim=True) + math.log(args.plausibility)
    kept = log_clean.masked_fill(~inside, -math.inf).logsumexp(-1, keepdim=True)
    odds = ((1 + args.alpha[0]) * clean - args.alpha[0] * noisy).masked_fill(~inside, -math.inf).log_softmax(-1)
    log_p = torch.where(inside, odds + kept, log_clean)
    settle(model)  # a frozen part has no dropout of its own
    torch.manual_seed(0)
    log_q = model(**inputs).logits[rows].double().log_softmax(-1)
    loss = (log_q.exp() * (log_q - log_p)).sum(-1)
    if labels is not None:
        loss = loss - args.hard_weight * log_q.gather(-1, labels[:, None])[:, 0]
    loss = loss.sum() / (num_items or len(loss))
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(ours, truth, rtol=1e-4):
    assert math.isclose(ours[0].item(), truth[0].item(), rel_tol=rtol)
    scale = max(grad.abs().max().item() for grad in truth[1].values())
    assert ours[1].keys() == truth[1].keys() and scale > 1e-4
    for name, grad in truth[1].items():
        assert (ours[1][name] - grad).abs().max() <= rtol * scale, name


# the head


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_head_gives_the_logits_of_the_model(name):
    model, batch = zoo.build(name), zoo.batch(name)
    source = head_fn(model)(batch)
    logits = source.scale * (source.hidden @ source.weight.T)
    logits = logits if source.softcap is None else source.softcap * torch.tanh(logits / source.softcap)
    assert torch.allclose(logits, model(**batch).logits[:, -1], atol=1e-5)
    assert source.softcap == (5.0 if name == "paligemma_softcap" else None)


def test_a_scale_that_the_configuration_does_not_tell_is_measured():
    model, batch = zoo.build("llava_ignored_scale"), zoo.batch()
    forward = model.forward

    def scaled(**inputs):
        output = forward(**inputs)
        output.logits = 3 * output.logits
        return output

    model.forward = scaled
    head = LanguageHead(model)
    head.verify(model, batch)
    assert (head.scale, head.softcap) == (3, None)


def test_a_head_that_computes_something_else_is_refused():
    model, batch = zoo.build("llava"), zoo.batch()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) ** 3
    with pytest.raises(ValueError, match="does not compute hidden @ weight.T"):
        LanguageHead(model).verify(model, batch)
    assert "forward" in vars(model.lm_head)  # the model's own patch is back in its place


def test_a_model_without_a_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LlavaModel has no language-model head.*AutoModelForImageTextToText"):
        SeedTrainer(zoo.build("llava").model, config(tmp_path))


def test_hidden_states_that_do_not_fit_the_ids_are_refused():
    model, batch = zoo.build("llava"), zoo.batch()
    rows = torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="expand each image"):
        hidden_states(model, LanguageHead(model), batch, rows)
    assert "forward" not in vars(model.lm_head)


# the adapter


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_adapter_is_on_the_language_model_alone(name):
    model = zoo.build(name)
    names = language_linear_names(model)
    assert len(names) == 14 and not any("vision" in name or "lm_head" in name or "projector" in name for name in names)
    wrapped = peft.get_peft_model(model, seed_lora_config(model, targets=["q_proj", "down_proj"]))
    adapted = [
        name
        for name, module in wrapped.named_modules()
        if name.endswith(("q_proj", "down_proj")) and hasattr(module, "lora_A")
    ]
    assert len(adapted) == 4 and all("language_model" in name for name in adapted)


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="fc1.*down_proj, gate_proj"):
        seed_lora_config(zoo.build("llava"), targets=["fc1"])


@pytest.mark.parametrize(
    "options, rounds, message",
    [
        (dict(init_lora_weights="pissa"), 1, "changes the frozen weights"),
        (dict(use_dora=True), 2, "is DoRA"),
        (dict(bias="lora_only"), 1, "the frozen teacher computes with it too"),
        (dict(lora_bias=True), 2, "trains biases"),
    ],
    ids=["pissa", "dora", "bias", "lora_bias"],
)
def test_adapters_that_would_teach_wrongly_are_refused(tmp_path, options, rounds, message):
    adapter = peft.LoraConfig(target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=message):
        SeedTrainer(zoo.build("llava"), config(tmp_path, rounds=rounds), peft_config=adapter)


def test_a_frozen_adapter_is_refused(tmp_path):
    model = peft.get_peft_model(zoo.build("llava"), peft.LoraConfig(target_modules=["q_proj"]))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable"):
        SeedTrainer(model, config(tmp_path))


def test_the_teacher_is_the_frozen_model_and_every_mode_comes_back():
    model = zoo.build("llava")
    batch, bare = zoo.batch(), copy.deepcopy(model)
    model = peft.get_peft_model(model, noisy_adapter(model, lora_dropout=0.5)).train()
    model.base_model.model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    with as_teacher(model):
        assert torch.equal(model(**batch).logits, bare(**batch).logits)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    assert not torch.equal(model(**batch).logits, model(**batch).logits)  # the student's dropout acts


# the loss


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("labeled", [False, True], ids=["prompts", "labels"])
def test_the_loss_is_the_definition(tmp_path, name, labeled):
    model, batch = zoo.build(name), zoo.batch(name, answers=2 if labeled else None)
    options = dict(noise_draws=2, hard_weight=0.5 if labeled else 0.0)
    trainer = make_trainer(tmp_path, model, batch, peft_config=noisy_adapter(model), **options)
    assert_same(one_loss(trainer, batch), written_out(trainer, batch))
    assert_same(
        one_loss(trainer, batch, num_items_in_batch=torch.tensor(32)), written_out(trainer, batch, num_items=32)
    )


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_changes_nothing_but_rounding(tmp_path, pad):
    """Each prompt of a padded batch has the confidence it has alone."""
    model = zoo.build("llava")
    batch = zoo.batch(pad=pad)
    run = head_fn(model)
    _, sure = identify(run, batch)
    for i in range(4):
        alone = {name: x[i : i + 1] for name, x in batch.items()}
        keep = alone["attention_mask"][0].bool()
        alone = {name: x[:, keep] if x.dim() == 2 else x for name, x in alone.items()}
        assert torch.allclose(identify(run, alone)[1], sure[i : i + 1], atol=1e-5)


def test_shifted_labels_are_taken_as_they_are(tmp_path):
    model, batch = zoo.build("llava"), zoo.batch(answers=2)
    trainer = make_trainer(tmp_path, model, batch, peft_config=noisy_adapter(model))
    shifted = {name: x for name, x in batch.items() if name != "labels"}
    shifted["shift_labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert_same(one_loss(trainer, shifted), one_loss(trainer, batch), rtol=1e-7)


def test_a_packed_batch_is_its_sequences(tmp_path):
    model, batch = zoo.build("llava"), zoo.batch(size=2, answers=2)
    trainer = make_trainer(tmp_path, model, batch, peft_config=noisy_adapter(model), alpha=0.0)
    length = batch["input_ids"].shape[1]
    labels = batch["labels"].clone()
    labels[:, 0] = -100
    packed = {
        "input_ids": batch["input_ids"].reshape(1, -1),
        "labels": labels.reshape(1, -1),
        "position_ids": torch.arange(length).repeat(2)[None],
        "pixel_values": batch["pixel_values"],
    }
    assert_same(one_loss(trainer, packed), one_loss(trainer, batch), rtol=1e-3)


@pytest.mark.parametrize("where", ["targets", "saved"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_an_adapted_head_gets_its_gradients(tmp_path, where, rounds):
    model = zoo.build("llava")
    extra = dict(target_modules=["q_proj", "lm_head"]) if where == "targets" else dict(modules_to_save=["lm_head"])
    batch = zoo.batch(answers=2)
    trainer = make_trainer(tmp_path, model, batch, peft_config=noisy_adapter(model, **extra), rounds=rounds)
    if where == "saved":
        with torch.no_grad():
            trainer.model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.1)
    ours, truth = one_loss(trainer, batch), written_out(trainer, batch)
    assert any("lm_head" in name for name in ours[1])
    assert_same(ours, truth)


def test_dropout_before_an_adapted_head_acts_as_in_the_layer():
    model = zoo.build("llava")
    model = peft.get_peft_model(model, noisy_adapter(model, target_modules=["lm_head"], lora_dropout=0.5)).train()
    batch, run = zoo.batch(), head_fn(model)
    run(batch)
    torch.manual_seed(5)
    source = run(batch)
    torch.manual_seed(5)
    # the layer itself, on the same hidden states: its dropout draws for those rows alone
    layer, hidden = model.get_output_embeddings(), source.hidden[:, : zoo.WIDTH]
    assert torch.allclose(source.hidden @ source.weight.T, layer(hidden), atol=1e-5)


def test_autocast_runs_the_head_in_its_dtype(tmp_path):
    """As exact as full logits under the same autocast, and better than they, for they are rounded to bfloat16."""
    model, batch = zoo.build("llava"), zoo.batch(answers=2)
    trainer = make_trainer(tmp_path, model, batch, peft_config=noisy_adapter(model))
    exact = written_out(trainer, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = written_out(trainer, batch)
        ours = one_loss(trainer, batch)

    def error(found):
        return sum((found[1][name] - grad).square().sum() for name, grad in exact[1].items()).sqrt()

    assert ours[0].dtype == torch.float32
    assert abs(ours[0] - exact[0]) <= 2 * abs(rounded[0] - exact[0]) + 1e-2 * exact[0]
    assert 0 < error(ours) <= 1.5 * error(rounded)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(tmp_path, reentrant):
    found = []
    for kwargs in (
        {},
        dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant}),
    ):
        model, batch = zoo.build("llava"), zoo.batch(answers=2)
        trainer = make_trainer(tmp_path, model, batch, peft_config=noisy_adapter(model), **kwargs)
        if kwargs:
            trainer.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        found.append(one_loss(trainer, batch))
    assert_same(found[1], found[0], rtol=1e-5)


def test_a_batch_without_answers_is_a_differentiable_zero(tmp_path):
    model, batch = zoo.build("llava"), zoo.batch(answers=2)
    batch["labels"][:] = -100
    trainer = make_trainer(tmp_path, model, batch, peft_config=noisy_adapter(model))
    loss, grads = one_loss(trainer, batch)
    assert loss == 0 and all(grad.eq(0).all() for grad in grads.values())


class Widest(TorchDispatchMode):
    """Remembers the largest tensor made whose last dimension is the vocabulary."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.numbers = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == self.vocab:
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("backend", [None, "reference"])
def test_logits_exist_as_tiles_only(tmp_path, backend):
    """32 answers a sequence, 16 sequences, 8192 words: full logits would be 512 x 8192. No tensor of that vocabulary
    is larger than a block of tiles, in student, clean or noisy branch, forward or backward."""
    vocab, rows = 8192, 40
    torch.manual_seed(0)
    model = zoo.llava(zoo.llama(vocab=vocab))
    batch = zoo.batch(size=16, extra=40, answers=32)
    memory = 3 * rows * vocab * 4 + 4096  # three tiles of so many rows
    trainer = make_trainer(tmp_path, model, batch, tile_memory=memory, backend=backend)
    trainer.model.train()
    trainer.head.verify(trainer.model, batch)
    with Widest(vocab) as seen:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    assert vocab <= seen.numbers <= rows * vocab
    with Widest(vocab) as seen:
        model(**{name: x for name, x in batch.items() if name != "labels"})
    assert seen.numbers >= 512 * vocab  # the detector does see logits


def test_ignored_rows_do_not_reach_the_head(tmp_path):
    model, batch = zoo.build("llava"), zoo.batch(answers=2)
    trainer = make_trainer(tmp_path, model, batch)
    trainer.head.verify(trainer.model, batch)
    seen = []
    original = trainer.head.source
    trainer.head.source = lambda hidden, **how: seen.append(hidden.shape) or original(hidden, **how)
    one_loss(trainer, batch)
    assert seen == [(8, zoo.WIDTH)] * 3


# the trainer


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def train(folder, batch, name="llava", adapter=None, **options):
    model = zoo.build(name)
    trainer = make_trainer(folder, model, batch, peft_config=adapter and adapter(model), **options)
    found = Gradients()
    trainer.add_callback(found)
    trainer.train()
    return trainer, found.steps


@pytest.mark.slow
@pytest.mark.parametrize("labeled", [False, True], ids=["prompts", "labels"])
def test_accumulated_batches_are_the_large_batch(tmp_path, labeled):
    batch = zoo.batch(size=8, answers=3 if labeled else None)
    if labeled:  # another number of answers in every micro-batch
        batch["labels"][0] = -100
        batch["labels"][3, -3:-1] = -100
    sizes = ((8, 1), (2, 4), (3, 3))
    runs = [
        train(
            tmp_path, batch, adapter=noisy_adapter, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        for size, steps in sizes[: 2 if labeled else 3]
    ]
    whole = runs[0][1][0]
    scale = max(grad.abs().max() for grad in whole.values())
    for trainer, steps in runs[1:]:
        for name, grad in steps[0].items():
            assert (grad - whole[name]).abs().max() <= 1e-5 * scale, name
        logged, expected = (t.state.log_history[0] for t in (trainer, runs[0][0]))
        for key in ("loss", "divergence", "confidence", "agreement"):
            assert math.isclose(logged[key], expected[key], rel_tol=1e-5), key


@pytest.mark.slow
def test_metrics_reach_the_log_without_a_further_forward(tmp_path):
    batch = zoo.batch(size=4)
    model = zoo.build("llava")
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    trainer = make_trainer(tmp_path, model, batch, per_device_train_batch_size=4, max_steps=2, alpha=1.5)
    trainer.train()
    assert len(calls) == 1 + 2 * 3  # one probe of the head, then student, clean and noisy
    first = trainer.state.log_history[0]
    assert first["contrast_weight"] == 1.5 and 0 < first["confidence"] < 1 and 0 <= first["agreement"] <= 1
    assert math.isclose(first["divergence"], first["loss"], rel_tol=1e-5)
    assert "cross_entropy" not in first
    # before the first step the student is the teacher: its confidence is what identify says
    _, sure = identify(head_fn(zoo.build("llava")), batch)
    assert math.isclose(first["confidence"], sure.mean().item(), rel_tol=1e-5)


def test_yes_rate(tmp_path):
    processor = zoo.processor()
    yes, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    model, batch = zoo.build("llava"), zoo.batch(size=8, answers=2)
    batch["labels"][:, -2] = torch.tensor([yes, no] * 4)  # the tokens after it are no answer to yes or no
    batch["labels"][:, -1] = 2
    trainer = SeedTrainer(
        model,
        config(tmp_path, yes_rate=True, per_device_train_batch_size=8),
        train_dataset=Rows(batch),
        processing_class=processor,
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )
    said = zoo.build("llava")(**{name: x for name, x in batch.items() if name != "labels"}).logits[:, -3]
    trainer.train()
    assert trainer.state.log_history[0]["yes_rate"] == (said[:, yes] > said[:, no]).float().mean().item()


def test_yes_rate_needs_a_processor(tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        SeedTrainer(zoo.build("llava"), config(tmp_path, yes_rate=True))


def test_evaluation_has_its_own_noise_and_metrics(tmp_path):
    batch = zoo.batch(size=4)
    trainer = make_trainer(tmp_path, zoo.build("llava"), batch)
    first, second = (trainer.evaluate(Rows(batch)) for _ in range(2))
    assert first["eval_loss"] == second["eval_loss"] > 0
    logged = trainer.state.log_history[-1]
    assert math.isclose(logged["eval_divergence"], first["eval_loss"], rel_tol=1e-5)
    assert not any(p.grad is not None for p in trainer.model.parameters())


def test_the_loss_of_an_evaluation_is_a_mean_over_answers_however_they_are_batched(tmp_path):
    batch = zoo.batch(size=5, answers=2)
    batch["labels"][4, -1] = -100  # the last batch of one has one answer, the others have four
    found = []
    for size in (2, 5):
        evaluated = make_trainer(tmp_path, zoo.build("llava"), batch, per_device_eval_batch_size=size)
        metrics = evaluated.evaluate(Rows(batch))
        found.append((metrics["eval_loss"], metrics["eval_divergence"]))
    for loss, divergence in found:
        assert math.isclose(loss, divergence, rel_tol=1e-5)


def test_an_evaluation_by_any_name_is_one_and_leaves_nothing_behind(tmp_path):
    batch, few = zoo.batch(size=5, answers=2), zoo.batch(size=3, seed=2)
    trainer = make_trainer(tmp_path, zoo.build("llava"), batch, per_device_eval_batch_size=2)
    alone = [trainer.evaluate(Rows(one)) for one in (batch, few)]
    both = trainer.evaluate({"x": Rows(batch), "y": Rows(few)})
    for name, metrics in zip("xy", alone, strict=True):
        for kind in ("loss", "divergence", "student_entropy"):
            assert both[f"eval_{name}_{kind}"] == metrics[f"eval_{kind}"]
    assert trainer.evaluate(Rows(few), metric_key_prefix="late")["late_divergence"] == alone[1]["eval_divergence"]
    assert trainer.predict(Rows(few)).metrics["test_divergence"] == alone[1]["eval_divergence"]
    assert trainer.evaluate(Rows(batch))["eval_loss"] == alone[0]["eval_loss"] and not trainer.sums["eval"]


def test_the_noise_of_an_evaluation_does_not_depend_on_its_batches(tmp_path):
    batch, found = zoo.batch(size=6), []
    for size in (2, 4, 6):  # 4 leaves a last batch that is smaller
        trainer = make_trainer(
            tmp_path, zoo.build("llava"), batch, per_device_eval_batch_size=size, per_device_train_batch_size=2
        )
        found.append(trainer.evaluate(Rows(batch))["eval_loss"])
    assert max(found) - min(found) < 1e-5 * found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [("llava", dict()), ("internvl", dict(alpha_schedule="linear", alpha=2.0, divergence="jensen_shannon"))],
)
def test_training_approaches_the_purified_teacher(tmp_path, name, options):
    batch = zoo.batch(name, size=8)
    more = dict(max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, noise_draws=16)
    trainer = make_trainer(tmp_path, zoo.build(name), batch, **more, **options)
    before = trainer.evaluate(Rows(batch))["eval_loss"]
    trainer.train()
    after = trainer.evaluate(Rows(batch))["eval_loss"]
    assert after < 0.7 * before


@pytest.mark.slow
def test_a_training_of_labels_and_difference_tiles(tmp_path):
    batch = zoo.batch(size=4, answers=2)
    runs = [
        train(tmp_path, batch, per_device_train_batch_size=4, precision=tiles)[0] for tiles in ("float32", "difference")
    ]
    plain, fast = (trainer.state.log_history[0] for trainer in runs)
    assert math.isclose(plain["loss"], fast["loss"], rel_tol=0.02)
    assert plain["cross_entropy"] > 0


# the options


def test_every_option_explains_itself_and_parses():
    (parsed,) = HfArgumentParser(SeedConfig).parse_args_into_dataclasses(
        ["--output_dir", "x", "--alpha", "2", "1", "--noise_sigma", "1.2", "--rounds", "2", "--lora_targets", "q_proj"]
    )
    assert parsed.alpha == [2.0, 1.0] and parsed.noise_sigma == 1.2 and parsed.lora_targets == ["q_proj"]
    assert [parsed.alpha_of(number) for number in (1, 2, 3)] == [2.0, 1.0, 1.0]
    for name in SeedConfig.__annotations__:
        assert SeedConfig.__dataclass_fields__[name].metadata["help"].endswith(".")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(divergence="kl"), "unknown divergence 'kl', expected one of forward_kl"),
        (dict(alpha_schedule="quadratic"), "constant, linear, gate"),
        (dict(alpha=[1.0, -1.0]), "alpha"),
        (dict(alpha=[]), "one number per round"),
        (dict(noise_step=1000), "0 to 999"),
        (dict(noise_sigma=-1.0), "sigma"),
        (dict(noise_draws=0), "noise_draws"),
        (dict(rounds=0), "rounds"),
        (dict(temperature=0.0), "temperature"),
        (dict(divergence="jensen_shannon", beta=1.0), "0 < beta < 1"),
        (dict(plausibility=0.1, outside="drop"), "teacher_floor"),
        (dict(backend="cudnn"), "unknown backend"),
    ],
)
def test_wrong_options_are_told_before_any_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SeedConfig(str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_batch_without_images_is_refused(tmp_path):
    batch = zoo.batch()
    del batch["pixel_values"]
    batch["input_ids"][batch["input_ids"] == zoo.IMAGE] = 9
    with pytest.raises(ValueError, match="no images"):
        make_trainer(tmp_path, zoo.build("llava"), batch).train()


@pytest.mark.slow
def test_missing_libraries_are_named():
    code = "import sys; sys.modules['peft'] = None\nimport hkdfast\nimport hkdfast.hf"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode and 'pip install "hkdfast[hf]"' in run.stderr
