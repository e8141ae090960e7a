"""The row operation in Triton: one program per row, two to four sweeps over its vocabulary, float32 inside.

1. statistics: the softmax sums of every tile, and the mean gap that reverse KL's gradient needs.
2. with a law: the softmax sums of the contrast, whose weight only the first sweep has found.
3. values and sum of slopes; forward and reverse KL know that sum already and skip this sweep when a gradient is wanted.
4. gradient; for forward and reverse KL the values too.

Traffic in bytes per word of three bf16 tiles (student, teacher, gradient): 10 for forward and reverse KL, 14 for the
others; with a law (four tiles) 20 and 26; without a gradient 8 and 12. Sweeps run in turn forward and backward: each
meets first what the one before left in the cache. Not measured on a GPU yet.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import divergence as divergences
from .contrast import contrast  # noqa: F401  a backend is one module
from .launch import law_numbers, law_words, tile_choice, transforms
from .law import confidence, contrasted, purification, purified
from .row import LOW, Tile, Tiles, columns, lanes, log_prob, logit, logit_slope, number_at, statistics, words


class Gradient(NamedTuple):
    """What d loss / d x of a word is made of, beside its slope."""

    ptr: tl.tensor
    total: tl.tensor  # sum of the row's slopes
    soft: tl.tensor  # factor of the divergence's part, 1 / temperature included
    hard: tl.tensor  # factor of the cross entropy's part, or None
    hard_sum: tl.tensor
    label: tl.tensor


class Sums(NamedTuple):
    value: tl.tensor
    slope: tl.tensor
    student_entropy: tl.tensor
    teacher_entropy: tl.tensor


@triton.jit
def sweep(
    tiles,
    vocab,
    student,  # Softmax
    teacher,
    branches,  # or None
    rate,
    beta,
    centre,
    floor,  # or None
    gradient,  # or None
    divergence: tl.constexpr,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    STRAIGHT: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values and slopes of a row, summed; the gradient is stored if there is one."""
    values, slopes = lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    student_entropy, teacher_entropy = lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    shift = student.log_sum - teacher.log_sum
    if STRAIGHT:
        shift += (student.peak - teacher.peak) * rate
    last = (vocab - 1) // BLOCK * BLOCK
    for passed in range(0, vocab, BLOCK):
        start = last - passed if BACKWARD else passed
        w = words(tiles, start, vocab, DIFFERENCE, BLOCK)
        z = w.teacher if branches is None else contrasted(w, branches, MODE, OUTSIDE)
        log_q = log_prob(w.student, student, rate)
        log_p = log_prob(z, teacher, rate)
        gap = w.gap if STRAIGHT else (z - teacher.peak) - (w.student - student.peak)
        gap = tl.where((log_q > LOW) | (log_p > LOW), gap * rate + shift, 0.0)
        q = tl.exp(log_q)
        p = tl.exp(log_p)
        student_entropy -= tl.sum(tl.where(q > 0, q * log_q, 0.0), 1)
        teacher_entropy -= tl.sum(tl.where(p > 0, p * log_p, 0.0), 1)
        lifted = 0.0
        if floor is not None:
            low = (log_p < floor) & (log_q > LOW)
            gap = tl.where(low, floor - log_q, gap)
            raised = tl.where(low, tl.exp(floor), p)
            lifted = raised - p
            p = raised
        value, slope = divergence(p, q, gap, beta)
        if floor is not None:
            value -= centre * lifted  # a floor breaks the sum over which CENTRE * (p - q) vanishes
        values += tl.sum(value, 1)
        slopes += tl.sum(slope, 1)
        if gradient is not None:
            col = columns(start, BLOCK)
            g = gradient.soft * (slope - q * gradient.total)
            if gradient.hard is not None:
                one = tl.exp((w.student - student.peak) - gradient.hard_sum)
                g += gradient.hard * (one - (col == gradient.label).to(tl.float32))
            g *= logit_slope(w.x, tiles.student)
            tl.store(gradient.ptr + col, tl.where(w.x > LOW, g, 0.0).to(gradient.ptr.dtype.element_ty), col < vocab)
    return Sums(tl.sum(values, 0), tl.sum(slopes, 0), tl.sum(student_entropy, 0), tl.sum(teacher_entropy, 0))


@triton.jit
def blank(row_ptr, vocab, BLOCK: tl.constexpr):
    for start in range(0, vocab, BLOCK):
        col = columns(start, BLOCK)
        tl.store(row_ptr + col, tl.zeros(col.shape, row_ptr.dtype.element_ty), col < vocab)


