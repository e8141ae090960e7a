"""SEED's contrast inside a sweep: how certain the clean branch is, how strongly the noisy one is subtracted, and the
contrast of a token. hkdfast/ops/reference.py has the formulas and their sources."""

from typing import NamedTuple

import triton
import triton.language as tl

from .row import LOW, Softmax, log_prob


class Branches(NamedTuple):
    """What the contrast of a row needs beside its words."""

    clean: Softmax  # at temperature 1; only its peak, or another number near it, if there is no set
    noisy: Softmax  # likewise
    a: tl.tensor  # the weight of the noisy branch
    # what a token that keeps its clean log-probability lacks against the contrast of the others
    clean_only_offset: tl.tensor
    log_plausibility: tl.tensor  # log of the plausibility beta, or None for no set
    shift: tl.tensor  # added inside the set, so that its words share their clean mass


@triton.jit
def confidence(vocab, clean, entropy, target, CONFIDENCE: tl.constexpr):
    """How certain the clean branch is of its answer (of one token it is certain); target: its logit of the label."""
    if CONFIDENCE == "max_prob":
        certainty = 1 / clean.total
    elif CONFIDENCE == "entropy":
        certainty = 1 - entropy / tl.log(tl.maximum(vocab * tl.full((), 1.0, tl.float32), 2.0))
    else:
        certainty = tl.exp(log_prob(target, clean, 1.0))
    return certainty


@triton.jit
def contrast_weight(certainty, clean, noisy, alpha, threshold, SCHEDULE: tl.constexpr):
    """The weight of the noisy branch, NaN if either branch holds a NaN; alpha is that of all rows, or with the schedule
    per_row the row's own."""
    a = alpha
    if SCHEDULE == "linear":
        a = alpha * (1 - certainty)
    elif SCHEDULE == "gate":
        a = tl.where(certainty < threshold, alpha, 0.0)
    known = (clean.total == clean.total) & (noisy.total == noisy.total)
    return tl.where(known, a, float("nan"))


@triton.jit
def inside(w, branches):
    return w.teacher - branches.clean.peak >= branches.log_plausibility


@triton.jit
def clean_only_offset(clean_lse, noisy_lse, a, MODE: tl.constexpr):
    """Branches.clean_only_offset, from the log-sums of the branches less their origins."""
    less = clean_lse - noisy_lse if MODE == "extrapolate" else -noisy_lse
    return tl.where(noisy_lse > LOW, a * less, 0.0)  # else there is no contrast to compare with


@triton.jit
def contrasted(w, branches, MODE: tl.constexpr, OUTSIDE: tl.constexpr):
    """Purified logits: log-probabilities up to a constant of the row."""
    # less the peaks only: to take off the log-sums too would round once more what a then magnifies
    clean = w.teacher - branches.clean.peak
    noisy = w.noisy - branches.noisy.peak
    if MODE == "extrapolate":
        z = clean + branches.a * (clean - noisy)
    else:
        z = clean - branches.a * noisy
    # a token that only the noisy branch masks keeps its clean log-probability; a NaN is no mask
    z = tl.where(((clean > LOW) & (noisy != LOW)) | (noisy != noisy), z, clean + branches.clean_only_offset)
    if branches.log_plausibility is not None:
        rest = LOW if OUTSIDE == "drop" else clean + branches.clean_only_offset
        z = tl.where(inside(w, branches), z + branches.shift, rest)
    return z
