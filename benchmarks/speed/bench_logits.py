"""Loss and gradient from logits that exist, and the contrast of a step of decoding.

Run: pytest benchmarks/speed --benchmark-group-by=param:shape --benchmark-json=benchmarks/speed/results/NAME.json
"""

from functools import partial

import peers
import pytest
import torch
from shapes import BACKENDS, DECODING, DEVICE, LOGITS, VOCABULARIES, logits, relative

from hkdfast import DIVERGENCES, contrast, distill_loss, purify

TIMED = tuple(DIVERGENCES) if DEVICE == "cuda" else ("reverse_kl", "forward_kl", "jensen_shannon")


def ours(divergence, student, *teacher, backend=None, **options):
    teacher = purify(*teacher, 1.5) if len(teacher) == 2 else teacher[0]
    return distill_loss(student, teacher, divergence, backend=backend, **options)


def by_backend(function):
    """{name: function} of hkdfast: where several backends run, each of them."""
    if len(BACKENDS) == 1:
        return {"hkdfast": function}
    return {f"hkdfast, {name}": partial(function, backend=name) for name in BACKENDS}


def cells(shapes, divergences, who):
    """(shape, divergence, who), what is compared side by side, whoever has not the divergence left out."""
    return [(shape, d, one) for shape in shapes for d in divergences for one in who if peers.knows(one, d)]


def measure(step, tensors, loss, divergence, **info):
    iterations = 5 if DEVICE == "cuda" else 1  # between two events, which take a few microseconds themselves
    value, (grad,) = step(partial(loss, divergence), tensors, 1, iterations=iterations, **info)
    some = slice(0, 16)  # rows are alike: float64 of all of them would take the time of a hundred steps
    exact, *teacher = (t[some].double() for t in tensors)
    ours(divergence, exact.requires_grad_(), *teacher, reduction="sum", backend="reference").backward()
    return {"gradient error": relative(grad[some].double() * len(grad), exact.grad), "loss": value.item()}


ROWS = {**by_backend(ours), **peers.LOGITS}


@pytest.mark.parametrize("shape, divergence, who", cells(LOGITS, TIMED, ROWS))
def bench_logits(benchmark, step, shape, divergence, who):
    n, vocab = LOGITS[shape]
    info = {"who": who, "what": f"logits bf16, {divergence}", "shape": shape}
    benchmark.extra_info |= measure(step, logits((n, vocab), torch.bfloat16), ROWS[who], divergence, **info)
    benchmark.extra_info["GB/s of the least traffic"] = 6 * n * vocab / benchmark.stats["median"] / 1e9


@pytest.mark.parametrize("shape, divergence, who", cells(VOCABULARIES, ("reverse_kl", "jensen_shannon"), ROWS))
def bench_vocabulary(benchmark, step, shape, divergence, who):
    """As many words in rows of every length."""
    info = {"who": who, "what": f"vocabulary, logits bf16, {divergence}", "shape": f"{shape[1]} words"}
    benchmark.extra_info |= measure(step, logits(shape, torch.bfloat16), ROWS[who], divergence, **info)
    benchmark.extra_info |= {"rows": shape[0], "vocabulary": shape[1]}
    benchmark.extra_info["GB/s of the least traffic"] = 6 * shape[0] * shape[1] / benchmark.stats["median"] / 1e9


PURIFIED = {**by_backend(ours), **peers.PURIFIED}


@pytest.mark.parametrize("shape, divergence, who", cells(LOGITS, ("reverse_kl",), PURIFIED))
def bench_seed(benchmark, step, shape, divergence, who):
    """SEED's rows: three tiles are read, one is written."""
    n, vocab = LOGITS[shape]
    info = {"who": who, "what": f"SEED logits bf16, {divergence}", "shape": shape}
    tensors = logits((n, vocab), torch.bfloat16, branches=3)
    benchmark.extra_info |= measure(step, tensors, PURIFIED[who], divergence, **info)
    benchmark.extra_info["GB/s of the least traffic"] = 8 * n * vocab / benchmark.stats["median"] / 1e9


def our_contrast(clean, noisy, backend=None):
    return contrast(purify(clean, noisy, 1.0, plausibility=0.1, outside="drop"), backend=backend)


CONTRAST = {**by_backend(our_contrast), **peers.CONTRAST}


@pytest.mark.parametrize("shape", DECODING)
@pytest.mark.parametrize("who", CONTRAST)
@torch.no_grad()
def bench_contrast(benchmark, timed, who, shape):
    """A step of contrastive decoding: float32 log-probabilities from two bf16 rows each."""
    clean, noisy = logits(shape, torch.bfloat16)
    info = {"who": who, "what": "contrast bf16", "shape": f"{shape[0]} rows x {shape[1]}"}
    got = timed(lambda: CONTRAST[who](clean, noisy), iterations=20, **info)
    exact = our_contrast(clean.double(), noisy.double(), backend="reference")
    assert torch.equal(got.isfinite(), exact.isfinite())
    benchmark.extra_info["error"] = (got - exact)[exact.isfinite()].abs().max().item()


@pytest.mark.parametrize("shape", LOGITS)
def bench_copy(timed, shape):
    """The roof: two streams read, one written, nothing computed. A copy moves two of the three."""
    student, _ = logits(LOGITS[shape], torch.bfloat16)
    out = torch.empty_like(student)
    timed(lambda: out.copy_(student), iterations=3, who="copy", what="copy bf16", shape=shape)
