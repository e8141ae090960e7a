"""The memory that is announced, against what PyTorch's profiler counts."""

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hkdfast import Head, distill_loss
from hkdfast.engine.loss_memory import loss_memory

ROWS, VOCAB = 64, 4096


def peak(function):
    """Most bytes that are allocated at once while a function runs, by torch's own allocator."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def head(width, dtype, trained, frozen=False):
    hidden, weight = torch.randn(ROWS, width).to(dtype), torch.randn(VOCAB, width).to(dtype)
    return Head(hidden.requires_grad_(trained), weight.requires_grad_(trained and not frozen))


def cleared(student, loss):
    loss.backward()
    student.hidden.grad = student.weight.grad = None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tile_memory", [None, 1_500_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_loss_takes_is_what_is_counted(dtype, tile_memory, frozen):
    student, teacher = head(24, dtype, True, frozen), head(40, dtype, False)
    options = {"tile_memory": tile_memory, "return_metrics": True, "backend": "cpu"}
    counted = peak(lambda: cleared(student, distill_loss(student, teacher, **options)[0]))
    said = loss_memory(student, teacher, ROWS, ROWS, **options).fused
    assert counted * 0.99 <= said <= counted * (1.05 if dtype == torch.float32 else 1.3)  # casts: at most so


def test_the_hidden_states_that_are_given_may_be_few():
    student, teacher = head(24, torch.float32, True), head(40, torch.float32, False)
    few = Head(student.hidden[:1].detach().requires_grad_(), student.weight), Head(teacher.hidden[:1], teacher.weight)
    one, other = (loss_memory(*heads, ROWS, ROWS) for heads in ((student, teacher), few))
    assert one == other
    assert loss_memory(*few, 2 * ROWS, ROWS).fused > one.fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_eager_pytorch_takes_at_least_what_is_said_and_little_more(divergence, dtype):
    student, teacher = head(24, dtype, True), head(40, dtype, False)

    def eager():
        q, p = ((each.hidden @ each.weight.T).float().log_softmax(-1) for each in (student, teacher))
        one, other = (q, p) if divergence == "forward_kl" else (p, q)
        cleared(student, F.kl_div(one, other, reduction="none", log_target=True).sum(-1).mean())

    said = loss_memory(student, teacher, 1, ROWS, divergence).eager
    assert said * 0.99 <= peak(eager) <= 1.45 * said