@triton.jit
def rows_kernel(
    student_ptr,  # (N, V)
    teacher_ptr,  # (N, V)
    noisy_ptr,  # (N, V) or None: no law
    alpha_ptr,  # (N,) or None
    labels_ptr,  # (N,) int64 or None
    weight_ptr,  # (N,) or None
    loss_ptr,  # (N,)
    grad_ptr,  # (N, V) or None
    metrics_ptr,  # (7, N) or None
    student_stride,
    teacher_stride,
    noisy_stride,
    grad_stride,
    metrics_stride,
    vocab,
    student_scale,
    student_cap,  # or None, like the other caps
    teacher_scale,
    teacher_cap,
    noisy_scale,
    noisy_cap,
    rate,  # 1 / temperature
    beta,
    centre,  # divergence.CENTRE
    floor,  # or None
    soft_weight,
    hard_weight,  # or None
    ignore_index,
    alpha,  # of the law
    threshold,
    least,  # log of the plausibility beta, or None
    divergence: tl.constexpr,  # a function of kernels/divergence.py
    TOTAL: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    WEIGHT: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 at 16k tokens of a 131k vocabulary
    METRICS: tl.constexpr = metrics_ptr is not None
    LAW: tl.constexpr = noisy_ptr is not None
    HARD: tl.constexpr = labels_ptr is not None and (hard_weight is not None or METRICS)
    # whether the slopes' sum comes without a sweep of its own
    KNOWN: tl.constexpr = TOTAL != "sweep" and floor is None
    MEAN: tl.constexpr = KNOWN and TOTAL == "mean" and grad_ptr is not None
    STRAIGHT: tl.constexpr = DIFFERENCE and not LAW and student_cap is None and teacher_cap is None

    label = 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        if label == ignore_index:
            tl.store(loss_ptr + row, 0.0)
            if METRICS:
                for i in tl.static_range(7):
                    tl.store(metrics_ptr + i * metrics_stride + row, 0.0)
            if grad_ptr is not None:
                blank(grad_ptr + row * grad_stride, vocab, BLOCK)
            return
        label = tl.maximum(label, 0)

    noisy_tile = None
    if LAW:
        noisy_tile = Tile(noisy_ptr + row * noisy_stride, noisy_scale, noisy_cap)
    tiles = Tiles(
        Tile(student_ptr + row * student_stride, student_scale, student_cap),
        Tile(teacher_ptr + row * teacher_stride, teacher_scale, teacher_cap),
        noisy_tile,
    )
    hard = 0.0
    if HARD:
        target = logit(number_at(tiles.student, label), tiles.student)

    found = statistics(
        tiles,
        vocab,
        rate,
        HARD,
        LAW and CONFIDENCE == "entropy",
        MEAN and not LAW,
        METRICS,
        STRAIGHT,
        DIFFERENCE,
        BLOCK,
    )
    student = found.student
    teacher = found.teacher
    mean = found.mean
    best = found.teacher_best
    branches = None
    a = 0.0
    if LAW:
        sure = confidence(tiles, vocab, teacher, found.entropy, label, CONFIDENCE, DIFFERENCE)
        if WEIGHT == "rows":
            alpha = tl.load(alpha_ptr + row).to(tl.float32)
        a = purification(sure, alpha, threshold, WEIGHT)
        branches, teacher, mean, best = purified(
            tiles, vocab, rate, student, teacher, found.noisy, a, least, MODE, OUTSIDE, MEAN, METRICS, DIFFERENCE, BLOCK
        )
    else:
        sure = tl.exp(-teacher.log_sum)
    if HARD:
        hard = found.hard_sum - (target - student.peak)

    total = 0.0
    if MEAN:
        total = -(mean * rate + (student.log_sum - teacher.log_sum))
    if grad_ptr is None or not KNOWN:
        sums = sweep(
            tiles, vocab, student, teacher, branches, rate, beta, centre, floor, None,
            divergence, MODE, OUTSIDE, STRAIGHT, DIFFERENCE, not LAW, BLOCK,
        )  # fmt: skip
        total = sums.slope
    if grad_ptr is not None:
        factor = 1.0
        if weight_ptr is not None:
            factor = tl.load(weight_ptr + row).to(tl.float32)
        hard_factor = None
        if hard_weight is not None:
            hard_factor = hard_weight * factor
        gradient = Gradient(
            grad_ptr + row * grad_stride, total, soft_weight * rate * factor, hard_factor, found.hard_sum, label
        )
        final = sweep(
            tiles, vocab, student, teacher, branches, rate, beta, centre, floor, gradient,
            divergence, MODE, OUTSIDE, STRAIGHT, DIFFERENCE, LAW != KNOWN, BLOCK,
        )  # fmt: skip
        if KNOWN:
            sums = final

    value = tl.where(sums.value < 0, 0.0, sums.value)  # a sum of rounded terms can be; NaN stays
    loss = soft_weight * value
    if hard_weight is not None:
        loss += hard_weight * hard
    tl.store(loss_ptr + row, loss)
    if METRICS:
        agree = found.student_best.word == best.word
        columns_of_row = (value, hard, sums.student_entropy, sums.teacher_entropy, sure, a, agree)
        for i in tl.static_range(7):
            tl.store(metrics_ptr + i * metrics_stride + row, columns_of_row[i])
    if grad_ptr is not None:
        # after the fact, for such rows are rare: what a row of infinite loss stored is taken back
        if not (tl.abs(loss * factor) < float("inf")):
            blank(grad_ptr + row * grad_stride, vocab, BLOCK)


def rows(objective, student, teacher, noisy, alpha, labels, weight, loss, grad, metrics):
    """The row operation; `hkdfast.reference.rows` states the contract. CUDA tensors, or any under TRITON_INTERPRET=1.

    grad may be the student tile: a block is read whole before it is stored, and no other block is.
    """
    law = objective.law
    name = divergences.ENDS.get((objective.divergence, objective.beta), objective.divergence)
    n, vocab = student.shape
    with torch.cuda.device_of(student):
        rows_kernel[(n,)](
            student,
            teacher,
            noisy,
            alpha,
            labels,
            weight,
            loss,
            grad,
            metrics,
            student.stride(0),
            teacher.stride(0),
            0 if noisy is None else noisy.stride(0),
            0 if grad is None else grad.stride(0),
            0 if metrics is None else metrics.stride(0),
            vocab,
            *transforms(objective.student, objective.teacher, objective.noisy),
            1 / objective.temperature,
            objective.beta,
            divergences.CENTRE[name](objective.beta),
            None if objective.floor == float("-inf") else objective.floor,
            objective.soft_weight,
            objective.hard_weight or None,
            objective.ignore_index,
            *law_numbers(law),
            getattr(divergences, name),
            divergences.TOTAL.get(name, "sweep"),
            objective.difference,
            *law_words(law),
            **tile_choice(vocab),
        )
