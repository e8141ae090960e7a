"""The row operation in Triton: one program per row, two to four sweeps over its vocabulary, float32 inside.

1. statistics: the softmax sums of every tile, of the contrast too if the weight of the noisy branch is known
   (constant or rows, no plausibility set), and the mean gap that reverse KL's gradient needs.
2. with another contrast: the softmax sums of the contrast, whose weight only the first sweep has found.
3. values and mean tilt; forward and reverse KL know that mean already and skip this sweep if a gradient is wanted.
4. gradient; for forward and reverse KL the values too.

Bytes per word of bf16 tiles, read and written, if no sweep finds anything in the cache:

                              forward, reverse KL    others    no gradient
    no contrast (three tiles)         10               14           8
    constant, rows (four)             14               20          12
    other contrasts                   20               26          18

Sweeps run forward and backward in turn: each meets first what the one before read last. Not measured on a GPU yet.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..ops.objective import METRICS, Objective
from . import divergence as divergences
from .compare import Gradient, align_rows, pair, sweep
from .contrast import contrast  # noqa: F401  a backend is one module
from .contrast_rule import Branches
from .launch import contrast_numbers, contrast_words, tile_choice, transforms
from .row import INTERPRETED, Tile, Tiles, columns, logit, number_at, word_at
from .teacher import teacher_of_row

COLUMNS = tl.constexpr(len(METRICS))


@triton.jit
def row_loss(value, hard, soft_weight, hard_weight):
    loss = soft_weight * value
    if hard_weight is not None:
        loss += hard_weight * hard
    return loss


@triton.jit
def finite_before_add(
    tiles,
    vocab,
    rate,
    side,
    branches,
    recentering,
    peak_tilt,
    floor,
    soft_weight,
    hard_weight,
    hard,
    widest,
    value,  # of the sweep before, unless MEAN_TILT_FREE
    divergence: tl.constexpr,
    KIND: tl.constexpr,
    MEAN_TILT_FREE: tl.constexpr,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    EXACT_GAP: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Whether the row's loss is finite, before its gradient is added to what is stored: that cannot be taken back."""
    if MEAN_TILT_FREE:
        # either mean of the gap is at most twice the widest; where that does not settle it, a sweep more does
        most = row_loss(2 * rate * widest, tl.abs(hard), soft_weight, hard_weight)
        sound = tl.abs(most) + side.student.total + side.teacher.total < float("inf")
        if not sound:
            first = sweep(
                tiles, vocab, side, branches, recentering, peak_tilt, floor,
                Gradient(None, None, None, None, None, None, None),
                divergence, KIND, MEAN_TILT_FREE, MODE, OUTSIDE, EXACT_GAP, DIFFERENCE, False, True, BLOCK,
            )  # fmt: skip
            sound = tl.abs(row_loss(first.value, hard, soft_weight, hard_weight)) < float("inf")
    else:
        sound = tl.abs(row_loss(value, hard, soft_weight, hard_weight)) < float("inf")
    return sound


@triton.jit
def fill(row_ptr, number, vocab, BLOCK: tl.constexpr):
    for start in range(0, vocab, BLOCK):
        col = columns(start, BLOCK)
        tl.store(row_ptr + col, tl.zeros(col.shape, row_ptr.dtype.element_ty) + number, col < vocab)


