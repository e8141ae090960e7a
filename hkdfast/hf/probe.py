"""What a model does to its logits behind its head, measured: logits become softcap * tanh(scale * logits / softcap).

The slope at 0 is the scale, the limit is the softcap. The probe is float64: where the model computes in the dtype that
it gets, both come out to the last bits. Where it casts to less, they are known to that dtype's rounding; of the numbers
in its configuration that lie within, or whose reciprocals do, the nearest is the one that the model computes with.
"""

import math
import warnings

import torch

LEVELS = (-4, 15, -2, 14, 0, 12, 1, 10, 2, 8, 3, 6, 4, 5)  # exponents of two: from 1/16 to the largest of float16
LARGE = 1000.0
MANTISSAS = 128  # 1 to 2 by 8 bits: no dtype rounds a point


def points(words, device):
    """(words,) logits to probe with, of all sizes and both signs, the first of each size a power of two. float64, where
    the device has it."""
    place = torch.arange(words)
    turn, level = place // len(LEVELS), place % len(LEVELS)
    size = (1 + turn * 37 % MANTISSAS / MANTISSAS) * 2.0 ** torch.tensor(LEVELS)[level]
    sign = 1 - 2 * ((turn + level) % 2)
    return (sign * size).to(device, torch.float32 if device.type == "mps" else torch.float64)


def numbers(config):
    """All positive numbers in a configuration and those within it."""
    found, rest = set(), [config.to_dict()]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            found.add(float(value))
    return found


def measure(x, y, dtype, known):
    """(scale, softcap) by which the logits x have become y.

    Args:
        x: (V,) from `points`.
        y: (V,) what the model made of them.
        dtype: of the model's own logits, in which it may have computed.
        known: set of numbers of its configuration.

    Raises:
        ValueError: if no scale and softcap explain y, with what was measured.
    """
    x, y = x.double().cpu(), y.double().cpu()
    beyond = (y == x.sign() * math.inf) & (x.abs() > LARGE)
    if dtype == torch.float16 and not beyond.all():  # a scale above 1 takes the largest points out of its range
        x, y = x[~beyond], y[~beyond]
    if not y.isfinite().all():
        raise ValueError(f"{(~y.isfinite()).sum()} of {len(y)} logits are not finite")
    precisions = [t for t in (dtype, torch.float32) if torch.equal(y.to(t).double(), y)]
    rounding = torch.finfo(precisions[0] if precisions else torch.float64).eps / 2
    ratio, softcap = y / x, None
    slack = 2 * rounding
    if ratio.min() <= 0 or spread(ratio, slack)[0] > spread(ratio, slack)[1]:
        limit = y.abs().max().item()
        softcap = nearest(limit, limit * (1 - 4 * rounding), limit * (1 + 4 * rounding), known)
        slack = 8 * rounding
    curved = y.abs() < (math.inf if softcap is None else 0.7 * softcap)
    slopes = slope(y, x, softcap)[curved]
    first = slopes[: len(LEVELS)].median().item() if len(slopes) else math.nan
    low, high = spread(slopes, slack) if len(slopes) else (math.nan, math.nan)
    scale = nearest(first, low, high, known | {1.0} | {1 / number for number in known})
    error = (transformed(x, scale, softcap) - y).abs() / transformed(x, scale, softcap).abs()
    worst = error.argmax().item()
    if not (low <= high and scale > 0 and error[worst] <= 8 * rounding):
        raise ValueError(
            f"the logit 1 becomes {y[x == 1].mean():.6g}, the largest {y.max():.6g}, the least {y.min():.6g}; by scale "
            f"{scale:.6g} and softcap {softcap if softcap is None else round(softcap, 6)} the logit {x[worst]:.6g} of "
            f"token {worst} would become {transformed(x, scale, softcap)[worst]:.6g}, but becomes {y[worst]:.6g}"
        )
    if high - low > 1e-6 * scale and not {scale, 1 / scale} & (known | {1.0}):
        warnings.warn(
            f"the scale of the logits, {scale:.6g}, is measured to {(high - low) / scale:.1g} of it: the model rounds "
            "its logits, and no number of its configuration agrees",
            stacklevel=2,
        )
    return scale, softcap


def slope(y, x, softcap):
    return y / x if softcap is None else softcap * torch.atanh((y / softcap).clamp(-1, 1)) / x


def spread(slopes, slack):
    """(low, high) that hold every slope, each known to a relative error; low > high if no slope fits all."""
    return (slopes * (1 - slack)).max().item(), (slopes * (1 + slack)).min().item()


def nearest(value, low, high, candidates):
    """The candidate within low and high that is nearest to a value; the value itself, if there is none."""
    return min((c for c in candidates if low <= c <= high), key=lambda c: abs(c - value), default=value)


def transformed(x, scale, softcap):
    return scale * x if softcap is None else softcap * torch.tanh(scale * x / softcap)
