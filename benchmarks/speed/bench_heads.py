"""Loss and gradients from hidden states and heads. How to run: see bench_logits.py."""

from functools import lru_cache, partial

import peers
import pytest
import torch
from bench_logits import by_backend
from shapes import APART, DEVICE, ERRORS, HEADS, TINY, TOKENS, heads, relative

from hkdfast import Head, distill_loss

DTYPES = {"bf16": torch.bfloat16} if DEVICE == "cuda" or TINY else {"fp32": torch.float32, "bf16": torch.bfloat16}
TIMED = ("forward_kl", "reverse_kl", "jensen_shannon") if DEVICE == "cuda" else ("reverse_kl", "jensen_shannon")
MORE = ("skew_kl", "skew_reverse_kl", "total_variation")  # on a GPU, at shape A
NARROW = ("bfloat16", "difference")
TRAINED = ("trained", "frozen") if DEVICE == "cuda" or TINY else ("trained",)  # of the heads


def ours(divergence, hidden, weight, hidden_t, weight_t, precision="float32", backend=None):
    same = weight if precision == "difference" else weight_t  # differences need one head for both
    return distill_loss(Head(hidden, weight), Head(hidden_t, same), divergence, precision=precision, backend=backend)


WHO = {
    **{f"{name}, float32 tiles": loss for name, loss in by_backend(ours).items()},
    **{f"hkdfast, {tiles} tiles": partial(ours, precision=tiles) for tiles in NARROW},
    **peers.HEADS,
}


@lru_cache(maxsize=1)  # on a GPU of 141 GB one truth at a time leaves the peers their room
def truth(divergence, size, dtype, trained, apart=0.1, spread=3.0):
    """Gradients of hidden states and weight in float64, in a few row blocks."""
    hidden, weight, *teacher = (t.double() for t in heads(size, DTYPES[dtype], apart, spread))
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained == 2)]
    loss = distill_loss(Head(*leaves), Head(*teacher), divergence, backend="reference", tile_memory=2 << 30)
    loss.backward()
    return loss.item(), [leaf.grad for leaf in leaves[:trained]]


def cells():
    """(shape, dtype, head, divergence, who); who comes last, so that a truth is made once."""
    for shape, (_, h_student, h_teacher, _) in HEADS.items():
        for dtype in DTYPES:
            for head in TRAINED:
                more = MORE if DEVICE == "cuda" and shape.startswith("A") and head == "trained" else ()
                for divergence in (*TIMED, *more):
                    for who in WHO:
                        narrow = who.startswith("hkdfast") and "float32" not in who
                        if narrow and (head == "frozen" or divergence in more):
                            continue
                        if h_student != h_teacher and "difference" in who or not peers.knows(who, divergence):
                            continue
                        yield pytest.param(
                            shape, dtype, head, divergence, who, id=f"{shape}-{dtype}-{head}-{divergence}-{who}"
                        )


def measure(step, who, dtype, divergence, size, trained, apart=0.1, spread=3.0, **info):
    tensors = heads(size, DTYPES[dtype], apart, spread)
    value, grads = step(partial(WHO[who], divergence), tensors, trained, who=who, **info)
    loss, exact = truth(divergence, size, dtype, trained, apart, spread)
    errors = [relative(got, true) for got, true in zip(grads, exact, strict=True)]
    return {"gradient error": max(errors), "loss": value.item(), "float64 loss": loss}


@pytest.mark.parametrize("shape, dtype, head, divergence, who", list(cells()))
def bench_heads(benchmark, step, who, dtype, head, divergence, shape):
    what = f"heads {dtype}, {divergence}" + (", frozen head" if head == "frozen" else "")
    trained = 2 if head == "trained" else 1
    benchmark.extra_info |= measure(step, who, dtype, divergence, HEADS[shape], trained, what=what, shape=shape)


@pytest.mark.parametrize("who", [who for who in WHO if who.endswith("float32 tiles") or who in peers.HEADS])
@pytest.mark.parametrize("shape", TOKENS)
def bench_tokens(benchmark, step, who, shape):
    """Fewer and more rows; the gradients are those of bench_heads."""
    dtype = "bf16"
    info = {"who": who, "what": f"tokens, heads {dtype}, reverse_kl", "shape": f"{shape[0]} rows"}
    step(partial(WHO[who], "reverse_kl"), heads(shape, DTYPES[dtype]), 2, **info)
    benchmark.extra_info["rows"] = shape[0]


@pytest.mark.parametrize("who", WHO)  # above the others it changes first, so that a truth is made once
@pytest.mark.parametrize("divergence", TIMED)
@pytest.mark.parametrize("shape, apart", [(f"apart {apart}", apart) for apart in APART])
def bench_errors(benchmark, step, who, shape, apart, divergence):
    """From far to near convergence: the error is what counts here, the time of one small step says little."""
    what = f"error, heads bf16, {divergence}"
    info = dict(what=what, shape=shape, apart=apart, rounds=1)
    benchmark.extra_info |= measure(step, who, "bf16", divergence, ERRORS, 2, spread=6.0, **info)


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", TRAINED)
def bench_gemms(timed, head, dtype, shape):
    """The floor: the matrix products of loss and gradients, nothing else."""
    hidden, weight, hidden_t, weight_t = heads(HEADS[shape], DTYPES[dtype])
    logits, d_hidden = hidden @ weight.T, torch.empty_like(hidden)
    d_weight = torch.empty_like(weight)

    def once():
        torch.mm(hidden_t, weight_t.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        if head == "trained":
            torch.mm(logits.T, hidden, out=d_weight)

    what = f"heads {dtype}" + (", frozen head" if head == "frozen" else "")
    timed(once, who="its GEMMs alone", what=what, shape=shape)
