"""Three models that learn from each other over one batch, every head trained. How to run: see bench_logits.py.

One loop makes each tile once: 9 products through the heads. `distill_loss` for each pair makes 24 (6 pairs of 3S + T);
15 would be enough for one call per student that makes all three tiles.
"""

from functools import lru_cache, partial

import peers
import pytest
import torch
import torch.nn.functional as F
from bench_logits import by_backend
from shapes import COUPLED, DEVICE, TINY, draw, relative
from torch.utils.flop_counter import FlopCounterMode

from hkdfast import Edge, Head, coupled_loss, distill_loss

DTYPES = {"bf16": torch.bfloat16} if DEVICE == "cuda" or TINY else {"fp32": torch.float32, "bf16": torch.bfloat16}
TIMED = ("forward_kl", "jensen_shannon") if DEVICE == "cuda" else ("forward_kl",)
PAIRS = [(i, j) for i in range(3) for j in range(3) if i != j]


def inputs(shape, dtype, spread=3.0):
    """hidden, weight of each of the three, as `shapes.heads` draws them; models of one size are near each other."""
    rows, widths, vocab = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    tensors, first = [], {}
    for width in widths:
        weight = draw(vocab, width, generator=generator) * (spread / width**0.5)
        hidden = draw(rows, width, generator=generator)
        if width in first:
            hidden, weight = first[width][0] + 0.1 * hidden, first[width][1].clone()
        first.setdefault(width, (hidden, weight))
        tensors += [hidden.to(dtype), weight.to(dtype)]
    return tensors


def heads(tensors):
    return [Head(*tensors[i : i + 2]) for i in (0, 2, 4)]


def ours(divergence, *tensors, precision="float32", backend=None, **options):
    table = [[Edge(1.0, divergence) if i != j else None for j in range(3)] for i in range(3)]
    return coupled_loss(heads(tensors), table, precision=precision, backend=backend, **options)


def pairwise(divergence, *tensors):
    sides = heads(tensors)
    return sum(distill_loss(sides[i], Head(sides[j].hidden.detach(), sides[j].weight.detach()), divergence)
               for i, j in PAIRS)  # fmt: skip


def eager(divergence, *tensors):
    """Float32 log-probabilities of all three at once, a teacher's without a gradient."""
    logs = [F.log_softmax(F.linear(*tensors[i : i + 2]).float(), -1) for i in (0, 2, 4)]
    return sum(peers.between(divergence, logs[i], logs[j].detach()) for i, j in PAIRS)


WHO = {
    **{f"{name}, float32 tiles": loss for name, loss in by_backend(ours).items()},
    "hkdfast, bfloat16 tiles": partial(ours, precision="bfloat16"),
    "pairwise distill_loss": pairwise,
    "eager": eager,
} | ({} if TINY else {"torch.compile": torch.compile(eager, dynamic=False)})


@lru_cache(maxsize=1)  # on a GPU one truth at a time leaves the others their room
def truth(divergence, shape, dtype):
    leaves = [t.double().requires_grad_() for t in inputs(shape, DTYPES[dtype])]
    ours(divergence, *leaves, backend="reference", tile_memory=2 << 30).backward()
    return [leaf.grad for leaf in leaves]


def products(loss, divergence, tensors):
    """Matrix products of loss and gradients, in those of one head of the mean size."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with FlopCounterMode(display=False) as counter:
        loss(divergence, *leaves).backward()
    one = sum(2 * x.shape[0] * x.shape[1] * w.shape[0] for x, w in zip(leaves[::2], leaves[1::2], strict=True)) / 3
    return counter.get_total_flops() / one


@pytest.mark.parametrize(
    "shape, dtype, divergence, who",
    [(shape, dtype, divergence, who) for shape in COUPLED for dtype in DTYPES for divergence in TIMED for who in WHO],
)
def bench_coupled(benchmark, step, who, divergence, dtype, shape):
    tensors = inputs(COUPLED[shape], DTYPES[dtype])
    info = {"who": who, "what": f"coupled {dtype}, three heads, {divergence}", "shape": shape}
    _, grads = step(partial(WHO[who], divergence), tensors, len(tensors), **info)
    if who != "torch.compile":
        benchmark.extra_info["products"] = round(products(WHO[who], divergence, tensors), 2)
    exact = truth(divergence, COUPLED[shape], dtype)
    benchmark.extra_info["gradient error"] = max(map(relative, grads, exact))


@pytest.mark.parametrize("shape", COUPLED)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_coupled_gemms(timed, dtype, shape):
    """The floor: nine products, nothing else."""
    tensors = inputs(COUPLED[shape], DTYPES[dtype])
    logits = tensors[0] @ tensors[1].T
    outs = [torch.empty_like(t) for t in tensors]

    def once():
        for i in (0, 2, 4):
            hidden, weight = tensors[i : i + 2]
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=outs[i])
            torch.mm(logits.T, hidden, out=outs[i + 1])

    timed(once, who="its GEMMs alone", what=f"coupled {dtype}", shape=shape)
