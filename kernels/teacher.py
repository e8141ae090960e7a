"""The teacher of a row, with the student's sums beside it: one sweep, or two where a contrast has to be found first."""

from typing import NamedTuple

import triton
import triton.language as tl

from .contrast_rule import Branches, clean_only_offset, confidence, contrast_weight
from .row import Softmax, finite, words
from .sweeps import Statistics, purified, statistics


class RowTeacher(NamedTuple):
    """The teacher of a row; the last of it of no meaning without a contrast."""

    found: Statistics  # of the first sweep
    teacher: Softmax  # purified if there is a contrast
    other_at_peak: tl.tensor  # as in Statistics, and mean
    mean: tl.tensor
    best: tl.tensor  # the teacher's most likely token
    certainty: tl.tensor
    a: tl.tensor  # the weight of the noisy branch
    clean: Softmax  # of Branches, like noisy, offset and shift
    noisy: Softmax
    offset: tl.tensor
    shift: tl.tensor


@triton.jit
def teacher_of_row(
    tiles,
    vocab,
    rate,
    alpha,
    threshold,
    log_plausibility,
    clean_target,
    SCHEDULE: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    WITH_METRICS: tl.constexpr,
    NEED_PEAK_PARTNER: tl.constexpr,
    MEAN: tl.constexpr,
    WIDEST: tl.constexpr,
    EARLY_CONTRAST: tl.constexpr,
    CONTRAST: tl.constexpr,
    EXACT_GAP: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LATE_CONTRAST: tl.constexpr = CONTRAST and not EARLY_CONTRAST
    a = 0.0
    branches = Branches(None, None, None, None, None, None)
    if EARLY_CONTRAST:
        # the peaks are not known yet: those of the first block are near enough
        a = alpha + 0.0
        first = words(tiles, 0, vocab, DIFFERENCE, BLOCK)
        branches = Branches(
            Softmax(finite(tl.max(first.teacher)), 1.0, 0.0), Softmax(finite(tl.max(first.noisy)), 1.0, 0.0),
            a, 0.0, None, 0.0,
        )  # fmt: skip
    found = statistics(
        tiles, vocab, rate, branches, HAS_LABELS, not LATE_CONTRAST, CONTRAST and (WITH_METRICS or LATE_CONTRAST),
        CONFIDENCE == "entropy", LATE_CONTRAST, NEED_PEAK_PARTNER and not LATE_CONTRAST, MEAN and not LATE_CONTRAST,
        WITH_METRICS or NEED_PEAK_PARTNER and LATE_CONTRAST, WITH_METRICS, WIDEST, MODE, EXACT_GAP, DIFFERENCE, BLOCK,
    )  # fmt: skip
    student = found.student
    teacher = found.teacher
    clean = found.clean
    noisy = found.noisy
    other_at_peak = found.other_at_peak
    mean = found.mean
    best = found.teacher_best.word
    certainty = 0.0
    offset = 0.0
    shift = 0.0
    if not CONTRAST:
        certainty = 1 / teacher.total
    elif WITH_METRICS or LATE_CONTRAST:
        certainty = confidence(vocab, found.clean, found.entropy, clean_target, CONFIDENCE)
    if LATE_CONTRAST:
        a = contrast_weight(certainty, found.clean, found.noisy, alpha, threshold, SCHEDULE)
        offset = clean_only_offset(found.clean.log_sum, found.noisy.log_sum, a, MODE)
        teacher, shift, other_at_peak, mean, other_best = purified(
            tiles, vocab, rate, student, found.student_best.word,
            Branches(found.clean, found.noisy, a, offset, log_plausibility, 0.0),
            MODE, OUTSIDE, NEED_PEAK_PARTNER, MEAN, WITH_METRICS, DIFFERENCE, BLOCK,
        )  # fmt: skip
        best = other_best.word
    if EARLY_CONTRAST:
        clean = branches.clean
        noisy = branches.noisy
        if found.noisy_masked > 0:
            # the log-sums of both branches do count then: two sweeps more, for rows that hardly ever come
            again = statistics(
                tiles, vocab, rate, Branches(None, None, None, None, None, None),
                False, False, True, False, True, False, False,
                NEED_PEAK_PARTNER, False, False, MODE, EXACT_GAP, DIFFERENCE, BLOCK,
            )  # fmt: skip
            offset = clean_only_offset(
                again.clean.peak - clean.peak + again.clean.log_sum,
                again.noisy.peak - noisy.peak + again.noisy.log_sum,
                a,
                MODE,
            )
            teacher, _, other_at_peak, mean, other_best = purified(
                tiles, vocab, rate, student, again.student_best.word,
                Branches(clean, noisy, a, offset, None, 0.0),
                MODE, OUTSIDE, NEED_PEAK_PARTNER, MEAN, WITH_METRICS, DIFFERENCE, BLOCK,
            )  # fmt: skip
            best = other_best.word
    return RowTeacher(found, teacher, other_at_peak, mean, best, certainty, a, clean, noisy, offset, shift)
