"""The tile loop as torch.library operators: opaque to torch.compile, with fake implementations.

Eager calls go to the loop itself, so that FLOP counters and profilers see its matrix products.
"""

import torch
from torch import Tensor

from ..ops.objective import METRICS, Objective, Transform, decode, encode
from . import tile_loop
from .arguments import without_autocast


def autograd_keys():
    """Enable autograd inside an operator, which disables it: the reference backend differentiates with it."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(included, excluded)


def pack_spec(spec):
    """(text, numbers) of a LoopSpec's inputs and terms, joined by "/": an operator takes no dataclass."""
    texts, numbers = [], []
    for given in spec.inputs:
        groups = [list(given.branches), *([t.scale, t.softcap] for t in given.draws)]
        text, more = encode(groups)
        texts.append(text)
        numbers += more
    for term in spec.terms:
        index, _ = encode([[term.student, term.teacher, term.noisy, term.alpha, term.counted]])
        text, more = term.objective.encode()
        texts.append(f"{index}|{text}")
        numbers += more
    return "/".join(texts), numbers


def unpack_spec(text, numbers):
    """(inputs, terms) from what `pack_spec` returned."""
    numbers, inputs, terms = iter(numbers), [], []
    for part in text.split("/"):
        index, _, objective = part.partition("|")
        first, *rest = decode(index, numbers)
        if objective:
            student, teacher, noisy, alpha, counted = first
            term = tile_loop.LossTerm(student, teacher, noisy, Objective.decode(objective, numbers), alpha, counted)
            terms.append(term)
        else:
            inputs.append(tile_loop.Input(tuple(first), tuple(Transform(*group) for group in rest)))
    return tuple(inputs), tuple(terms)


def pack_inputs(spec, tensors):
    """The first arguments of both operators: tensors, labels, alphas, the text and its numbers."""
    text, numbers = pack_spec(spec)
    one = torch.ones((), dtype=torch.float64)
    # the product with a tensor keeps torch.compile from specializing a graph on each number
    numbers = torch.stack([one * number for number in numbers])
    xs, weights, biases = ([given[i] for given in tensors] for i in range(3))
    return xs, weights, biases, spec.labels, spec.alphas, text, numbers


def pack_options(spec):
    """The last arguments of both operators."""
    return spec.vocab, spec.compute, spec.precision, spec.tile_memory, spec.backend


def run(spec, tensors, row_weight, wants, return_metrics, deferred=False):
    """tile_loop.run through the operator."""
    flat = [want for three in wants for want in three]
    loss, table, grads = distill(
        *pack_inputs(spec, tensors), row_weight, flat, return_metrics, deferred, *pack_options(spec)
    )
    given = iter(grads)
    by_input = [[next(given) if want and not deferred else None for want in three] for three in wants]
    return loss, table if return_metrics else None, by_input


def contrast(spec, tensors):
    """tile_loop.contrast through the operator."""
    return contrast_op(*pack_inputs(spec, tensors), *pack_options(spec))


@torch.library.custom_op("hkdfast::distill", mutates_args=())
def distill(
    xs: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    labels: Tensor | None,
    alphas: list[Tensor],
    terms: str,
    numbers: Tensor,
    row_weight: Tensor | None,
    wants: list[bool],
    return_metrics: bool,
    deferred: bool,
    vocab: int,
    compute: torch.dtype | None,
    precision: str,
    tile_memory: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    spec = tile_loop.LoopSpec(
        *unpack_spec(terms, numbers.tolist()), labels, alphas, vocab, compute, precision, tile_memory, backend
    )
    threes = [wants[i : i + 3] for i in range(0, len(wants), 3)]
    tensors = list(zip(xs, weights, biases, strict=True))
    with autograd_keys(), torch.no_grad(), without_autocast(xs[0].device):
        loss, table, grads = tile_loop.run(spec, tensors, row_weight, threes, return_metrics, deferred)
    given = [grad for three in grads for grad in three if grad is not None]
    return loss, loss.new_empty(0) if table is None else table, given


def exact(x, head):
    """dtype of the results from one source: float32, or float64."""
    return torch.promote_types(x.dtype if head is None else head.dtype, torch.float32)


def widest(xs, heads):
    return torch.float64 if torch.float64 in map(exact, xs, heads) else torch.float32


@distill.register_fake
def _(xs, weights, biases, labels, alphas, terms, numbers, row_weight, wants, metrics, deferred, *loop):
    inputs, terms = unpack_spec(terms, [0.0] * len(numbers))
    n, firsts = xs[0].shape[0], [given.branches[0] for given in inputs]
    students = [firsts[term.student] for term in terms]
    wide = widest([xs[i] for i in students], [weights[i] for i in students])
    grads = []
    for i, first in enumerate([] if deferred else firsts):
        x, head = xs[first], weights[first]
        shapes = (x.shape,) if head is None else (x.shape, head.shape, head.shape[:1])
        kept = exact(x, head) if head is not None or x.dtype == torch.float16 else x.dtype
        required = wants[3 * i : 3 * i + len(shapes)]
        grads += [x.new_empty(shape, dtype=kept) for shape, want in zip(shapes, required, strict=True) if want]
    loss = xs[0].new_empty((len(terms), n), dtype=wide)
    shape = (len(terms), len(METRICS), n) if metrics else (0,)
    return loss, xs[0].new_empty(shape, dtype=wide), grads


@torch.library.custom_op("hkdfast::contrast", mutates_args=())
def contrast_op(
    xs: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    labels: Tensor | None,
    alphas: list[Tensor],
    terms: str,
    numbers: Tensor,
    vocab: int,
    compute: torch.dtype | None,
    precision: str,
    tile_memory: int | None,
    backend: str | None,
) -> Tensor:
    spec = tile_loop.LoopSpec(
        *unpack_spec(terms, numbers.tolist()), labels, alphas, vocab, compute, precision, tile_memory, backend
    )
    with torch.no_grad(), without_autocast(xs[0].device):
        return tile_loop.contrast(spec, list(zip(xs, weights, biases, strict=True)))


@contrast_op.register_fake
def _(xs, weights, biases, labels, alphas, terms, numbers, vocab, *loop):
    return xs[0].new_empty((xs[0].shape[0], vocab), dtype=widest(xs, weights))
