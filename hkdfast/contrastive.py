"""Contrast of a clean and a noisy branch: as a teacher (`purify`) and for decoding (`contrast`)."""

import math
from collections.abc import Sequence

import torch

from .engine import operators
from .engine import tile_loop as loop
from .engine.arguments import autocast_dtype, check_number, check_word, shown, without_autocast
from .engine.checks import (
    check_labels,
    check_pair,
    check_source,
    check_target,
    check_vocab,
    check_weights,
    sizes_of,
)
from .engine.cut import cut
from .engine.options import LossOptions
from .engine.renamed import CONTRAST, PURIFY, refuses
from .engine.split_call import Part
from .engine.terms import add_input, per_row
from .heads import Head, Purified, device_of
from .ops.dispatch import is_traced
from .ops.objective import ContrastSpec, Objective
from .split import Split

WORDS = {
    "schedule": ("constant", "linear", "gate"),
    "confidence": ("max_prob", "entropy", "target"),
    "mode": ("extrapolate", "subtract"),
    "outside": ("clean", "drop"),
}


@refuses(PURIFY)
def purify(
    clean: torch.Tensor | Head,
    noisy: torch.Tensor | Head | Sequence[torch.Tensor | Head],
    alpha: float | torch.Tensor = 1.0,
    *,
    schedule: str = "constant",
    confidence: str = "max_prob",
    threshold: float = 0.5,
    mode: str = "extrapolate",
    plausibility: float = 0.0,
    outside: str = "clean",
) -> Purified:
    """A teacher that subtracts a noisy branch from a clean one, optionally more strongly in rows of low confidence.

    With c the confidence and a the contrast weight of a row, the purified distribution is the softmax of

        (1 + a) log p_clean - a log p_noisy      (mode="extrapolate")
              log p_clean - a log p_noisy        (mode="subtract": with equal branches it flattens)

    on normalized log-probabilities. The loss computes it tile by tile and never stores it. A token that only the noisy
    branch masks (-inf) keeps its clean log-probability.

    Args:
        clean: logits (..., V) or a Head: the model on clean input.
        noisy: the same model on noisy input, the same rows; or a list of such branches, whose logits are averaged.
            Heads that share a weight and have no softcap are averaged as hidden states, at the cost of one product.
        alpha: strength of the contrast, finite and not negative: the weight of every row, or the largest weight under
            "linear" and "gate". A tensor (...) gives each row its own weight; `schedule` must then be "constant".
        schedule: "constant": a = alpha. "linear": a = alpha * (1 - c). "gate": a = alpha where c < threshold, else 0.
        confidence: c of a row, from the clean branch at temperature 1. "max_prob": its largest probability. "entropy":
            1 - H / log V. "target": the probability of the label; the loss then needs a label for every row.
        threshold: of the schedule "gate", 0 to 1.
        mode: see above.
        plausibility: beta in 0..1 of VCD's plausibility set, the tokens with p_clean >= beta * max p_clean; 0: no set.
        outside: tokens outside that set. "clean": they keep their clean log-probability; the rest of the probability is
            shared among the tokens inside, in proportion to their purified probabilities. "drop": they get -inf, for
            decoding; reverse_kl refuses such a teacher without a teacher_floor.

    Returns:
        A teacher for `distill_loss`, or the argument of `contrast`. It is a constant and gets no gradient.

    Raises:
        ValueError: on unknown option values, numbers out of range, or rows and devices that differ. The loss or
            `contrast` checks the vocabularies, because it has the option `vocab`.

    Source: contrast and plausibility set: Leng et al., 2024 (VCD, arXiv:2311.16922). Confidence, schedules and
    "subtract" are a reconstruction of SEED (arXiv:2507.04680), which has no published code.
    """
    for name, word in dict(schedule=schedule, confidence=confidence, mode=mode, outside=outside).items():
        check_word(name, word, WORDS[name])
    draws = tuple(noisy) if isinstance(noisy, (list, tuple)) else (noisy,)
    if not draws:
        raise ValueError("noisy is an empty list, expected at least one noisy branch")
    check_source("clean", clean)
    for draw in draws:
        check_source("noisy", draw)
        check_pair("clean", clean, "noisy", draw)
    for name, number in (("threshold", threshold), ("plausibility", plausibility)):
        check_number(name, number, "between 0 and 1", lambda x: 0 <= x <= 1)
    rows = None
    if isinstance(alpha, torch.Tensor) and alpha.dim():
        if schedule != "constant":
            raise ValueError(
                f'a tensor of alphas is the weight of each row: schedule must be "constant", got {schedule!r}'
            )
        check_weights("alpha", alpha, tuple(clean.shape[:-1]), device_of(clean))
        rows, alpha, schedule = alpha.detach(), 0.0, "per_row"
    check_number("alpha", alpha, "finite and not negative", lambda x: 0 <= x < math.inf)
    law = ContrastSpec(schedule, float(alpha), confidence, float(threshold), mode, float(plausibility), outside)
    return Purified(clean, draws, law, rows)


