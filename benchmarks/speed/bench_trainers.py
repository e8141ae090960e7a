"""A whole training step of a trainer, with hkdfast.hf.apply and without: forward, loss, backward, clipping, AdamW.

Generation is left out: both take the same completions. Models have two layers and tied embeddings, in float32. Both are
timed by turns in one process; on a CPU that is the process's own time, which other work on the machine does not add to:
OMP_NUM_THREADS=1 makes it the time of the step. The peak memory of each is of a step in a process of its own, above the
models and the optimizer's state.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import trainers
from shapes import DEVICE, TRAINERS
from transformers import Trainer, TrainingArguments

from hkdfast import Head, distill_loss
from hkdfast.cli import demo
from hkdfast.hf import LanguageHead, apply
from hkdfast.hf.head import hidden_states
from hkdfast.hf.patches.loss import completion_rows, generalized_jsd

# {trainer: the beta or alpha of its config that is measured}; their own defaults, and one more
KINDS = {
    "DistillationTrainer, beta 1": ("distillation", 1.0),
    "DistillationTrainer, beta 0.5": ("distillation", 0.5),
    "GKDTrainer, beta 0.5": ("gkd", 0.5),
    "GOLDTrainer, beta 0.5": ("gold", 0.5),
    "SDFTTrainer, alpha 0.5": ("sdft", 0.5),
    "SDPOTrainer, alpha 1": ("sdpo", 1.0),
    "transformers.Trainer, forward KL": ("trainer", 0.0),
}
SELF = ("sdft", "sdpo")
CLOCK = time.process_time if DEVICE == "cpu" else time.perf_counter


def model(seed, width, vocab):
    layers = dict(intermediate_size=width * 11 // 4, num_attention_heads=width // 32, num_key_value_heads=width // 32)
    return trainers.language_model(seed, width, vocab, **layers, max_position_embeddings=2048, tie_word_embeddings=True)


def make(kind, beta, size, folder, patched):
    """A trainer with an optimizer."""
    vocab, student, teacher, *_ = size
    general = dict(gradient_accumulation_steps=1, learning_rate=1e-6, use_cpu=DEVICE == "cpu", adam_epsilon=1e-8)
    folder = Path(folder)
    if kind in SELF:
        found = getattr(trainers, kind)(folder, model(0, student, vocab), distillation_alpha=beta, **general)
    elif kind == "trainer":
        args = TrainingArguments(**trainers.options(folder, **general))
        found = (Trainer if patched else trainers.Eager)(model(0, student, vocab), args)
        found.teacher = model(1, teacher, vocab).to(DEVICE)
    else:
        models = model(0, student, vocab), model(1, teacher, vocab)
        found = getattr(trainers, kind)(folder, *models, beta=beta, **general)
    if patched:
        apply(found, **({"teacher": found.teacher} if kind == "trainer" else {}))
    found._prepare_inputs = dict  # no generation, and nothing that is kept of one
    found.current_gradient_accumulation_steps = 1
    found.create_optimizer()
    return found


def inputs(kind, size):
    """What the trainers' own preparation of a batch would return, and its number of answer tokens."""
    vocab, _, _, count, prompt, answer = size
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocab, (count, prompt), generator=draw)
    answers = torch.randint(3, vocab, (count, answer), generator=draw)
    ids, mask, items = torch.cat([prompts, answers], 1), torch.ones(count, prompt + answer).long(), count * answer
    if kind in ("gkd", "gold", "trainer"):
        labels = ids.clone()
        labels[:, :prompt] = -100
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    else:
        found = {
            "prompt_ids": prompts,
            "prompt_mask": mask[:, :prompt],
            "completion_ids": answers,
            "completion_mask": mask[:, prompt:],
            "num_items_in_batch": torch.tensor(float(items)),
        }
    if kind in SELF:  # a prompt with more in it
        found["teacher_input_ids"] = torch.cat([prompts.roll(1, 0), ids], 1)
        found["teacher_attention_mask"] = torch.ones_like(found["teacher_input_ids"])
        found.pop("num_items_in_batch")
    return {name: x.to(DEVICE) for name, x in found.items()}, items


def step(trainer, batch, items):
    """One of training, whose loss is returned."""
    loss = trainer.training_step(trainer.model, dict(batch), torch.tensor(items, device=DEVICE))
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return loss.item()


def truth(kind, beta, trainer, batch, size):
    """The loss in float64, of models in float64."""
    teacher = trainer.teacher if kind == "trainer" else trainer.teacher_model
    sides = [({"input_ids": batch["input_ids"]} if "input_ids" in batch else None, trainer.model)]
    if sides[0][0] is None:
        sides[0] = ({"input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)}, trainer.model)
    sides.append(({"input_ids": batch.get("teacher_input_ids", sides[0][0]["input_ids"])}, teacher))
    heads = []
    for one, network in sides:
        exact = type(network)(network.config).to(DEVICE).double().eval()
        exact.load_state_dict(network.state_dict())
        rows = completion_rows(one["input_ids"].shape[1], torch.ones(size[3], size[5], device=DEVICE))
        with torch.no_grad():
            hidden = hidden_states(exact, head := LanguageHead(exact), one, rows)
        heads.append(Head(hidden, head.module.weight.detach()))
    temperature = trainer.temperature if kind not in ("gkd", "trainer") else 1.0
    return distill_loss(*heads, temperature=temperature, backend="reference", **generalized_jsd(beta)).item()


MEMORY = "import bench_trainers, sys; bench_trainers.print_peak(*sys.argv[1:])"


def print_peak(what, shape, patched):
    """For a process of its own: the bytes that a step takes at its peak, above what is there before."""
    kind, beta = KINDS[what]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(kind, beta, TRAINERS[shape], folder, patched == "True")
        batch, items = inputs(kind, TRAINERS[shape])
        step(trainer, batch, items)
        device = torch.device(DEVICE)
        before = demo.peak(device, reset=True)
        step(trainer, batch, items)
        print(json.dumps(None if before is None else demo.peak(device) - before))


def peak(what, shape, patched):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", MEMORY, what, shape, str(patched)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("shape", TRAINERS)
@pytest.mark.parametrize("kind", KINDS)
def bench_trainer(benchmark, interleaved, kind, shape, tmp_path):
    what, (kind, beta), size = kind, KINDS[kind], TRAINERS[shape]
    memory = {patched: peak(what, shape, patched) for patched in (True, False)}
    batch, items = inputs(kind, size)
    sides = {patched: make(kind, beta, size, tmp_path, patched) for patched in (True, False)}
    exact = truth(kind, beta, sides[True], batch, size)
    errors = {patched: abs(step(trainer, batch, items) / exact - 1) for patched, trainer in sides.items()}
    other = interleaved(
        lambda: step(sides[True], batch, items),
        lambda: step(sides[False], batch, items),
        CLOCK,
        who="hkdfast",
        what=f"step of {what}",
        shape=shape,
    )
    benchmark.extra_info |= {
        "float64 loss": exact,
        "loss error": errors[True],
        "peak memory": memory[True],
        "unpatched": {
            "median": statistics.median(other),
            "min": min(other),
            "max": max(other),
            "loss error": errors[False],
            "peak memory": memory[False],
        },
    }
