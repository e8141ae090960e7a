"""Contrast of a clean and a disturbed branch: as a teacher (`purify`) and for decoding (`contrast`)."""

import math

import torch

from .engine import operators
from .engine import tile_loop as loop
from .engine.arguments import autocast_dtype, check_number, check_word, settled, shown, without_autocast
from .engine.checks import (
    check_labels,
    check_options,
    check_pair,
    check_source,
    check_target,
    check_vocab,
    check_weights,
)
from .engine.terms import seat
from .heads import Purified, device_of
from .ops.dispatch import traced
from .ops.objective import Law, Objective

WORDS = {
    "schedule": ("constant", "linear", "gate"),
    "confidence": ("max_prob", "entropy", "target"),
    "mode": ("extrapolate", "subtract"),
    "outside": ("clean", "drop"),
}


def purify(
    clean,
    noisy,
    alpha=1.0,
    *,
    schedule="constant",
    confidence="max_prob",
    threshold=0.5,
    mode="extrapolate",
    plausibility=0.0,
    outside="clean",
):
    """A teacher from which the disturbed branch is subtracted, row by row, as far as the clean branch is unsure.

    With c the confidence and a the weight of a row, the purified distribution is the softmax of

        (1 + a) log p_clean - a log p_noisy      (mode="extrapolate")
              log p_clean - a log p_noisy        (mode="subtract": at equal branches it flattens)

    on normalized log-probabilities. It is made tile by tile inside the loss, never stored. A word that only the
    disturbed branch masks (-inf) keeps its clean log-probability.

    Args:
        clean: logits (..., V) or a Head: the model on what it should see.
        noisy: the same on disturbed input, the same rows; or a list of them, whose logits are averaged. Heads through
            one weight without softcap are averaged as hidden states: one product, not one per draw.
        alpha: strength of the subtraction, finite and not negative: the weight of every row, or the most a row can get
            under "linear" and "gate". A tensor (...) gives each row its own weight; `weight` must then be "constant".
        weight: "constant": a = alpha. "linear": a = alpha * (1 - c). "gate": a = alpha where c < threshold, else 0.
        confidence: c of a row, from the clean branch at temperature 1. "max_prob": its largest probability. "entropy":
            1 - H / log V. "target": the probability of the label; the loss then needs a label for every row.
        threshold: where the gate closes, 0 to 1.
        mode: see above.
        plausibility: beta in 0..1 of VCD's plausibility set, the words with p_clean >= beta * max p_clean; 0 for none.
        outside: words outside that set. "clean": they keep their clean log-probability, those inside share the rest by
            their purified odds. "drop": -inf, for decoding; reverse_kl refuses such a teacher without a floor.

    Returns:
        A teacher for `distill_loss`, or what `contrast` evaluates. Nothing in it gets a gradient.

    Raises:
        ValueError: on unknown words, numbers out of range, or rows and devices that differ. Vocabularies are compared
            by the loss or `contrast`, which know the policy.

    Source: contrast and plausibility set: Leng et al., 2024 (VCD, arXiv:2311.16922). Confidence, weights and "subtract"
    are a reconstruction of SEED (arXiv:2507.04680), whose internals are not published in code.
    """
    for name, word in dict(schedule=schedule, confidence=confidence, mode=mode, outside=outside).items():
        check_word(name, word, WORDS[name])
    draws = tuple(noisy) if isinstance(noisy, (list, tuple)) else (noisy,)
    if not draws:
        raise ValueError("noisy is an empty list, expected at least one disturbed branch")
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
    law = Law(schedule, float(alpha), confidence, float(threshold), mode, float(plausibility), outside)
    return Purified(clean, draws, law, rows)


def contrast(
    purified,
    *,
    temperature=1.0,
    labels=None,
    vocab=None,
    precision="float32",
    tile_memory=None,
    backend=None,
):
    """Log-probabilities of a purified distribution, for decoding.

    With a constant weight this is VCD; with per-row weights ICD, AvisC, M3ID and classifier-free guidance.

    Args:
        purified: what `purify` returned.
        temperature: positive and finite, divides the contrasted log-probabilities.
        labels: (...) int64, needed if the law's confidence is "target"; else looked over only.
        vocab, precision, tile_memory, backend: as in `distill_loss`.

    Returns:
        (..., V) float32 log-probabilities that sum to one (float64 from float64 logits). No gradient.

    Raises:
        ValueError: on numbers out of range, vocabularies that differ, labels that do not fit, or a confidence "target"
            without labels.
        ImportError: if the backend asked for does not run here.

    Source: Leng et al., 2024 (VCD, arXiv:2311.16922).
    """
    if not isinstance(purified, Purified):
        raise ValueError(f"contrast takes what purify returns, got {shown(purified)}")
    check_options(temperature=temperature, precision=precision, tile_memory=tile_memory, backend=backend)
    if precision == "difference":
        raise ValueError('precision="difference" needs a student; contrast takes "float32" or "bfloat16"')
    branches, law = (purified.clean, *purified.noisy), purified.law
    words = check_vocab(branches, vocab)
    lead, device = purified.shape[:-1], device_of(purified.clean)
    check_labels(labels, lead, device)
    check_target(law, labels)
    n, tensors, parties, alphas = math.prod(lead), [], [], []
    taken = seat(purified, n, False, tensors, parties, alphas)
    objective = Objective(
        temperature=float(temperature),
        law=law,
        student=taken.transform,  # not read, but torch.compile cannot follow a default that is an object
        teacher=taken.transform,
        noisy=taken.disturbed,
    )
    call = loop.Call(
        parties=tuple(parties),
        lessons=(loop.Lesson(taken.party, taken.party, taken.noisy, objective, taken.alpha),),
        labels=labels if labels is None else settled(labels).reshape(n).contiguous(),
        alphas=[settled(alpha).reshape(n).contiguous() for alpha in alphas],
        vocab=words,
        compute=autocast_dtype(device),
        precision=precision,
        tile_memory=None if tile_memory is None else int(tile_memory),
        backend=backend,
    )
    with torch.no_grad(), without_autocast(device):
        out = (operators if traced(tensors[0][0]) else loop).contrast(call, tensors)
    return out.reshape(*lead, words)
