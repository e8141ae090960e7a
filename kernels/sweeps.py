"""The sweeps that find a row's softmax sums, for both kernels."""

from typing import NamedTuple

import triton
import triton.language as tl

from .contrast_rule import Branches, contrasted, inside
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


class Statistics(NamedTuple):
    """What the first sweep over a row gives; of no meaning where it was not requested."""

    student: Softmax
    hard_sum: tl.tensor  # the student's log_sum at temperature 1
    teacher: Softmax  # of the teacher, purified if its weight was known before the sweep
    clean: Softmax  # of the branches of a contrast, at temperature 1
    noisy: Softmax
    entropy: tl.tensor  # of the clean branch at temperature 1
    noisy_masked: tl.tensor  # 1 if a token is masked by the noisy branch alone
    widest: tl.tensor  # the largest distance of a token's two logits, infinite for one that one side alone masks
    other_at_peak: tl.tensor  # the teacher's logit (Words.gap if STRAIGHT) where the student has its peak
    mean: tl.tensor  # under q, of teacher - student less what it is there
    student_best: Best
    teacher_best: Best


@triton.jit
def statistics(
    tiles,
    vocab,
    rate,
    branches,  # of a contrast whose weight is known, else Branches of None
    HAS_LABELS: tl.constexpr,
    TEACHER: tl.constexpr,
    CLEAN: tl.constexpr,
    ENTROPY: tl.constexpr,
    NOISY: tl.constexpr,
    NEED_PEAK_PARTNER: tl.constexpr,
    MEAN: tl.constexpr,
    STUDENT_BEST: tl.constexpr,
    TEACHER_BEST: tl.constexpr,
    WIDEST: tl.constexpr,
    MODE: tl.constexpr,
    EXACT_GAP: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first sweep: the sums that its flags request."""
    peak_q, sum_q, hard_sum = lanes(LOW, BLOCK), lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    other_at_peak, mean = lanes(LOW, BLOCK), lanes(0.0, BLOCK)
    noisy_masked, widest = lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    peak_p, sum_p = lanes(LOW, BLOCK), lanes(0.0, BLOCK)
    peak_c, sum_c, moment = lanes(LOW, BLOCK), lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    peak_n, sum_n = lanes(LOW, BLOCK), lanes(0.0, BLOCK)
    best_q, best_p = no_best(BLOCK), no_best(BLOCK)
    for start in range(0, vocab, BLOCK):
        w = words(tiles, start, vocab, DIFFERENCE, BLOCK)
        z = w.teacher
        if branches.a is not None:
            z = contrasted(w, branches, MODE, "clean")
            noisy_only = (w.noisy == LOW) & (w.teacher > LOW)
            noisy_masked = tl.maximum(noisy_masked, tl.max(tl.where(noisy_only, 1.0, 0.0), 1))
        if WIDEST:
            raw_gap = tl.where((w.student > LOW) | (z > LOW), tl.abs(w.student - z), 0.0)
            widest = tl.maximum(widest, tl.max(raw_gap, 1))
        if tiles.student.ptr is not None:
            new = tl.maximum(peak_q, tl.max(w.student, 1))
            base = finite(new)
            e = powers(w.student, base, rate)
            keep = tl.exp((peak_q - base) * rate)
            if NEED_PEAK_PARTNER:
                side = w.gap if EXACT_GAP else z
                there = tl.max(tl.where(w.student == new[:, None], side, LOW), 1)
                moved = tl.where(new > peak_q, there, other_at_peak)
                if MEAN:
                    gap = side - finite(moved)[:, None]
                    shift = finite(other_at_peak) - finite(moved)
                    if not EXACT_GAP:
                        gap -= w.student - base[:, None]
                        shift -= finite(peak_q) - base
                    both = (w.student > LOW) & (z > LOW)
                    mean = (mean + sum_q * shift) * keep + tl.sum(tl.where(both, e * gap, 0.0), 1)
                other_at_peak = moved
            sum_q = sum_q * keep + tl.sum(e, 1)
            if HAS_LABELS:
                hard_sum = hard_sum * tl.exp(peak_q - base) + tl.sum(powers(w.student, base, 1.0), 1)
            peak_q = new
            if STUDENT_BEST:
                best_q = better(best_q, w.x * tiles.student.scale, start, BLOCK)
        if TEACHER:
            new = tl.maximum(peak_p, tl.max(z, 1))
            sum_p = sum_p * tl.exp((peak_p - finite(new)) * rate) + tl.sum(powers(z, finite(new), rate), 1)
            peak_p = new
            if TEACHER_BEST:
                # of a softcap's argument, which has fewer ties than its value
                best_p = better(best_p, w.y * tiles.teacher.scale if branches.a is None else z, start, BLOCK)
        if CLEAN:
            new = tl.maximum(peak_c, tl.max(w.teacher, 1))
            base = finite(new)
            e = powers(w.teacher, base, 1.0)
            keep = tl.exp(peak_c - base)
            if ENTROPY:
                drop = tl.where(peak_c > LOW, peak_c - base, 0.0)
                terms = tl.where(e > 0, e * (w.teacher - base[:, None]), 0.0)
                moment = (moment + sum_c * drop) * keep + tl.sum(terms, 1)
            sum_c = sum_c * keep + tl.sum(e, 1)
            peak_c = new
        if NOISY:
            new = tl.maximum(peak_n, tl.max(w.noisy, 1))
            sum_n = sum_n * tl.exp(peak_n - finite(new)) + tl.sum(powers(w.noisy, finite(new), 1.0), 1)
            peak_n = new

    student = Softmax(0.0, 0.0, 0.0)
    teacher = Softmax(0.0, 0.0, 0.0)
    clean = Softmax(0.0, 0.0, 0.0)
    noisy = Softmax(0.0, 0.0, 0.0)
    entropy = 0.0
    row_other_at_peak = 0.0
    row_mean = 0.0
    if tiles.student.ptr is not None:
        student = softmax(peak_q, sum_q, rate)
        hard_sum = tl.log(fold(hard_sum, peak_q, 1.0))
        if NEED_PEAK_PARTNER:
            row_other_at_peak = tl.max(tl.where(peak_q == student.peak, other_at_peak, LOW), 0)
        if MEAN:
            shift = finite(other_at_peak) - finite(row_other_at_peak)
            if not EXACT_GAP:
                shift -= finite(peak_q) - finite(student.peak)
            row_mean = fold(mean + sum_q * shift, peak_q, rate) / student.total
    if TEACHER:
        teacher = softmax(peak_p, sum_p, rate)
    if CLEAN:
        clean = softmax(peak_c, sum_c, 1.0)
        if ENTROPY:
            drop = tl.where(peak_c > LOW, peak_c - finite(clean.peak), 0.0)
            entropy = clean.log_sum - fold(moment + sum_c * drop, peak_c, 1.0) / clean.total
    if NOISY:
        noisy = softmax(peak_n, sum_n, 1.0)
    return Statistics(
        student,
        hard_sum,
        teacher,
        clean,
        noisy,
        entropy,
        tl.max(noisy_masked, 0),
        tl.max(widest, 0),
        row_other_at_peak,
        row_mean,
        best_of(best_q),
        best_of(best_p),
    )


@triton.jit
def purified(
    tiles,
    vocab,
    rate,
    student,
    word,
    branches,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    NEED_PEAK_PARTNER: tl.constexpr,
    MEAN: tl.constexpr,
    BEST: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sweep over a contrast whose weight the first sweep has found; word is where the student has its peak.

    Returns the contrast's Softmax at the temperature, Branches.shift, and other_at_peak, mean and best of Statistics.
    """
    # two groups of tokens: those of the plausibility set, and the others
    TWO: tl.constexpr = branches.log_plausibility is not None and OUTSIDE == "clean"
    peak, total, mass, unit = lanes(LOW, BLOCK), lanes(0.0, BLOCK), lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    mean, share = lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    best = no_best(BLOCK)
    if TWO:
        rest_peak, rest, rest_best = lanes(LOW, BLOCK), lanes(0.0, BLOCK), no_best(BLOCK)
    other_at_peak = 0.0
    if NEED_PEAK_PARTNER:
        at = word_at(tiles, word, DIFFERENCE)
        other_at_peak = contrasted(at, branches, MODE, OUTSIDE)
    last = (vocab - 1) // BLOCK * BLOCK
    for passed in range(0, vocab, BLOCK):
        start = last - passed
        w = words(tiles, start, vocab, DIFFERENCE, BLOCK)
        z = contrasted(w, branches, MODE, OUTSIDE)
        if MEAN:
            q = tl.exp(log_prob(w.student, student, rate))
            gap = (z - finite(other_at_peak)) - (w.student - student.peak)
            mean += tl.sum(tl.where((w.student > LOW) & (z > LOW), q * gap, 0.0), 1)
        if TWO:
            own = inside(w, branches)
            if MEAN:
                share += tl.sum(tl.where(own, q, 0.0), 1)
            mass += tl.sum(tl.where(own, tl.exp(log_prob(w.teacher, branches.clean, 1.0)), 0.0), 1)
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
    # a NaN beyond the set, or one that leaves nothing in it, is a NaN of the row all the same
    total = tl.where(branches.a == branches.a, total, float("nan"))
    teacher = softmax(peak, total, rate)
    shift = 0.0
    if TWO:
        # the log of the set's clean mass less that of its contrast, both in the contrast's units
        shift = branches.clean_only_offset + branches.clean.log_sum + tl.log(tl.sum(mass, 0))
        shift -= teacher.peak + tl.log(fold(unit, peak, 1.0))
        top = teacher.peak + shift
        rest_top = tl.max(rest_peak, 0)
        both_top = tl.maximum(top, rest_top)
        within = teacher.total * tl.exp((top - both_top) * rate)
        beyond = fold(rest, rest_peak, rate) * tl.exp((rest_top - both_top) * rate)
        teacher = Softmax(both_top, within + beyond, tl.log(within + beyond))
        other = best_of(rest_best)
        row_best = Best(both_top, tl.where(other.value > row_best.value + shift, other.word, row_best.word))
        if NEED_PEAK_PARTNER:
            shifted = Branches(
                branches.clean, branches.noisy, branches.a, branches.clean_only_offset, branches.log_plausibility, shift
            )
            moved = contrasted(at, shifted, MODE, OUTSIDE)
            row_mean += shift * tl.sum(share, 0) - (moved - other_at_peak)
            other_at_peak = moved
    return teacher, shift, other_at_peak, row_mean, row_best
