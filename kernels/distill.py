"""The row operation in Triton: one program per row, two to four sweeps over its vocabulary, float32 inside.

1. statistics: the softmax sums of every tile, of the contrast too if the weight of the disturbed branch is known
   (constant or rows, no plausibility set), and the mean gap that reverse KL's gradient needs.
2. under another law: the softmax sums of the contrast, whose weight only the first sweep has found.
3. values and mean tilt; forward and reverse KL know that mean already and skip this sweep if a gradient is wanted.
4. gradient; for forward and reverse KL the values too.

Bytes per word of bf16 tiles, read and written, if no sweep finds anything in the cache:

                              forward, reverse KL    others    no gradient
    no law (three tiles)              10               14           8
    constant, rows (four)             14               20          12
    other laws                        20               26          18

Sweeps run forward and backward in turn: each meets first what the one before read last. Not measured on a GPU yet.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..ops.objective import METRICS, Objective
from . import divergence as divergences
from .contrast import contrast  # noqa: F401  a backend is one module
from .launch import law_numbers, law_words, tile_choice, transforms
from .law import Branches, alone, confidence, contrasted, purification
from .row import (
    INTERPRETED,
    LOW,
    Softmax,
    Tile,
    Tiles,
    Words,
    columns,
    finite,
    lanes,
    log_prob,
    log_ratio,
    logit,
    logit_slope,
    narrow,
    number_at,
    word_at,
    words,
)
from .sweeps import purified, statistics

COLUMNS = tl.constexpr(len(METRICS))


class Side(NamedTuple):
    """What the comparison of a row's words needs."""

    student: Softmax
    teacher: Softmax
    student_origin: tl.tensor  # taken off the logits before their difference, apart, is
    teacher_origin: tl.tensor
    level: tl.tensor  # log p - log q = (apart - level) * rate + shift
    shift: tl.tensor
    mate_level: tl.tensor  # apart, at the student's peak
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
    lifted: tl.tensor  # what the floor added to p


class Sums(NamedTuple):
    value: tl.tensor
    tilt: tl.tensor
    student_entropy: tl.tensor
    teacher_entropy: tl.tensor


@triton.jit
def facing(student, teacher, mate, rate, beta, STRAIGHT: tl.constexpr):
    """The two sides of a row, with the origins from which their gap rounds least."""
    # Logits that lie near each other are subtracted as they are, which loses nothing; if one side is shifted against
    # the other, the peaks come off first, for the difference would round at the size of the shift.
    apart = teacher.peak - student.peak
    shifted = tl.abs(apart) > 4
    if STRAIGHT:
        shifted = False
    student_origin = tl.where(shifted, student.peak, 0.0)
    teacher_origin = tl.where(shifted, teacher.peak, 0.0)
    level = tl.where(shifted, 0.0, apart)
    if STRAIGHT:
        mate_level = mate
    else:
        mate_level = (mate - teacher_origin) - (student.peak - student_origin)
    shift = log_ratio(student.total, teacher.total)
    return Side(student, teacher, student_origin, teacher_origin, level, shift, finite(mate_level), rate, beta)


@triton.jit
def pair(x, y, apart, side, floor):
    """The probabilities of words whose logits are x and y; apart as in Side."""
    log_q = log_prob(x, side.student, side.rate)
    log_p = log_prob(y, side.teacher, side.rate)
    gap = (apart - side.level) * side.rate + side.shift
    gap = tl.where((log_q > LOW) | (log_p > LOW), gap, 0.0)
    p = tl.exp(log_p)
    lifted = 0 * p
    if floor is not None:
        low = (log_p < floor) & (log_q > LOW)
        gap = tl.where(low, floor - log_q, gap)
        lifted = tl.where(low, tl.exp(floor) - p, 0.0)
        p = tl.where(low, tl.exp(floor), p)
    return Pair(log_p, log_q, p, tl.exp(log_q), gap, lifted)


