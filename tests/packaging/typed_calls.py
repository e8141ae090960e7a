"""Calls of the public API with the types that a type checker must find. mypy reads this file; nothing runs it."""

import torch
from torch import Tensor
from typing_extensions import assert_type

from hkdfast import (
    DistillLoss,
    Edge,
    Head,
    SeedConfig,
    SeedTrainer,
    backends,
    contrast,
    coupled_loss,
    diffuse,
    distill_loss,
    purify,
    pyramid,
    seed,
    ternary,
)
from hkdfast.heads import Purified


def losses(student: Head, teacher: Tensor, labels: Tensor) -> None:
    loss = distill_loss(student, teacher, "reverse_kl", labels=labels, hard_weight=0.5, temperature=2)
    loss.backward()
    assert_type(loss, Tensor)
    loss, metrics = distill_loss(student, purify(teacher, [teacher]), return_metrics=True, reduction="none")
    assert_type(metrics, dict[str, Tensor])
    assert_type(metrics["divergence"], Tensor)
    assert_type(coupled_loss([student, teacher], [[None, Edge(0.5)], [1.0, None]], hard_weight=[1.0, 0.0]), Tensor)
    loss, by_edge = coupled_loss([student], [[None]], labels=labels, hard_weight=1.0, return_metrics=True)
    assert_type(by_edge[0, 0]["cross_entropy"], Tensor)
    assert_type(DistillLoss("skew_kl", beta=0.1), DistillLoss)
    distill_loss(student, teacher, temprature=2.0)  # type: ignore[call-overload]
    distill_loss(student, teacher, temperature="2")  # type: ignore[call-overload]
    distill_loss(student, teacher, return_metrics=True).backward()  # type: ignore[attr-defined]


def decoding(clean: Tensor, noisy: Tensor) -> None:
    assert_type(purify(clean, noisy, torch.ones(3)), Purified)
    assert_type(contrast(purify(clean, noisy, schedule="linear"), temperature=0.5), Tensor)
    assert_type(diffuse(clean, sigma=0.1), Tensor)
    assert_type(backends(), dict[str, str])


def systems(batch: dict[str, Tensor]) -> None:
    def model(batch: dict[str, Tensor]) -> Tensor:
        return batch["input_ids"]

    clean, confidence = seed.identify(model, batch, confidence="entropy")
    noisy = seed.isolate(model, batch, draws=2)
    loss, metrics = seed.distill(model, batch, seed.purify(clean, noisy), temperature=2.0, hard_weight=0.1)
    assert_type(metrics["agreement"], Tensor)
    loss, _ = pyramid.loss((model, model), batch, "mutual", divergence_weight=(1.0, 0.5), tile_memory=2**20)
    loss, _ = ternary.loss((model, model, model), batch, hard_weight=0.5, num_items=7)
    loss.backward()
    pyramid.loss((model, model), batch, return_metrics=True)  # type: ignore[call-arg]


def trainers(model: torch.nn.Module) -> None:
    trainer = SeedTrainer(model, SeedConfig("out", alpha=[1.5], rounds=2, max_steps=4), train_dataset=[])
    assert_type(trainer.args, SeedConfig)