@triton.jit
def rows_kernel(
    student_ptr,  # (N, V)
    teacher_ptr,  # (N, V)
    noisy_ptr,  # (N, V) or None: no contrast
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
    recentering,  # divergence.RECENTERING
    floor,  # or None
    soft_weight,
    hard_weight,  # or None
    ignore_index,
    alpha,  # of the contrast
    threshold,
    log_plausibility,  # log of the plausibility beta, or None
    divergence: tl.constexpr,  # a function of kernels/divergence.py
    KIND: tl.constexpr,  # divergence.KIND
    DIFFERENCE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SCHEDULE: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 at 16k tokens of a 131k vocabulary
    WITH_METRICS: tl.constexpr = metrics_ptr is not None
    CONTRAST: tl.constexpr = noisy_ptr is not None
    HAS_LABELS: tl.constexpr = labels_ptr is not None and (hard_weight is not None or WITH_METRICS)
    ADD_TO_GRAD: tl.constexpr = ACCUMULATE and grad_ptr is not None
    # whether the mean tilt comes without a sweep of its own
    MEAN_TILT_FREE: tl.constexpr = KIND != "tilt" and floor is None and not (ADD_TO_GRAD and CONTRAST)
    NEED_PEAK_PARTNER: tl.constexpr = KIND != "slope" and grad_ptr is not None
    MEAN: tl.constexpr = NEED_PEAK_PARTNER and MEAN_TILT_FREE
    # whether the weight of the noisy branch is known before the first sweep, which then takes in the contrast
    EARLY_CONTRAST: tl.constexpr = (
        CONTRAST and (SCHEDULE == "constant" or SCHEDULE == "per_row") and log_plausibility is None
    )
    EXACT_GAP: tl.constexpr = DIFFERENCE and not CONTRAST and student_cap is None and teacher_cap is None

    label = 0
    labeled = True
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        if label == ignore_index:
            tl.store(loss_ptr + row, 0.0)
            if WITH_METRICS:
                for i in tl.static_range(COLUMNS):
                    tl.store(metrics_ptr + i * metrics_stride + row, 0.0)
            if grad_ptr is not None and not ACCUMULATE:
                fill(grad_ptr + row * grad_stride, 0.0, vocab, BLOCK)
            return
        labeled = label >= 0
        label = tl.maximum(label, 0)

    noisy_tile = Tile(None, None, None)
    if CONTRAST:
        noisy_tile = Tile(noisy_ptr + row * noisy_stride, noisy_scale, noisy_cap)
    tiles = Tiles(
        Tile(student_ptr + row * student_stride, student_scale, student_cap),
        Tile(teacher_ptr + row * teacher_stride, teacher_scale, teacher_cap),
        noisy_tile,
    )
    # single words are read before the first sweep, whose barriers keep them ahead of a gradient in the student's place
    target = 0.0
    clean_target = 0.0
    if HAS_LABELS:
        target = logit(number_at(tiles.student, label), tiles.student)
    if CONTRAST and CONFIDENCE == "target":
        clean_target = word_at(tiles, label, DIFFERENCE).teacher

    if SCHEDULE == "per_row":
        alpha = tl.load(alpha_ptr + row).to(tl.float32)
    row_teacher = teacher_of_row(
        tiles, vocab, rate, alpha, threshold, log_plausibility, clean_target, SCHEDULE, CONFIDENCE, MODE, OUTSIDE,
        HAS_LABELS, WITH_METRICS, NEED_PEAK_PARTNER, MEAN, ADD_TO_GRAD and MEAN_TILT_FREE, EARLY_CONTRAST, CONTRAST,
        EXACT_GAP, DIFFERENCE, BLOCK,
    )  # fmt: skip
    found = row_teacher.found
    student = found.student
    teacher = row_teacher.teacher
    branches = Branches(None, None, None, None, None, None)
    if CONTRAST:
        branches = Branches(
            row_teacher.clean, row_teacher.noisy, row_teacher.a, row_teacher.offset, log_plausibility, row_teacher.shift
        )
    hard = 0.0
    if HAS_LABELS:
        hard = tl.where(labeled, found.hard_sum - (target - student.peak), 0.0)

    other_at_peak = row_teacher.other_at_peak
    side = align_rows(student, teacher, other_at_peak, rate, beta, EXACT_GAP)
    peak_tilt = 0.0
    total = -row_teacher.mean * rate
    if NEED_PEAK_PARTNER and not MEAN_TILT_FREE:
        peak = pair(
            student.peak, student.peak + other_at_peak if EXACT_GAP else other_at_peak, side.gap_at_peak, side, floor
        )
        _, peak_tilt = divergence(peak.p, peak.q, peak.gap, beta)
    if grad_ptr is None or not MEAN_TILT_FREE:
        sums = sweep(
            tiles, vocab, side, branches, recentering, peak_tilt, floor,
            Gradient(None, None, None, None, None, None, None),
            divergence, KIND, MEAN_TILT_FREE, MODE, OUTSIDE, EXACT_GAP, DIFFERENCE, False,
            not CONTRAST or EARLY_CONTRAST, BLOCK,
        )  # fmt: skip
        total = sums.tilt
    if grad_ptr is not None:
        factor = 1.0
        if weight_ptr is not None:
            factor = tl.load(weight_ptr + row).to(tl.float32)
        end = vocab
        if ADD_TO_GRAD:
            sound = finite_before_add(
                tiles, vocab, rate, side, branches, recentering, peak_tilt, floor, soft_weight, hard_weight, hard,
                found.widest, 0.0 if MEAN_TILT_FREE else sums.value, divergence, KIND, MEAN_TILT_FREE, MODE, OUTSIDE,
                EXACT_GAP, DIFFERENCE, BLOCK,
            )  # fmt: skip
            end = tl.where(sound & (tl.abs(factor) < float("inf")), vocab, 0)
        hard_factor = None
        if hard_weight is not None:
            hard_factor = tl.where(labeled, hard_weight * factor, 0.0)
        gradient = Gradient(
            grad_ptr + row * grad_stride, total, soft_weight * rate * factor, hard_factor, found.hard_sum, label, end
        )
        final = sweep(
            tiles, vocab, side, branches, recentering, peak_tilt, floor, gradient,
            divergence, KIND, MEAN_TILT_FREE, MODE, OUTSIDE, EXACT_GAP, DIFFERENCE, ADD_TO_GRAD,
            (CONTRAST and not EARLY_CONTRAST) != MEAN_TILT_FREE, BLOCK,
        )  # fmt: skip
        if MEAN_TILT_FREE:
            sums = final

    value = tl.where(sums.value < 0, 0.0, sums.value)  # a sum of rounded terms can be; NaN stays
    # a NaN among the logits is one in these, whatever a divergence selects; they are 0 if every word is masked
    value = tl.where((student.total > 0) & (teacher.total > 0), value, float("nan"))
    loss = row_loss(value, hard, soft_weight, hard_weight)
    tl.store(loss_ptr + row, loss)
    if WITH_METRICS:
        agree = found.student_best.word == row_teacher.best
        columns_of_row = (
            value, hard, sums.student_entropy, sums.teacher_entropy, row_teacher.certainty, row_teacher.a, agree,
        )  # fmt: skip
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
        divergences.RECENTERING[name](float(objective.beta)),
        None if objective.teacher_floor == float("-inf") else float(objective.teacher_floor),
        float(objective.soft_weight),
        float(objective.hard_weight) or None,
        objective.ignore_index,
        *contrast_numbers(law),
        getattr(divergences, name),
        divergences.KIND.get(name, "tilt"),
        objective.difference,
        objective.accumulate,
        *contrast_words(law),
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
