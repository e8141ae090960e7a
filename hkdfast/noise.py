"""Noise on images: how a vision-language model is made to lean on what its language already believes."""

import math
from functools import cache
from itertools import accumulate
from operator import mul

import torch

STEPS = 1000


@cache
def survival():
    """Share of the signal's variance left at each of VCD's 1000 steps.

    The schedule of VCD's published code (DAMO-NLP-SG/VCD, vcd_add_noise.py), which is not the one its paper states.
    """
    exponents = (-6 + 12 * i / (STEPS - 1) for i in range(STEPS))
    rates = ((0.5e-2 - 1e-5) / (1 + math.exp(-x)) + 1e-5 for x in exponents)
    return tuple(accumulate((1 - rate for rate in rates), mul))


def diffuse(images, step=500, *, sigma=None, generator=None):
    """Images under Gaussian noise, by VCD's diffusion schedule or with a given standard deviation.

    Args:
        images: (..., C, H, W) normalised pixels, as a processor's pixel_values, any float dtype. No gradient passes.
        step: 0 to 999 on VCD's schedule: sqrt(s) * images + sqrt(1 - s) * noise, where s falls from 1 to 0.08. VCD uses
            500 or 999. Not read when sigma is given.
        sigma: if given, images + sigma * noise instead: the signal keeps its strength. In units of normalised pixels.
        generator: a torch.Generator on the images' device, for reproducible noise.

    Returns:
        A new tensor like images. The noise is drawn in float32, so one generator gives one noise for every dtype.

    Raises:
        ValueError: on images that are not floating point, a step outside 0..999, or a sigma that is negative or not
            finite.

    Source: Leng et al., 2024 (arXiv:2311.16922) and its code.
    """
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        what = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images must be a floating point tensor, as a processor normalises them, got {what}")
    if sigma is None and step not in range(STEPS):
        raise ValueError(f"step must be a whole number from 0 to {STEPS - 1}, got {step}")
    if sigma is not None and not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma must be finite and not negative, got {sigma}")
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32, device=images.device)
    signal = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    if sigma is None:
        left = survival()[int(step)]
        return (left**0.5 * signal + (1 - left) ** 0.5 * noise).to(images.dtype)
    return (signal + sigma * noise).to(images.dtype)
