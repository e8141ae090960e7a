"""What the sweeps over a row are made of.

A block is (lanes, 8) words. The eight neighbours of a lane are read by one thread as one or two 16-byte loads and
reduced there; what a sweep gathers is kept per lane and folded once at its end. So no loop meets a barrier.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergence import expm1, log1p

WIDTH = tl.constexpr(8)
LOW = tl.constexpr(float("-inf"))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Tile(NamedTuple):
    ptr: tl.tensor  # the row's first word
    scale: tl.tensor
    cap: tl.tensor  # softcap, or None


class Tiles(NamedTuple):
    student: Tile  # None when decoding
    teacher: Tile
    noisy: Tile  # None without a law


class Words(NamedTuple):
    """A block of one row; without a tile, None."""

    x: tl.tensor  # the student tile's numbers
    y: tl.tensor  # the teacher tile's, with the student's added if it holds differences
    student: tl.tensor  # logits, -inf past the end of the row
    teacher: tl.tensor
    noisy: tl.tensor
    gap: tl.tensor  # teacher - student, exactly, if the teacher's tile holds differences and no softcap bends them


class Softmax(NamedTuple):
    """log_softmax of a row is (z - peak) * rate - log_sum."""

    peak: tl.tensor
    total: tl.tensor
    log_sum: tl.tensor


class Best(NamedTuple):
    value: tl.tensor
    word: tl.tensor  # the first of equals


@triton.jit
def columns(start, BLOCK: tl.constexpr):
    return start + tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def tanh(x):
    # exp(-2 |x|) - 1 keeps the small x that (1 - e) / (1 + e) would cancel
    drop = expm1(-2 * tl.abs(x))
    size = -drop / (2 + drop)
    return tl.where(x < 0, -size, size)


@triton.jit
def logit(x, tile):
    z = x * tile.scale
    if tile.cap is not None:
        z = tile.cap * tanh(z / tile.cap)
    return z


@triton.jit
def logit_slope(x, tile):
    """d logit / d x."""
    slope = tile.scale
    if tile.cap is not None:
        e = tl.exp(-2 * tl.abs(x * tile.scale / tile.cap))
        slope = slope * 4 * e / ((1 + e) * (1 + e))  # 1 - tanh**2 without the cancellation
    return slope


@triton.jit
def narrow(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter cuts a bfloat16 off where hardware rounds to nearest even
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def numbers(tile, col, live):
    return tl.load(tile.ptr + col, live, other=LOW).to(tl.float32)


@triton.jit
def masked(z, live, tile):
    # a softcap makes -inf a finite logit, past the end of the row too
    if tile.cap is not None:
        z = tl.where(live, z, LOW)
    return z


@triton.jit
def words(tiles, start, vocab, DIFFERENCE: tl.constexpr, BLOCK: tl.constexpr):
    col = columns(start, BLOCK)
    live = col < vocab
    x = None
    student = None
    noisy = None
    gap = None
    y = numbers(tiles.teacher, col, live)
    if tiles.student is not None:
        x = numbers(tiles.student, col, live)
        student = masked(logit(x, tiles.student), live, tiles.student)
    if DIFFERENCE:
        gap = y * tiles.teacher.scale + (tiles.teacher.scale - tiles.student.scale) * x
        y += x
    teacher = masked(logit(y, tiles.teacher), live, tiles.teacher)
    if tiles.noisy is not None:
        noise = numbers(tiles.noisy, col, live)
        if DIFFERENCE:
            noise += x
        noisy = masked(logit(noise, tiles.noisy), live, tiles.noisy)
    return Words(x, y, student, teacher, noisy, gap)


@triton.jit
def number_at(tile, word):
    return tl.load(tile.ptr + word).to(tl.float32)


@triton.jit
def word_at(tiles, word, DIFFERENCE: tl.constexpr):
    """One word's logits, as scalars."""
    x = None
    student = None
    noisy = None
    y = number_at(tiles.teacher, word)
    if tiles.student is not None:
        x = number_at(tiles.student, word)
        student = logit(x, tiles.student)
    if DIFFERENCE:
        y += x
    if tiles.noisy is not None:
        noise = number_at(tiles.noisy, word)
        if DIFFERENCE:
            noise += x
        noisy = logit(noise, tiles.noisy)
    return Words(x, y, student, logit(y, tiles.teacher), noisy, None)


