"""Noise on images, which makes a vision-language model rely on its language prior."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from operator import mul

import torch

STEPS = 1000


@cache
def survival() -> tuple[float, ...]:
    """Remaining fraction of the signal's variance at each of VCD's 1000 steps.

    The schedule of VCD's published code (DAMO-NLP-SG/VCD, vcd_add_noise.py); the paper states another one.
    """
    exponents = (-6 + 12 * i / (STEPS - 1) for i in range(STEPS))
    rates = ((0.5e-2 - 1e-5) / (1 + math.exp(-x)) + 1e-5 for x in exponents)
    return tuple(accumulate((1 - rate for rate in rates), mul))


def diffuse(
    images: torch.Tensor,
    step: int = 500,
    *,
    sigma: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Images under Gaussian noise, by VCD's diffusion schedule or with a given standard deviation.

    Args:
        images: (..., C, H, W) normalized pixels, as a processor's pixel_values, any float dtype. Get no gradient.
        step: 0 to 999 of VCD's schedule: sqrt(s) * images + sqrt(1 - s) * noise, where s falls from 1 to 0.08. VCD uses
            500 or 999. Ignored if sigma is given.
        sigma: if given, the result is images + sigma * noise: the signal is not scaled. In normalized pixels.
        generator: a torch.Generator on the images' device, for reproducible noise.

    Returns:
        A new tensor like images. The noise is drawn in float32, so one generator gives one noise for every dtype.

    Raises:
        ValueError: on images that are not floating point, a step outside 0..999, or a sigma that is negative or not
            finite.

    Source: Leng et al., 2024 (arXiv:2311.16922) and its code.
    """
    check_noise(step, sigma)
    check_images("images", images)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32, device=images.device)
    return blend(images, noise, step, sigma)


def check_images(name: str, images: object) -> None:
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        what = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"{name} must be a floating point tensor, as a processor normalizes them, got {what}")


def check_noise(step: int, sigma: float | None) -> None:
    if sigma is None and step not in range(STEPS):
        raise ValueError(f"step must be a whole number from 0 to {STEPS - 1}, got {step}")
    if sigma is not None and not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma must be finite and not negative, got {sigma}")


def blend(images: torch.Tensor, noise: torch.Tensor, step: int, sigma: float | None) -> torch.Tensor:
    """Images under given noise, float32 of their shape."""
    signal = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    if sigma is None:
        left = survival()[int(step)]
        return (left**0.5 * signal + (1 - left) ** 0.5 * noise).to(images.dtype)
    return (signal + sigma * noise).to(images.dtype)


def normal(shape: Sequence[int], seed: int, device: torch.device | None = None) -> torch.Tensor:
    """Standard normal float32 values, each of which depends only on the seed and its own indices.

    The values of a torch.Generator depend on how many are drawn at once. Here normal((3, 8, 8), s) is the corner of
    normal((5, 16, 9), s): padding does not change the noise, and GPU and CPU agree up to rounding.

    SplitMix64 (Steele et al., 2014) along each dimension in turn, then Box and Muller's transform of 2 x 24 bits.
    """
    key = torch.tensor(seed, dtype=torch.int64, device=device)
    for size in shape:
        key = scramble(key[..., None] + GAMMA * torch.arange(1, size + 1, device=device))
    radius = ((key >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2**-24).log_().mul_(-2).sqrt_()
    angle = ((key >> 8) & 0xFFFFFF).float().mul_(2 * math.pi * 2**-24)
    return radius.mul_(angle.cos_())


# SplitMix64's constants as signed int64
GAMMA, *FACTORS = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def scramble(key: torch.Tensor) -> torch.Tensor:
    """SplitMix64's mixing of int64 numbers, in place."""
    for shift, factor in zip((30, 27), FACTORS, strict=True):
        key.bitwise_xor_((key >> shift) & (2 ** (64 - shift) - 1)).mul_(factor)  # & for a shift without the sign
    return key.bitwise_xor_((key >> 31) & (2**33 - 1))
