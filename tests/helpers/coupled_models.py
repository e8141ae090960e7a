"""Tiny chains of models, batches and trainers for the tests of coupled training."""

import torch
import transformers as hf
import zoo
from eager import coupled
from test_seed_trainer import Gradients
from zoo import Rows

from hkdfast.batch import answer_rows
from hkdfast.hf import (
    PyramidConfig,
    PyramidTrainer,
    TernaryConfig,
    TernaryTrainer,
)
from hkdfast.hf.coupled import CoupledTrainer

STACK = hf.default_data_collator  # of examples that are tensors
SIZES = ((48, 61), (32, 64), (16, 62))  # hidden size and padded vocabulary of a chain
QUIET = dict(use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, learning_rate=1e-3)
STEPS = dict(max_steps=3, save_strategy="steps", save_steps=1, per_device_train_batch_size=2,
             gradient_accumulation_steps=2, keep_checkpoints=True)  # fmt: skip


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


LORA = dict(lora_r=4, lora_alpha=8, lora_dropout=0.2, learning_rate=1e-2)


def trained(folder, found, models=None, **options):
    trainer = stage(folder, models or chain(2), found, **options)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.steps
