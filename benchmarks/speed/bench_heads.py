"""Loss and gradients from hidden states and heads. How to run: see bench_logits.py."""

from functools import cache, partial

import peers
import pytest
import torch
from shapes import DEVICE, HEADS, heads, relative

from hkdfast import Head, distill_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16} if DEVICE == "cpu" else {"bf16": torch.bfloat16}


def ours(divergence, hidden, weight, hidden_t, weight_t, tiles):
    same = weight if tiles == "difference" else weight_t  # differences need one head for both
    return distill_loss(Head(hidden, weight), Head(hidden_t, same), divergence, tiles=tiles)


WHO = {
    **{f"hkdfast, {tiles} tiles": partial(ours, tiles=tiles) for tiles in ("float32", "bfloat16", "difference")},
    **peers.HEADS,
}


@cache
def truth(divergence, shape, dtype):
    """Gradients of hidden states and weight in float64, on the CPU in a few row blocks."""
    hidden, weight, *teacher = (t.double().cpu() for t in heads(HEADS[shape], DTYPES[dtype]))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    distill_loss(Head(hidden, weight), Head(*teacher), divergence, backend="reference", memory=1 << 30).backward()
    return hidden.grad, weight.grad


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("who", WHO)
def bench_heads(benchmark, step, who, dtype, divergence, shape):
    tensors = heads(HEADS[shape], DTYPES[dtype])
    value, grads = step(partial(WHO[who], divergence), tensors, trained=2)
    errors = [relative(got.cpu(), exact) for got, exact in zip(grads, truth(divergence, shape, dtype), strict=True)]
    benchmark.extra_info |= {
        "who": who,
        "what": f"heads {dtype}, {divergence}",
        "shape": shape,
        "gradient error": max(errors),
        "loss": value.item(),
    }


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_gemms(benchmark, dtype, shape):
    """The floor: the four matrix products of loss and gradients, nothing else."""
    hidden, weight, hidden_t, weight_t = heads(HEADS[shape], DTYPES[dtype])
    logits, d_hidden = hidden @ weight.T, torch.empty_like(hidden)
    d_weight = torch.empty_like(weight)

    def once():
        torch.mm(hidden_t, weight_t.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, warmup_rounds=2, rounds=9, iterations=1)
    benchmark.extra_info |= {"who": "its GEMMs alone", "what": f"heads {dtype}", "shape": shape}
