"""diffuse: VCD's schedule, reproducible noise."""

import math
import re

import pytest
import torch

from hkdfast import diffuse

# sqrt of what is left of the signal's variance, and of the noise's share, computed from VCD's published code
SCHEDULE = {300: (0.981, 0.194), 500: (0.8630, 0.5052), 700: (0.593, 0.805), 999: (0.2850, 0.9585)}


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("step", SCHEDULE)
def test_the_schedule_of_vcd(step):
    signal, noise = SCHEDULE[step]
    zeros, ones = torch.zeros(3, 64, 64), torch.ones(3, 64, 64)
    only_noise, both = diffuse(zeros, step, generator=seeded()), diffuse(ones, step, generator=seeded())
    drawn = torch.randn(3, 64, 64, generator=seeded())
    digits = 5e-5 if step in (500, 999) else 5e-4
    torch.testing.assert_close(both - only_noise, torch.full_like(ones, signal), rtol=0, atol=digits)
    torch.testing.assert_close(only_noise, noise * drawn, rtol=0, atol=5 * digits)


def test_every_step_keeps_the_variance_and_loses_signal():
    ones = torch.ones(2, dtype=torch.float64)
    left = []
    for step in range(0, 1000, 37):
        parts = [diffuse(x, step, generator=seeded()) for x in (ones, 0 * ones)]
        share = (parts[0] - parts[1])[0].item()
        drawn = torch.randn(2, generator=seeded())
        assert share**2 + (parts[1] / drawn).pow(2)[0].item() == pytest.approx(1)
        left.append(share)
    assert left == sorted(left, reverse=True) and left[0] == pytest.approx(1, abs=1e-4)


def test_sigma_adds_noise_and_leaves_the_signal():
    images = torch.randn(2, 3, 8, 8)
    drawn = torch.randn(2, 3, 8, 8, generator=seeded())
    torch.testing.assert_close(diffuse(images, sigma=1.2, generator=seeded()), images + 1.2 * drawn)
    assert torch.equal(diffuse(images, sigma=0), images)


def test_one_generator_gives_one_noise():
    images = torch.randn(2, 3, 8, 8)
    generator = seeded()
    first, second = diffuse(images, generator=generator), diffuse(images, generator=generator)
    assert torch.equal(first, diffuse(images, generator=seeded())) and not torch.equal(first, second)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        got = diffuse(images.to(dtype), generator=seeded())
        exact = diffuse(images.to(dtype).double(), generator=seeded())
        assert got.dtype == dtype and (got - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_the_input_is_left_alone_and_gets_no_gradient():
    images = torch.randn(3, 4, 4, requires_grad=True)
    before = images.detach().clone()
    assert not diffuse(images).requires_grad and torch.equal(images, before)
    assert diffuse(images, 0).data_ptr() != images.data_ptr() != diffuse(images, sigma=0).data_ptr()


IMAGES = torch.zeros(3, 4, 4)
BAD = {
    "images must be a floating point tensor, as a processor normalizes them, got torch.uint8": (IMAGES.byte(), {}),
    "images must be a floating point tensor, as a processor normalizes them, got list": ([IMAGES], {}),
    "step must be a whole number from 0 to 999, got 1000": (IMAGES, {"step": 1000}),
    "step must be a whole number from 0 to 999, got -1": (IMAGES, {"step": -1}),
    "step must be a whole number from 0 to 999, got 0.5": (IMAGES, {"step": 0.5}),
    "step must be a whole number from 0 to 999, got nan": (IMAGES, {"step": math.nan}),
    "sigma must be finite and not negative, got -0.1": (IMAGES, {"sigma": -0.1}),
    "sigma must be finite and not negative, got inf": (IMAGES, {"sigma": math.inf}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    images, options = BAD[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        diffuse(images, **options)
