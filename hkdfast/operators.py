"""The tile loop as a torch.library operator: opaque to torch.compile, with a fake implementation.

Eager calls go to tiles.run itself, so that FLOP counters and profilers see its matrix products.
"""

import torch
from torch import Tensor

from . import tiles
from .objective import METRICS, Objective


def autograd_keys():
    """Autograd works inside: an operator switches it off, and the reference backend differentiates by it."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(included, excluded)


def run(call, student, weight, wants, metrics):
    """tiles.run through the operator."""
    x, head, bias = student
    text, numbers = call.objective.encode(call.draws)
    one = torch.ones((), dtype=torch.float64)
    results = distill(
        [x, *call.xs],
        [head, *call.weights],
        [bias, *call.biases],
        call.labels,
        weight,
        call.alpha,
        text,
        # a product with a tensor is what keeps torch.compile from a graph for each value of a number
        torch.stack([one * number for number in numbers]),
        call.vocab,
        call.compute,
        wants,
        metrics,
        call.tiles,
        call.memory,
        call.backend,
    )
    given = (True, metrics, *wants)
    return tuple(result if there else None for result, there in zip(results, given, strict=True))


def _dense(results, like):
    """An operator returns tensors: an empty one for what was not asked for."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


@torch.library.custom_op("hkdfast::distill", mutates_args=())
def distill(
    xs: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    labels: Tensor | None,
    weight: Tensor | None,
    alpha: Tensor | None,
    objective: str,
    numbers: Tensor,
    vocab: int,
    compute: torch.dtype | None,
    wants: list[bool],
    metrics: bool,
    tiling: str,
    memory: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    asked, draws = Objective.decode(objective, numbers.tolist())
    call = tiles.Call(
        xs[1:], weights[1:], biases[1:], labels, alpha, asked, draws, vocab, compute, tiling, memory, backend
    )
    with autograd_keys(), torch.no_grad(), torch.autocast(xs[0].device.type, enabled=False):
        results = tiles.run(call, (xs[0], weights[0], biases[0]), weight, wants, metrics)
    return _dense(results, results[0])


@distill.register_fake
def _(xs, weights, biases, labels, weight, alpha, objective, numbers, vocab, compute, wants, metrics, *loop):
    x, head, n = xs[0], weights[0], xs[0].shape[0]
    exact = torch.promote_types(x.dtype if head is None else head.dtype, torch.float32)
    loss = x.new_empty(n, dtype=exact)
    table = x.new_empty((len(METRICS), n), dtype=exact) if metrics else None
    if head is None:
        shapes, kept = (x.shape,), torch.float32 if x.dtype == torch.float16 else x.dtype
    else:
        shapes, kept = (x.shape, head.shape, head.shape[:1]), exact
    grads = [x.new_empty(shape, dtype=kept) if want else None for shape, want in zip(shapes, wants, strict=False)]
    return _dense((loss, table, *grads, *[None] * (3 - len(grads))), loss)