@triton.jit
def lanes(value, BLOCK: tl.constexpr):
    return tl.full((BLOCK // WIDTH,), value, tl.float32)


@triton.jit
def finite(peak):
    """The peak to subtract: -inf - -inf would be NaN where a lane has met masked words only."""
    return tl.where(peak > LOW, peak, 0.0)


@triton.jit
def powers(z, base, rate):
    return tl.exp((z - base[:, None]) * rate)


@triton.jit
def fold(total, peak, rate):
    """Lanes with peaks of their own to one number at the row's peak."""
    return tl.sum(total * tl.exp((peak - finite(tl.max(peak, 0))) * rate), 0)


@triton.jit
def softmax(peak, total, rate):
    total = fold(total, peak, rate)
    return Softmax(tl.max(peak, 0), total, tl.log(total))


@triton.jit
def log_ratio(a, b):
    """log(a / b), of two sums that may be near each other."""
    near = (a > 0.5 * b) & (a < 2 * b)
    return tl.where(near, log1p((a - b) / b), tl.log(a) - tl.log(b))


@triton.jit
def log_prob(z, stats, rate):
    # peak first: z * rate - lse would round at the size of the logits, not of the answer
    return (z - stats.peak) * rate - stats.log_sum


@triton.jit
def no_best(BLOCK: tl.constexpr):
    return Best(lanes(LOW, BLOCK), tl.full((BLOCK // WIDTH,), 2**31 - 1, tl.int32))


@triton.jit
def better(best, z, start, BLOCK: tl.constexpr):
    value, place = tl.max(z, 1, return_indices=True)
    word = start + tl.arange(0, BLOCK // WIDTH) * WIDTH + place
    take = (value > best.value) | ((value == best.value) & (word < best.word))
    return Best(tl.where(take, value, best.value), tl.where(take, word, best.word))


@triton.jit
def best_of(best):
    top = tl.max(best.value, 0)
    return Best(top, tl.min(tl.where(best.value == top, best.word, 2**31 - 1), 0))


class Statistics(NamedTuple):
    """What the first sweep over a row gives; None or of no meaning where not asked for."""

    student: Softmax
    hard_sum: tl.tensor  # the student's log_sum at temperature 1
    teacher: Softmax  # of the clean branch, at temperature 1, if there is a noisy one
    noisy: Softmax  # at temperature 1
    entropy: tl.tensor  # of the clean branch at temperature 1
    mate: tl.tensor  # the teacher's logit (Words.gap if STRAIGHT) where the student has its peak
    mean: tl.tensor  # under q, of teacher - student less what it is there
    student_best: Best
    teacher_best: Best


@triton.jit
def statistics(
    tiles,
    vocab,
    rate,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    MATE: tl.constexpr,
    MEAN: tl.constexpr,
    BEST: tl.constexpr,
    STRAIGHT: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    peak_q, sum_q, hard_sum = lanes(LOW, BLOCK), lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    mate, mean = lanes(LOW, BLOCK), lanes(0.0, BLOCK)
    peak_p, sum_p, moment = lanes(LOW, BLOCK), lanes(0.0, BLOCK), lanes(0.0, BLOCK)
    peak_n, sum_n = lanes(LOW, BLOCK), lanes(0.0, BLOCK)
    best_q, best_p = no_best(BLOCK), no_best(BLOCK)
    rate_p = rate
    if tiles.noisy is not None:
        rate_p = 1.0
    for start in range(0, vocab, BLOCK):
        w = words(tiles, start, vocab, DIFFERENCE, BLOCK)
        if tiles.student is not None:
            new = tl.maximum(peak_q, tl.max(w.student, 1))
            base = finite(new)
            e = powers(w.student, base, rate)
            keep = tl.exp((peak_q - base) * rate)
            if MATE:
                side = w.gap if STRAIGHT else w.teacher
                there = tl.max(tl.where(w.student == new[:, None], side, LOW), 1)
                moved = tl.where(new > peak_q, there, mate)
                if MEAN:
                    gap = side - finite(moved)[:, None]
                    shift = finite(mate) - finite(moved)
                    if not STRAIGHT:
                        gap -= w.student - base[:, None]
                        shift -= finite(peak_q) - base
                    both = (w.student > LOW) & (w.teacher > LOW)
                    mean = (mean + sum_q * shift) * keep + tl.sum(tl.where(both, e * gap, 0.0), 1)
                mate = moved
            sum_q = sum_q * keep + tl.sum(e, 1)
            if HARD:
                hard_sum = hard_sum * tl.exp(peak_q - base) + tl.sum(powers(w.student, base, 1.0), 1)
            peak_q = new
            if BEST:
                best_q = better(best_q, w.x * tiles.student.scale, start, BLOCK)
        new = tl.maximum(peak_p, tl.max(w.teacher, 1))
        base = finite(new)
        e = powers(w.teacher, base, rate_p)
        keep = tl.exp((peak_p - base) * rate_p)
        if ENTROPY:
            drop = tl.where(peak_p > LOW, peak_p - base, 0.0)
            terms = tl.where(e > 0, e * (w.teacher - base[:, None]), 0.0)
            moment = (moment + sum_p * drop) * keep + tl.sum(terms, 1)
        sum_p = sum_p * keep + tl.sum(e, 1)
        peak_p = new
        if tiles.noisy is not None:
            new = tl.maximum(peak_n, tl.max(w.noisy, 1))
            sum_n = sum_n * tl.exp(peak_n - finite(new)) + tl.sum(powers(w.noisy, finite(new), 1.0), 1)
            peak_n = new
        elif BEST:
            best_p = better(best_p, w.y * tiles.teacher.scale, start, BLOCK)

    student = None
    entropy = None
    noisy = None
    row_mate = 0.0
    row_mean = 0.0
    if tiles.student is not None:
        student = softmax(peak_q, sum_q, rate)
        hard_sum = tl.log(fold(hard_sum, peak_q, 1.0))
        if MATE:
            row_mate = tl.max(tl.where(peak_q == student.peak, mate, LOW), 0)
        if MEAN:
            shift = finite(mate) - finite(row_mate)
            if not STRAIGHT:
                shift -= finite(peak_q) - finite(student.peak)
            row_mean = fold(mean + sum_q * shift, peak_q, rate) / student.total
    teacher = softmax(peak_p, sum_p, rate_p)
    if ENTROPY:
        drop = tl.where(peak_p > LOW, peak_p - finite(teacher.peak), 0.0)
        entropy = teacher.log_sum - fold(moment + sum_p * drop, peak_p, 1.0) / teacher.total
    if tiles.noisy is not None:
        noisy = softmax(peak_n, sum_n, 1.0)
    return Statistics(student, hard_sum, teacher, noisy, entropy, row_mate, row_mean, best_of(best_q), best_of(best_p))