@triton.jit
def sweep(
    tiles,
    vocab,
    side,
    branches,  # or Branches of None
    center,
    peak_tilt,
    floor,  # or None
    gradient,  # or Gradient of None
    divergence: tl.constexpr,
    KIND: tl.constexpr,
    KNOWN: tl.constexpr,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    STRAIGHT: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values and tilts of a row, summed; the gradient is stored, or added to what stands there, if there is one."""
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
        apart = w.gap if STRAIGHT else (w.teacher - side.teacher_origin) - (w.student - side.student_origin)
        each = pair(w.student, w.teacher, apart, side, floor)
        student_entropy -= tl.sum(tl.where(each.q > 0, each.q * each.log_q, 0.0), 1)
        p = each.p - each.lifted
        teacher_entropy -= tl.sum(tl.where(p > 0, p * each.log_p, 0.0), 1)
        value, tilt = divergence(each.p, each.q, each.gap, side.beta)
        if floor is not None:
            value -= center * each.lifted  # a floor breaks the sum over which CENTRE * (p - q) vanishes
        values += tl.sum(value, 1)
        if KIND == "slope":
            slope = tilt
        else:
            slope = tl.where(each.q > 0, each.q * (tilt - peak_tilt), 0.0)
        tilts += tl.sum(slope, 1)
        if gradient.ptr is not None:
            if KIND == "gap" and KNOWN:
                tilt = (side.mate_level - apart) * side.rate
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


@triton.jit
def row_loss(value, hard, soft_weight, hard_weight):
    loss = soft_weight * value
    if hard_weight is not None:
        loss += hard_weight * hard
    return loss


@triton.jit
def fill(row_ptr, number, vocab, BLOCK: tl.constexpr):
    for start in range(0, vocab, BLOCK):
        col = columns(start, BLOCK)
        tl.store(row_ptr + col, tl.zeros(col.shape, row_ptr.dtype.element_ty) + number, col < vocab)


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
    center,  # divergence.CENTRE
    floor,  # or None
    soft_weight,
    hard_weight,  # or None
    ignore_index,
    alpha,  # of the law
    threshold,
    least,  # log of the plausibility beta, or None
    divergence: tl.constexpr,  # a function of kernels/divergence.py
    KIND: tl.constexpr,  # divergence.KIND
    DIFFERENCE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 at 16k tokens of a 131k vocabulary
    TABLE: tl.constexpr = metrics_ptr is not None
    LAW: tl.constexpr = noisy_ptr is not None
    HARD: tl.constexpr = labels_ptr is not None and (hard_weight is not None or TABLE)
    ADDED: tl.constexpr = ACCUMULATE and grad_ptr is not None
    # whether the mean tilt comes without a sweep of its own
    KNOWN: tl.constexpr = KIND != "tilt" and floor is None and not (ADDED and LAW)
    MATE: tl.constexpr = KIND != "slope" and grad_ptr is not None
    MEAN: tl.constexpr = MATE and KNOWN
    # whether the weight of the disturbed branch is known before the first sweep, which then takes in the contrast
    JOINT: tl.constexpr = LAW and (WEIGHT == "constant" or WEIGHT == "per_row") and least is None
    STRAIGHT: tl.constexpr = DIFFERENCE and not LAW and student_cap is None and teacher_cap is None

    label = 0
    labeled = True
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        if label == ignore_index:
            tl.store(loss_ptr + row, 0.0)
            if TABLE:
                for i in tl.static_range(COLUMNS):
                    tl.store(metrics_ptr + i * metrics_stride + row, 0.0)
            if grad_ptr is not None and not ACCUMULATE:
                fill(grad_ptr + row * grad_stride, 0.0, vocab, BLOCK)
            return
        labeled = label >= 0
        label = tl.maximum(label, 0)

    noisy_tile = Tile(None, None, None)
    if LAW:
        noisy_tile = Tile(noisy_ptr + row * noisy_stride, noisy_scale, noisy_cap)
    tiles = Tiles(
        Tile(student_ptr + row * student_stride, student_scale, student_cap),
        Tile(teacher_ptr + row * teacher_stride, teacher_scale, teacher_cap),
        noisy_tile,
    )
    # single words are read before the first sweep, whose barriers keep them ahead of a gradient in the student's place
    target = 0.0
    clean_target = 0.0
    if HARD:
        target = logit(number_at(tiles.student, label), tiles.student)
    if LAW and CONFIDENCE == "target":
        clean_target = word_at(tiles, label, DIFFERENCE).teacher

    a = 0.0
    branches = Branches(None, None, None, None, None, None)
    if LAW:
        if WEIGHT == "per_row":
            alpha = tl.load(alpha_ptr + row).to(tl.float32)
        if JOINT:
            # the peaks are not known yet: those of the first block are near enough
            a = alpha + 0.0
            first = words(tiles, 0, vocab, DIFFERENCE, BLOCK)
            branches = Branches(
                Softmax(finite(tl.max(first.teacher)), 1.0, 0.0), Softmax(finite(tl.max(first.noisy)), 1.0, 0.0),
                a, 0.0, None, 0.0,
            )  # fmt: skip
    found = statistics(
        tiles, vocab, rate, branches, HARD, not LAW or JOINT, LAW and (TABLE or not JOINT),
        CONFIDENCE == "entropy", LAW and not JOINT, MATE and (not LAW or JOINT), MEAN and (not LAW or JOINT),
        TABLE or MATE and LAW and not JOINT, TABLE, ADDED and KNOWN, MODE, STRAIGHT, DIFFERENCE, BLOCK,
    )  # fmt: skip
    student = found.student
    teacher = found.teacher
    mate = found.mate
    mean = found.mean
    best = found.teacher_best.word
    sure = 0.0
    if not LAW:
        sure = 1 / teacher.total
    elif TABLE or not JOINT:
        sure = confidence(vocab, found.clean, found.entropy, clean_target, CONFIDENCE)
    if LAW and not JOINT:
        a = purification(sure, found.clean, found.noisy, alpha, threshold, WEIGHT)
        kept = alone(found.clean.log_sum, found.noisy.log_sum, a, MODE)
        branches = Branches(found.clean, found.noisy, a, kept, least, 0.0)
        teacher, set_shift, mate, mean, other_best = purified(
            tiles, vocab, rate, student, found.student_best.word, branches,
            MODE, OUTSIDE, MATE, MEAN, TABLE, DIFFERENCE, BLOCK,
        )  # fmt: skip
        best = other_best.word
        branches = Branches(found.clean, found.noisy, a, kept, least, set_shift)
    if JOINT:
        kept = 0.0
        if found.lone > 0:
            # the log-sums of both branches do count then: two sweeps more, for rows that hardly ever come
            again = statistics(
                tiles, vocab, rate, Branches(None, None, None, None, None, None),
                False, False, True, False, True, False, False,
                MATE, False, False, MODE, STRAIGHT, DIFFERENCE, BLOCK,
            )  # fmt: skip
            kept = alone(
                again.clean.peak - branches.clean.peak + again.clean.log_sum,
                again.noisy.peak - branches.noisy.peak + again.noisy.log_sum,
                a,
                MODE,
            )
            teacher, _, mate, mean, other_best = purified(
                tiles, vocab, rate, student, again.student_best.word,
                Branches(branches.clean, branches.noisy, a, kept, None, 0.0),
                MODE, OUTSIDE, MATE, MEAN, TABLE, DIFFERENCE, BLOCK,
            )  # fmt: skip
            best = other_best.word
        branches = Branches(branches.clean, branches.noisy, a, kept, None, 0.0)
    hard = 0.0
    if HARD:
        hard = tl.where(labeled, found.hard_sum - (target - student.peak), 0.0)

    side = facing(student, teacher, mate, rate, beta, STRAIGHT)
    peak_tilt = 0.0
    total = -mean * rate
    if MATE and not KNOWN:
        peak = pair(student.peak, student.peak + mate if STRAIGHT else mate, side.mate_level, side, floor)
        _, peak_tilt = divergence(peak.p, peak.q, peak.gap, beta)
    if grad_ptr is None or not KNOWN:
        sums = sweep(
            tiles, vocab, side, branches, center, peak_tilt, floor,
            Gradient(None, None, None, None, None, None, None),
            divergence, KIND, KNOWN, MODE, OUTSIDE, STRAIGHT, DIFFERENCE, False, not LAW or JOINT, BLOCK,
        )  # fmt: skip
        total = sums.tilt
    if grad_ptr is not None:
        factor = 1.0
        if weight_ptr is not None:
            factor = tl.load(weight_ptr + row).to(tl.float32)
        end = vocab
        if ADDED:
            # a row that is not finite adds no numbers: what is stored can be taken back, what is added cannot
            if KNOWN:
                # either mean of the gap is at most twice the widest; where that does not settle it, a sweep more does
                most = row_loss(2 * rate * found.widest, tl.abs(hard), soft_weight, hard_weight)
                sound = tl.abs(most) + student.total + teacher.total < float("inf")
                if not sound:
                    first = sweep(
                        tiles, vocab, side, branches, center, peak_tilt, floor,
                        Gradient(None, None, None, None, None, None, None),
                        divergence, KIND, KNOWN, MODE, OUTSIDE, STRAIGHT, DIFFERENCE, False, True, BLOCK,
                    )  # fmt: skip
                    sound = tl.abs(row_loss(first.value, hard, soft_weight, hard_weight)) < float("inf")
            else:
                sound = tl.abs(row_loss(sums.value, hard, soft_weight, hard_weight)) < float("inf")
            end = tl.where(sound & (tl.abs(factor) < float("inf")), vocab, 0)
        hard_factor = None
        if hard_weight is not None:
            hard_factor = tl.where(labeled, hard_weight * factor, 0.0)
        gradient = Gradient(
            grad_ptr + row * grad_stride, total, soft_weight * rate * factor, hard_factor, found.hard_sum, label, end
        )
        final = sweep(
            tiles, vocab, side, branches, center, peak_tilt, floor, gradient,
            divergence, KIND, KNOWN, MODE, OUTSIDE, STRAIGHT, DIFFERENCE, ADDED, (LAW and not JOINT) != KNOWN, BLOCK,
        )  # fmt: skip
        if KNOWN:
            sums = final

    value = tl.where(sums.value < 0, 0.0, sums.value)  # a sum of rounded terms can be; NaN stays
    # a NaN among the logits is one in these, whatever a divergence selects; they are 0 if every word is masked
    value = tl.where((student.total > 0) & (teacher.total > 0), value, float("nan"))
    loss = row_loss(value, hard, soft_weight, hard_weight)
    tl.store(loss_ptr + row, loss)
    if TABLE:
        agree = found.student_best.word == best
        columns_of_row = (value, hard, sums.student_entropy, sums.teacher_entropy, sure, a, agree)
        for i in tl.static_range(COLUMNS):
            tl.store(metrics_ptr + i * metrics_stride + row, columns_of_row[i])
    if grad_ptr is not None:
        # after the fact, for such rows are rare: what they stored is taken back
        without = (factor == 0) | (tl.abs(loss) == float("inf"))
        number = tl.where(without, 0.0, float("nan"))
        stays = (tl.abs(loss) < float("inf")) & (tl.abs(factor) < float("inf")) & (factor != 0)
        if ACCUMULATE:
            stays = stays | without
        if not stays:
            tl.debug_barrier()
            fill(grad_ptr + row * grad_stride, number, vocab, BLOCK)


@cache
def unusable():
    """Why a call would not run here; empty if it would."""
    if INTERPRETED.value:
        return ""
    if not torch.cuda.is_available():
        return "Triton needs a GPU, and torch finds none (TRITON_INTERPRET=1 interprets its kernels, slowly)"
    try:
        trial()
    except Exception as error:  # whatever the driver or a compiler raises
        reason = " ".join(str(error).split())[:200]
        return f"Triton {triton.__version__} compiles no kernel for this GPU: {type(error).__name__}: {reason}"
    return ""


def trial():
    """A row of few words on the current GPU: seconds where its kernel is in no cache yet, else no time."""
    student, teacher, grad = torch.zeros(3, 1, 16, device="cuda")
    rows(Objective("reverse_kl"), student, teacher, None, None, None, None, student.new_empty(1), grad, None)


def more_devices():
    return ("cpu",) if INTERPRETED.value else ()


def arguments(objective, student, teacher, noisy, alpha, labels, row_weight, loss, grad, metrics):
    """What rows_kernel is launched with, in its order; tests/tools/compile_triton.py compiles for the same."""
    law = objective.law
    name = divergences.ENDS.get((objective.divergence, objective.beta), objective.divergence)
    tiles = (student, teacher, noisy, grad, metrics)
    return (
        student,
        teacher,
        noisy,
        alpha,
        labels,
        row_weight,
        loss,
        grad,
        metrics,
        *(0 if tile is None else tile.stride(0) for tile in tiles),
        student.shape[1],
        *transforms(objective.student, objective.teacher, objective.noisy),
        1 / objective.temperature,
        float(objective.beta),
        divergences.CENTRE[name](float(objective.beta)),
        None if objective.teacher_floor == float("-inf") else float(objective.teacher_floor),
        float(objective.soft_weight),
        float(objective.hard_weight) or None,
        objective.ignore_index,
        *law_numbers(law),
        getattr(divergences, name),
        divergences.KIND.get(name, "tilt"),
        objective.difference,
        objective.accumulate,
        *law_words(law),
    )


def choice(objective, tiles, labels, metrics):
    """tile_choice for rows_kernel."""
    # ptxas also spills these if it chooses the limit itself: skew_kl on sm_100, jensen_shannon before Triton 3.7
    mixed = objective.divergence == "skew_kl" or objective.divergence == "jensen_shannon" and metrics is not None
    return tile_choice(tiles, labels is not None or objective.teacher_floor > float("-inf") or mixed)


def rows(objective, student, teacher, noisy, alpha, labels, row_weight, loss, grad, metrics):
    """The row operation as `hkdfast.ops.reference.rows` defines it. CUDA tensors, or any under TRITON_INTERPRET=1.

    grad may be the student tile: a block is read whole before it is stored, and no other block is.
    """
    given = arguments(objective, student, teacher, noisy, alpha, labels, row_weight, loss, grad, metrics)
    with torch.cuda.device_of(student):
        rows_kernel[(len(student),)](*given, **choice(objective, (student, teacher, noisy, grad), labels, metrics))
