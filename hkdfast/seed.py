"""SEED step by step, as plain functions over a model and a batch: reconstruction of SEED (arXiv:2507.04680).

    clean, confidence = identify(teacher, batch)              how confident is the model in its answers?
    noisy = isolate(teacher, batch)                           what does it answer without a clear image?
    loss, metrics = distill(student, batch, purify(clean, noisy, alpha=1.5))

A batch is a dict of tensors, as a processor returns it. A model is any function of a batch that returns the prediction
at the batch's answer rows, in the order of `answer_rows`: logits (N, V) or a `Head`. `hkdfast.hf.head_fn` makes such a
function from a Hugging Face model. Teacher and student may be one model, with its adapter off and on.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batch import Batch, Model, answer_rows, noised
from .contrastive import WORDS, purify
from .engine.arguments import check_word
from .engine.renamed import CONTRAST, refuses
from .heads import Head, Purified
from .losses import Metrics, distill_loss
from .ops.objective import UNLABELED

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .engine.options import RowKeywords

__all__ = ["answer_rows", "distill", "identify", "isolate", "noised", "purify"]


@refuses(CONTRAST)
def identify(
    model: Model,
    batch: Batch,
    *,
    confidence: str = "max_prob",
    precision: str = "float32",
    tile_memory: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor | Head, Tensor]:
    """Run the model, and measure its confidence in its answers.

    Args:
        model: function of a batch (see the module docstring). Gets no gradient.
        batch: dict of tensors.
        confidence: "max_prob": the largest probability. "entropy": 1 - H / log V. "target": the probability of the
            label; the batch then needs labels.
        precision, tile_memory, backend: as in `distill_loss`.

    Returns:
        the result of the model, and the confidence of each answer row: (N,) float32 between 0 and 1.

    Raises:
        ValueError: on an unknown confidence, or "target" without labels.
    """
    check_word("confidence", confidence, WORDS["confidence"])
    labels = answer_rows(batch)[1]
    # the host waits for the device only if a row may lack a label
    by_label = confidence == "target"
    if by_label and (labels is None or batch.get("distill_only") is not None and (labels == UNLABELED).any()):
        raise ValueError('confidence "target" needs labels in the batch, of every answer row')
    with torch.no_grad():
        clean = model(batch)
        _, metrics = distill_loss(
            clean,
            clean,
            labels=labels,
            return_metrics=True,
            precision=precision,
            tile_memory=tile_memory,
            backend=backend,
        )
    if confidence == "entropy":
        return clean, 1 - metrics["teacher_entropy"] / math.log(max(clean.shape[-1], 2))
    return clean, metrics["confidence"] if confidence == "max_prob" else (-metrics["cross_entropy"]).exp()


def isolate(
    model: Model,
    batch: Batch,
    *,
    step: int = 500,
    sigma: float | None = None,
    draws: int = 1,
    seed: int | None = None,
    first: int = 0,
    placeholders: Mapping[str, int | None] | None = None,
) -> list[Tensor | Head]:
    """Run the model with noise on its images, so that it relies on its language prior.

    Args:
        model: function of a batch (see the module docstring). Gets no gradient.
        batch, step, sigma, seed, first, placeholders: as in `noised`.
        draws: number of noise samples; the model runs once for each.

    Returns:
        list of the model's results, one per draw, for `purify`, which averages them.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    with torch.no_grad():
        return [
            model(noised(batch, step, sigma=sigma, seed=seed, first=first, draw=draw, placeholders=placeholders))
            for draw in range(draws)
        ]


def distill(
    model: Model,
    batch: Batch,
    teacher: Tensor | Head | Purified,
    divergence: str = "reverse_kl",
    *,
    beta: float = 0.5,
    divergence_weight: float = 1.0,
    hard_weight: float = 0.0,
    **options: "Unpack[RowKeywords]",
) -> tuple[Tensor, Metrics]:
    """The student's loss against the purified teacher. The default divergence is mode-seeking.

    Args:
        model: the student, a function of a batch (see the module docstring). Gets the gradient.
        batch: dict of tensors; its labels, if any, are used by hard_weight and by the confidence "target".
        teacher: the result of `purify`, or any teacher of `distill_loss`.
        divergence, beta, divergence_weight, hard_weight, options: as in `distill_loss`.

    Returns:
        the loss and a dict of per-row metrics, as `distill_loss` with return_metrics=True.
    """
    labels = answer_rows(batch)[1]
    return distill_loss(
        model(batch),
        teacher,
        divergence,
        beta=beta,
        divergence_weight=divergence_weight,
        hard_weight=hard_weight,
        labels=labels,
        return_metrics=True,
        **options,
    )
