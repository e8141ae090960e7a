"""SEED's purification inside a sweep: how sure the clean branch is, how strongly the disturbed one is subtracted, and
the contrast of a word. hkdfast/reference.py has the formulas and their sources."""

from typing import NamedTuple

import triton
import triton.language as tl

from .row import (
    LOW,
    Best,
    Softmax,
    best_of,
    better,
    finite,
    fold,
    lanes,
    log_prob,
    no_best,
    powers,
    softmax,
    word_at,
    words,
)


class Branches(NamedTuple):
    """What the contrast of a row needs beside its words."""

    clean: Softmax  # at temperature 1
    noisy: Softmax
    a: tl.tensor  # the weight of the disturbed branch
    alone: tl.tensor  # what a word that keeps its clean log-probability lacks against the contrast of the others
    least: tl.tensor  # log of the plausibility beta, or None for no set
    shift: tl.tensor  # added inside the set, so that its words share their clean mass


@triton.jit
def confidence(tiles, vocab, clean, entropy, label, CONFIDENCE: tl.constexpr, DIFFERENCE: tl.constexpr):
    """How sure the clean branch is of its answer."""
    if CONFIDENCE == "max_prob":
        sure = 1 / clean.total
    elif CONFIDENCE == "entropy":
        sure = 1 - entropy / tl.log(vocab * tl.full((), 1.0, tl.float32))
    else:
        sure = tl.exp(log_prob(word_at(tiles, label, DIFFERENCE).teacher, clean, 1.0))
    return sure


@triton.jit
def purification(sure, alpha, threshold, WEIGHT: tl.constexpr):
    """The weight of the disturbed branch; alpha is the law's, or the row's own if the law says rows."""
    a = alpha
    if WEIGHT == "linear":
        a = alpha * (1 - sure)
    elif WEIGHT == "gate":
        a = tl.where(sure < threshold, alpha, 0.0)
    return a


@triton.jit
def inside(w, branches):
    return w.teacher - branches.clean.peak >= branches.least


@triton.jit
def alone(clean, noisy, a, MODE: tl.constexpr):
    less = clean.log_sum - noisy.log_sum if MODE == "extrapolate" else -noisy.log_sum
    return tl.where(noisy.peak > LOW, a * less, 0.0)  # else there is no contrast to compare with


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
    # a word that only the disturbed branch masks keeps its clean log-probability
    z = tl.where((clean > LOW) & (noisy > LOW), z, clean + branches.alone)
    if branches.least is not None:
        rest = LOW if OUTSIDE == "drop" else clean + branches.alone
        z = tl.where(inside(w, branches), z + branches.shift, rest)
    return z


@triton.jit
def purified(
    tiles,
    vocab,
    rate,
    student,
    word,
    clean,
    noisy,
    a,
    least,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    MATE: tl.constexpr,
    MEAN: tl.constexpr,
    BEST: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sweep over the contrast; word is where the student has its peak.

    Returns Branches, the contrast's Softmax at the temperature, and mate, mean and best as in Statistics.
    """
    TWO: tl.constexpr = least is not None and OUTSIDE == "clean"  # groups of words, inside the set and outside
    kept = alone(clean, noisy, a, MODE)
    branches = Branches(clean, noisy, a, kept, least, 0.0)
    peak, total, mass, unit = lanes(LOW, BLOCK), lanes(0.0, BLOCK), lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    mean, share = lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    best = no_best(BLOCK)
    if TWO:
        rest_peak, rest, rest_best = lanes(LOW, BLOCK), lanes(0.0, BLOCK), no_best(BLOCK)
    mate = 0.0
    if MATE:
        at = word_at(tiles, word, DIFFERENCE)
        mate = contrasted(at, branches, MODE, OUTSIDE)
    last = (vocab - 1) // BLOCK * BLOCK
    for passed in range(0, vocab, BLOCK):
        start = last - passed
        w = words(tiles, start, vocab, DIFFERENCE, BLOCK)
        z = contrasted(w, branches, MODE, OUTSIDE)
        if MEAN:
            q = tl.exp(log_prob(w.student, student, rate))
            gap = (z - finite(mate)) - (w.student - student.peak)
            mean += tl.sum(tl.where((w.student > LOW) & (z > LOW), q * gap, 0.0), 1)
        if TWO:
            own = inside(w, branches)
            if MEAN:
                share += tl.sum(tl.where(own, q, 0.0), 1)
            mass += tl.sum(tl.where(own, tl.exp(log_prob(w.teacher, clean, 1.0)), 0.0), 1)
            other = tl.where(own, LOW, z)
            new = tl.maximum(rest_peak, tl.max(other, 1))
            rest = rest * tl.exp((rest_peak - finite(new)) * rate) + tl.sum(powers(other, finite(new), rate), 1)
            rest_peak = new
            if BEST:
                rest_best = better(rest_best, other, start, BLOCK)
            z = tl.where(own, z, LOW)
        new = tl.maximum(peak, tl.max(z, 1))
        total = total * tl.exp((peak - finite(new)) * rate) + tl.sum(powers(z, finite(new), rate), 1)
        if TWO:
            unit = unit * tl.exp(peak - finite(new)) + tl.sum(powers(z, finite(new), 1.0), 1)
        peak = new
        if BEST:
            best = better(best, z, start, BLOCK)

    row_mean = tl.sum(mean, 0)
    row_best = best_of(best)
    teacher = softmax(peak, total, rate)
    if TWO:
        shift = kept + clean.log_sum + tl.log(tl.sum(mass, 0)) - tl.log(fold(unit, peak, 1.0)) - teacher.peak
        branches = Branches(clean, noisy, a, kept, least, shift)
        top = teacher.peak + shift
        rest_top = tl.max(rest_peak, 0)
        both_top = tl.maximum(top, rest_top)
        within = teacher.total * tl.exp((top - both_top) * rate)
        beyond = fold(rest, rest_peak, rate) * tl.exp((rest_top - both_top) * rate)
        teacher = Softmax(both_top, within + beyond, tl.log(within + beyond))
        other = best_of(rest_best)
        row_best = Best(both_top, tl.where(other.value > row_best.value + shift, other.word, row_best.word))
        if MATE:
            moved = contrasted(at, branches, MODE, OUTSIDE)
            row_mean += shift * tl.sum(share, 0) - (moved - mate)
            mate = moved
    return branches, teacher, mate, row_mean, row_best
