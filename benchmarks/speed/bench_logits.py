"""Loss and gradient from logits that exist.

Run: pytest benchmarks/speed --benchmark-group-by=param:shape --benchmark-json=benchmarks/speed/results/NAME.json
"""

import peers
import pytest
import torch
from shapes import DEVICE, LOGITS, logits, relative

from hkdfast import distill_loss

DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon")


def ours(divergence, student, teacher):
    return distill_loss(student, teacher, divergence)


@pytest.mark.parametrize("shape", LOGITS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("who", ["hkdfast", *peers.LOGITS])
def bench_logits(benchmark, step, who, divergence, shape):
    student, teacher = logits(LOGITS[shape], torch.bfloat16)
    loss = {"hkdfast": ours, **peers.LOGITS}[who]
    value, (grad,) = step(lambda *tensors: loss(divergence, *tensors), (student, teacher), trained=1)

    some = slice(0, 16)  # rows are alike: float64 of all of them would take the time of a hundred steps
    exact = student[some].double().requires_grad_()
    distill_loss(exact, teacher[some].double(), divergence, reduction="sum", backend="reference").backward()
    n, vocab = student.shape
    benchmark.extra_info |= {
        "who": who,
        "what": f"logits bf16, {divergence}",
        "shape": shape,
        "gradient error": relative(grad[some] * n, exact.grad),
        "loss": value.item(),
        "GB/s of the least traffic": 6 * n * vocab / benchmark.stats["median"] / 1e9,
    }


@pytest.mark.parametrize("shape", LOGITS)
def bench_copy(benchmark, shape):
    """The roof: two streams read, one written, nothing computed. A copy moves two of the three."""
    student, _ = logits(LOGITS[shape], torch.bfloat16)
    out = torch.empty_like(student)

    def once():
        out.copy_(student)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, warmup_rounds=2, rounds=9, iterations=3)
    benchmark.extra_info |= {"who": "copy", "what": "copy bf16", "shape": shape}
