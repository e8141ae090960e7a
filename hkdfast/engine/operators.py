"""The tile loop as torch.library operators: opaque to torch.compile, with fake implementations.

Eager calls go to the loop itself, so that FLOP counters and profilers see its matrix products.
"""

import torch
from torch import Tensor

from ..ops.objective import METRICS, Objective, Transform, decode, encode
from . import tile_loop
from .arguments import without_autocast


def autograd_keys():
    """Autograd works inside: an operator switches it off, and the reference backend differentiates by it."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(included, excluded)


def encoded(call):
    """([a text for each party, one for each lesson], numbers): what an operator takes of a Call."""
    texts, numbers = [], []
    for party in call.parties:
        groups = [list(party.branches), *([t.scale, t.softcap] for t in party.draws)]
        text, more = encode(groups)
        texts.append(text)
        numbers += more
    for lesson in call.lessons:
        place, _ = encode([[lesson.student, lesson.teacher, lesson.noisy, lesson.alpha, lesson.counts]])
        text, more = lesson.objective.encode()
        texts.append(f"{place}|{text}")
        numbers += more
    return "/".join(texts), numbers


def decoded(text, numbers):
    """(parties, lessons) of what `encoded` gave."""
    numbers, parties, lessons = iter(numbers), [], []
    for part in text.split("/"):
        place, _, objective = part.partition("|")
        first, *rest = decode(place, numbers)
        if objective:
            student, teacher, noisy, alpha, counts = first
            lesson = tile_loop.Lesson(student, teacher, noisy, Objective.decode(objective, numbers), alpha, counts)
            lessons.append(lesson)
        else:
            parties.append(tile_loop.Party(tuple(first), tuple(Transform(*group) for group in rest)))
    return tuple(parties), tuple(lessons)


def asked(call, tensors):
    """What both operators take first: tensors, labels, alphas, the text and its numbers."""
    text, numbers = encoded(call)
    one = torch.ones((), dtype=torch.float64)
    # a product with a tensor is what keeps torch.compile from a graph for each value of a number
    numbers = torch.stack([one * number for number in numbers])
    xs, weights, biases = ([given[i] for given in tensors] for i in range(3))
    return xs, weights, biases, call.labels, call.alphas, text, numbers


def settings(call):
    """And last."""
    return call.vocab, call.compute, call.precision, call.tile_memory, call.backend


def run(call, tensors, row_weight, wants, return_metrics, deferred=False):
    """tiles.run through the operator."""
    flat = [want for three in wants for want in three]
    loss, table, grads = distill(*asked(call, tensors), row_weight, flat, return_metrics, deferred, *settings(call))
    given = iter(grads)
    triples = [[next(given) if want and not deferred else None for want in three] for three in wants]
    return loss, table if return_metrics else None, triples


def contrast(call, tensors):
    """tiles.contrast through the operator."""
    return contrast_op(*asked(call, tensors), *settings(call))


@torch.library.custom_op("hkdfast::distill", mutates_args=())
def distill(
    xs: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    labels: Tensor | None,
    alphas: list[Tensor],
    lessons: str,
    numbers: Tensor,
    weight: Tensor | None,
    wants: list[bool],
    return_metrics: bool,
    deferred: bool,
    vocab: int,
    compute: torch.dtype | None,
    tiling: str,
    tile_memory: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = tile_loop.Call(
        *decoded(lessons, numbers.tolist()), labels, alphas, vocab, compute, tiling, tile_memory, backend
    )
    threes = [wants[i : i + 3] for i in range(0, len(wants), 3)]
    tensors = list(zip(xs, weights, biases, strict=True))
    with autograd_keys(), torch.no_grad(), without_autocast(xs[0].device):
        loss, table, grads = tile_loop.run(call, tensors, weight, threes, return_metrics, deferred)
    given = [grad for three in grads for grad in three if grad is not None]
    return loss, loss.new_empty(0) if table is None else table, given


def exact(x, head):
    """dtype of the numbers that come of a source: float32, or float64."""
    return torch.promote_types(x.dtype if head is None else head.dtype, torch.float32)


def widest(xs, heads):
    return torch.float64 if torch.float64 in map(exact, xs, heads) else torch.float32


@distill.register_fake
def _(xs, weights, biases, labels, alphas, lessons, numbers, weight, wants, metrics, deferred, *loop):
    parties, lessons = decoded(lessons, [0.0] * len(numbers))
    n, places = xs[0].shape[0], [party.branches[0] for party in parties]
    students = [places[lesson.student] for lesson in lessons]
    wide = widest([xs[i] for i in students], [weights[i] for i in students])
    grads = []
    for party, place in enumerate([] if deferred else places):
        x, head = xs[place], weights[place]
        shapes = (x.shape,) if head is None else (x.shape, head.shape, head.shape[:1])
        kept = exact(x, head) if head is not None or x.dtype == torch.float16 else x.dtype
        asked_for = wants[3 * party : 3 * party + len(shapes)]
        grads += [x.new_empty(shape, dtype=kept) for shape, want in zip(shapes, asked_for, strict=True) if want]
    loss = xs[0].new_empty((len(lessons), n), dtype=wide)
    shape = (len(lessons), len(METRICS), n) if metrics else (0,)
    return loss, xs[0].new_empty(shape, dtype=wide), grads


@torch.library.custom_op("hkdfast::contrast", mutates_args=())
def contrast_op(
    xs: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    labels: Tensor | None,
    alphas: list[Tensor],
    lessons: str,
    numbers: Tensor,
    vocab: int,
    compute: torch.dtype | None,
    tiling: str,
    tile_memory: int | None,
    backend: str | None,
) -> Tensor:
    call = tile_loop.Call(
        *decoded(lessons, numbers.tolist()), labels, alphas, vocab, compute, tiling, tile_memory, backend
    )
    with torch.no_grad(), without_autocast(xs[0].device):
        return tile_loop.contrast(call, list(zip(xs, weights, biases, strict=True)))


@contrast_op.register_fake
def _(xs, weights, biases, labels, alphas, lessons, numbers, vocab, *loop):
    return xs[0].new_empty((xs[0].shape[0], vocab), dtype=widest(xs, weights))
