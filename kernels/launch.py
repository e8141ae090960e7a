"""What both launchers hand to their kernel."""

import math


def tile_choice(vocab):
    """Words per step and warps: 8 words per thread are one 16-byte load of each bf16 tile. With 16 warps the assembler
    holds itself to 64 registers and spills; few warps keep more rows in flight than the cache holds of their tails.
    Not measured on a GPU yet."""
    warps = 4 if vocab <= 8192 else 8
    return {"BLOCK": 256 * warps, "num_warps": warps}


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
