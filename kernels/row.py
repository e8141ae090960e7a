"""What the sweeps over a row are made of.

A block is (lanes, 8) words. The eight neighbors of a lane are read by one thread as one or two 16-byte loads and
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
    """A tile that is not there has the pointer None: Triton before 3.7 takes no None in a tile's place."""

    student: Tile  # not there when decoding
    teacher: Tile
    noisy: Tile  # not there without a contrast


class Words(NamedTuple):
    """A block of one row; without a tile, 0."""

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
    x = 0.0
    student = 0.0
    noisy = 0.0
    gap = 0.0
    y = numbers(tiles.teacher, col, live)
    if tiles.student.ptr is not None:
        x = numbers(tiles.student, col, live)
        student = masked(logit(x, tiles.student), live, tiles.student)
    if DIFFERENCE:
        gap = y * tiles.teacher.scale + (tiles.teacher.scale - tiles.student.scale) * x
        y += x
    teacher = masked(logit(y, tiles.teacher), live, tiles.teacher)
    if tiles.noisy.ptr is not None:
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
    x = 0.0
    student = 0.0
    noisy = 0.0
    y = number_at(tiles.teacher, word)
    if tiles.student.ptr is not None:
        x = number_at(tiles.student, word)
        student = logit(x, tiles.student)
    if DIFFERENCE:
        y += x
    if tiles.noisy.ptr is not None:
        noise = number_at(tiles.noisy, word)
        if DIFFERENCE:
            noise += x
        noisy = logit(noise, tiles.noisy)
    return Words(x, y, student, logit(y, tiles.teacher), noisy, 0.0)


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
