"""The comparison of a row's two sides: the gap of their log-probabilities, and the sweep that sums values and tilts and
writes the gradient."""

from typing import NamedTuple

import triton
import triton.language as tl

from .contrast_rule import contrasted
from .row import LOW, Softmax, Words, columns, finite, lanes, log_prob, log_ratio, logit_slope, narrow, words


class RowPair(NamedTuple):
    """What the comparison of a row's words needs."""

    student: Softmax
    teacher: Softmax
    student_origin: tl.tensor  # taken off the logits before their difference, raw_gap, is made
    teacher_origin: tl.tensor
    gap_offset: tl.tensor  # log p - log q = (raw_gap - gap_offset) * rate + shift
    shift: tl.tensor
    gap_at_peak: tl.tensor  # raw_gap at the student's peak
    rate: tl.tensor
    beta: tl.tensor


class Gradient(NamedTuple):
    """What d loss / d x of a word is made of, beside its tilt."""

    ptr: tl.tensor
    total: tl.tensor  # mean under q of the tilt less its value at the student's peak, or the sum of slopes
    soft: tl.tensor  # factor of the divergence's part, 1 / temperature included
    hard: tl.tensor  # factor of the cross entropy's part, or None
    hard_sum: tl.tensor
    label: tl.tensor
    end: tl.tensor  # of the words that get one


class Pair(NamedTuple):
    log_p: tl.tensor  # before a floor
    log_q: tl.tensor
    p: tl.tensor
    q: tl.tensor
    gap: tl.tensor
    floor_added: tl.tensor  # what the floor added to p


class Sums(NamedTuple):
    value: tl.tensor
    tilt: tl.tensor
    student_entropy: tl.tensor
    teacher_entropy: tl.tensor


@triton.jit
def align_rows(student, teacher, other_at_peak, rate, beta, EXACT_GAP: tl.constexpr):
    """The two sides of a row, with the origins from which their gap rounds least."""
    # Logits that lie near each other are subtracted as they are, which loses nothing; if one side is shifted against
    # the other, the peaks come off first, for the difference would round at the size of the shift.
    raw_gap = teacher.peak - student.peak
    shifted = tl.abs(raw_gap) > 4
    if EXACT_GAP:
        shifted = False
    student_origin = tl.where(shifted, student.peak, 0.0)
    teacher_origin = tl.where(shifted, teacher.peak, 0.0)
    gap_offset = tl.where(shifted, 0.0, raw_gap)
    if EXACT_GAP:
        gap_at_peak = other_at_peak
    else:
        gap_at_peak = (other_at_peak - teacher_origin) - (student.peak - student_origin)
    shift = log_ratio(student.total, teacher.total)
    return RowPair(student, teacher, student_origin, teacher_origin, gap_offset, shift, finite(gap_at_peak), rate, beta)


@triton.jit
def pair(x, y, raw_gap, side, floor):
    """The probabilities of words whose logits are x and y; raw_gap as in RowPair."""
    log_q = log_prob(x, side.student, side.rate)
    log_p = log_prob(y, side.teacher, side.rate)
    gap = (raw_gap - side.gap_offset) * side.rate + side.shift
    gap = tl.where((log_q > LOW) | (log_p > LOW), gap, 0.0)
    p = tl.exp(log_p)
    floor_added = 0 * p
    if floor is not None:
        low = (log_p < floor) & (log_q > LOW)
        gap = tl.where(low, floor - log_q, gap)
        floor_added = tl.where(low, tl.exp(floor) - p, 0.0)
        p = tl.where(low, tl.exp(floor), p)
    return Pair(log_p, log_q, p, tl.exp(log_q), gap, floor_added)


@triton.jit
def sweep(
    tiles,
    vocab,
    side,
    branches,  # or Branches of None
    recentering,
    peak_tilt,
    floor,  # or None
    gradient,  # or Gradient of None
    divergence: tl.constexpr,
    KIND: tl.constexpr,
    MEAN_TILT_FREE: tl.constexpr,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    EXACT_GAP: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values and tilts of a row, summed; the gradient, if there is one, is stored, or added to what is stored."""
    values, tilts = lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    student_entropy, teacher_entropy = lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    last = (vocab - 1) // BLOCK * BLOCK
    for passed in range(0, vocab, BLOCK):
        start = last - passed if BACKWARD else passed
        col = columns(start, BLOCK)
        if gradient.ptr is not None and ACCUMULATE:
            before = tl.load(gradient.ptr + col, col < gradient.end, other=0.0).to(tl.float32)
        w = words(tiles, start, vocab, DIFFERENCE, BLOCK)
        if branches.a is not None:
            w = Words(w.x, w.y, w.student, contrasted(w, branches, MODE, OUTSIDE), w.noisy, w.gap)
        raw_gap = w.gap if EXACT_GAP else (w.teacher - side.teacher_origin) - (w.student - side.student_origin)
        each = pair(w.student, w.teacher, raw_gap, side, floor)
        student_entropy -= tl.sum(tl.where(each.q > 0, each.q * each.log_q, 0.0), 1)
        p = each.p - each.floor_added
        teacher_entropy -= tl.sum(tl.where(p > 0, p * each.log_p, 0.0), 1)
        value, tilt = divergence(each.p, each.q, each.gap, side.beta)
        if floor is not None:
            value -= recentering * each.floor_added  # a floor breaks the sum over which RECENTERING * (p - q) vanishes
        values += tl.sum(value, 1)
        if KIND == "slope":
            slope = tilt
        else:
            slope = tl.where(each.q > 0, each.q * (tilt - peak_tilt), 0.0)
        tilts += tl.sum(slope, 1)
        if gradient.ptr is not None:
            if KIND == "gap" and MEAN_TILT_FREE:
                tilt = (side.gap_at_peak - raw_gap) * side.rate
                slope = tl.where(each.q > 0, each.q * (tilt - gradient.total), 0.0)
            else:
                slope -= each.q * gradient.total
            g = gradient.soft * slope
            if gradient.hard is not None:
                one = tl.exp((w.student - side.student.peak) - gradient.hard_sum)
                g += gradient.hard * (one - (col == gradient.label).to(tl.float32))
            g = tl.where(w.x > LOW, g * logit_slope(w.x, tiles.student), 0.0)
            if ACCUMULATE:
                g += before
            tl.store(gradient.ptr + col, narrow(g, gradient.ptr.dtype.element_ty), col < gradient.end)
    return Sums(tl.sum(values, 0), tl.sum(tilts, 0), tl.sum(student_entropy, 0), tl.sum(teacher_entropy, 0))
