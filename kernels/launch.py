"""What both launchers hand to their kernel."""

import math

import torch


def tile_choice(tiles, full=False):
    """Words per step, warps and compiler options for tiles of one shape (None: no such tile).

    8 words per thread are one 16-byte load of each bf16 tile. With 16 warps the assembler holds itself to 64 registers
    and spills. Left to itself it also spills the kernels that need most, to fit one more program on a multiprocessor:
    the full ones, with labels or a floor, and those that read word by word because a size is odd. Not measured on a
    GPU yet.
    """
    tiles = [tile for tile in tiles if tile is not None]
    vocab = tiles[0].shape[1]
    warps = 4 if vocab <= 8192 else 8
    # fused: one rounding less in the contrast; said, because Triton's default for it changes with 3.10
    choice = {"BLOCK": 256 * warps, "num_warps": warps, "enable_fp_fusion": True}
    odd = any(size % 16 for size in (vocab, *(tile.stride(0) for tile in tiles)))
    if (full or odd) and torch.version.hip is None:
        choice["maxnreg"] = 255
    return choice


def transforms(*sides):
    """scale and softcap of each side."""
    # floats all: an integer 1 would become a constant of another kernel
    return [None if number is None else float(number) for side in sides for number in (side.scale, side.softcap)]


def contrast_numbers(law):
    """alpha, threshold, and the logarithm of the plausibility or None for no set."""
    if law is None:
        return 0.0, 0.0, None
    return float(law.alpha), float(law.threshold), math.log(law.plausibility) if law.plausibility else None


def contrast_words(law):
    return (None,) * 4 if law is None else (law.schedule, law.confidence, law.mode, law.outside)
