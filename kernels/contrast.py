"""Purified log-probabilities for decoding: three sweeps, 16 bytes per word of two bf16 tiles and a float32 result."""

import torch
import triton
import triton.language as tl

from .contrast_rule import Branches, clean_only_offset, confidence, contrast_weight, contrasted
from .launch import contrast_numbers, contrast_words, tile_choice, transforms
from .row import Softmax, Tile, Tiles, columns, log_prob, narrow, word_at, words
from .sweeps import purified, statistics


@triton.jit
def contrast_kernel(
    clean_ptr,  # (N, V)
    noisy_ptr,  # (N, V)
    alpha_ptr,  # (N,) or None
    labels_ptr,  # (N,) int64 or None
    out_ptr,  # (N, V)
    clean_stride,
    noisy_stride,
    out_stride,
    vocab,
    clean_scale,
    clean_cap,  # or None
    noisy_scale,
    noisy_cap,  # or None
    rate,  # 1 / temperature
    alpha,
    threshold,
    log_plausibility,  # log of the plausibility beta, or None
    SCHEDULE: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    MODE: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tiles = Tiles(
        Tile(None, None, None),
        Tile(clean_ptr + row * clean_stride, clean_scale, clean_cap),
        Tile(noisy_ptr + row * noisy_stride, noisy_scale, noisy_cap),
    )
    target = 0.0
    if CONFIDENCE == "target":
        target = word_at(tiles, tl.maximum(tl.load(labels_ptr + row), 0), False).teacher
    if SCHEDULE == "per_row":
        alpha = tl.load(alpha_ptr + row).to(tl.float32)
    found = statistics(
        tiles, vocab, rate, Branches(None, None, None, None, None, None),
        False, False, True, CONFIDENCE == "entropy", True, False, False, False, False, False, MODE, False, False, BLOCK,
    )  # fmt: skip
    certainty = confidence(vocab, found.clean, found.entropy, target, CONFIDENCE)
    a = contrast_weight(certainty, found.clean, found.noisy, alpha, threshold, SCHEDULE)
    offset = clean_only_offset(found.clean.log_sum, found.noisy.log_sum, a, MODE)
    teacher, shift, _, _, _ = purified(
        tiles, vocab, rate, Softmax(0.0, 0.0, 0.0), 0,
        Branches(found.clean, found.noisy, a, offset, log_plausibility, 0.0),
        MODE, OUTSIDE, False, False, False, False, BLOCK,
    )  # fmt: skip
    branches = Branches(found.clean, found.noisy, a, offset, log_plausibility, shift)
    for start in range(0, vocab, BLOCK):
        z = contrasted(words(tiles, start, vocab, False, BLOCK), branches, MODE, OUTSIDE)
        col = columns(start, BLOCK)
        log_p = log_prob(z, teacher, rate)
        tl.store(out_ptr + row * out_stride + col, narrow(log_p, out_ptr.dtype.element_ty), col < vocab)


def arguments(objective, clean, noisy, alpha, labels, out):
    """What contrast_kernel is launched with, in its order."""
    return (
        clean,
        noisy,
        alpha,
        labels,
        out,
        clean.stride(0),
        noisy.stride(0),
        out.stride(0),
        clean.shape[1],
        *transforms(objective.teacher, objective.noisy),
        1 / objective.temperature,
        *contrast_numbers(objective.law),
        *contrast_words(objective.law),
    )


def contrast(objective, clean, noisy, alpha, labels, out):
    """Purified log-probabilities; `hkdfast.ops.reference.contrast` states the contract."""
    given = arguments(objective, clean, noisy, alpha, labels, out)
    with torch.cuda.device_of(clean):
        contrast_kernel[(len(clean),)](*given, **tile_choice((clean, noisy, out)))