@refuses(CONTRAST)
def contrast(
    purified: Purified,
    *,
    temperature: float = 1.0,
    labels: torch.Tensor | None = None,
    vocab: int | str | None = None,
    precision: str = "float32",
    tile_memory: float | None = None,
    backend: str | None = None,
    split: Split | None = None,
) -> torch.Tensor:
    """Log-probabilities of a purified distribution, for decoding.

    With a constant weight this is VCD; with per-row weights ICD, AvisC, M3ID and classifier-free guidance.

    Args:
        purified: the result of `purify`.
        temperature: positive and finite, divides the contrasted log-probabilities.
        labels: (...) int64, required if the teacher's confidence is "target"; otherwise only checked.
        vocab, precision, tile_memory, backend, split: as in `distill_loss`. Under a Split the clean branch is this
            process's part.

    Returns:
        (..., V) float32 normalized log-probabilities (float64 from float64 logits), under a Split those of this
        process's tokens. No gradient.

    Raises:
        ValueError: on numbers out of range, vocabularies that differ, labels outside them, or a confidence "target"
            without labels.
        ImportError: if the named backend does not run here.

    Source: Leng et al., 2024 (VCD, arXiv:2311.16922).
    """
    if not isinstance(purified, Purified):
        raise ValueError(f"contrast takes the result of purify, got {shown(purified)}")
    options = LossOptions(
        temperature=temperature, labels=labels, vocab=vocab, precision=precision, tile_memory=tile_memory,
        backend=backend, split=split,
    )  # fmt: skip
    if precision == "difference":
        raise ValueError('precision="difference" needs a student; contrast takes "float32" or "bfloat16"')
    (purified,), part = cut(("clean",), (purified,), purified.clean, split, vocab)
    size = check_vocab(sizes_of((purified.clean, *purified.noisy)), vocab) if part is None else part.local
    lead, device = purified.shape[:-1], device_of(purified.clean)
    check_labels(labels, lead, device)
    check_target(purified.law, labels)
    n = math.prod(lead)
    spec, tensors = contrast_spec(purified, n, size, options, part)
    with torch.no_grad(), without_autocast(device):
        out = (operators if is_traced(tensors[0][0]) else loop).contrast(spec, tensors)
    return out.reshape(*lead, size)


def contrast_spec(
    purified: Purified, n: int, size: int, options: LossOptions, part: Part | None
) -> tuple[loop.LoopSpec, list]:
    """The LoopSpec of a contrast over n rows and `size` tokens, and its tensors."""
    tensors: list = []
    inputs: list = []
    alphas: list = []
    slot = add_input(purified, n, False, tensors, inputs, alphas)
    objective = Objective(
        temperature=float(options.temperature),
        law=purified.law,
        student=slot.transform,  # not read, but torch.compile cannot follow a default that is an object
        teacher=slot.transform,
        noisy=slot.noisy_transform,
    )
    spec = loop.LoopSpec(
        inputs=tuple(inputs),
        terms=(loop.LossTerm(slot.index, slot.index, slot.noisy, objective, slot.alpha),),
        labels=per_row(options.labels, n),
        alphas=[per_row(alpha, n) for alpha in alphas],
        vocab=size,
        compute=autocast_dtype(device_of(purified.clean)),
        precision=options.precision,
        tile_memory=options.memory_bytes,
        backend=options.backend,
        part=part,
    )
    return spec, tensors
