"""What both launchers hand to their kernel."""

import math

import torch


def tile_choice(vocab, heavy=False):
    """Words per step, warps and compiler options; heavy where a row carries labels.

    8 words per thread are one 16-byte load of each bf16 tile. With 16 warps the assembler holds itself to 64 registers
    and spills. Left to itself it also spills in heavy kernels, to fit one more program on a multiprocessor; a limit of
    its own keeps it from that. Not measured on a GPU yet.
    """
    warps = 4 if vocab <= 8192 else 8
    # fused: one rounding less in the contrast; said, because Triton's default for it changes with 3.10
    choice = {"BLOCK": 256 * warps, "num_warps": warps, "enable_fp_fusion": True}
    if heavy and torch.version.hip is None:
        choice["maxnreg"] = 168
    return choice


def transforms(*sides):
    """scale and softcap of each side."""
    return [number for side in sides for number in (side.scale, side.softcap)]


def law_numbers(law):
    """alpha, threshold, and the logarithm of the plausibility or None for no set."""
    if law is None:
        return 0.0, 0.0, None
    return law.alpha, law.threshold, math.log(law.plausibility) if law.plausibility else None


def law_words(law):
    return (None,) * 4 if law is None else (law.weight, law.confidence, law.mode, law.outside)
