"""From checked options to a loss: resolve the inputs, build the spec of the tile loop, reduce what it returns."""

import math
from dataclasses import dataclass, replace

import torch

from ..heads import Head, Purified, device_of, noisy_transforms, parts, transform_of
from ..ops.objective import METRICS, ContrastSpec, Objective, Transform
from ..ops.reference import BETA_RANGES, DIVERGENCES, LIMITS
from .arguments import autocast_dtype, check_number, check_word, settled
from .autograd import ReducedLoss, UnreducedLoss
from .checks import (
    check_labels,
    check_pair,
    check_shared,
    check_source,
    check_target,
    check_vocab,
    check_weights,
    sizes_of,
)
from .cut import cut
from .split_call import Part
from .tile_loop import Input, LoopSpec, LossTerm


def check_divergence(divergence, beta):
    check_word("divergence", divergence, DIVERGENCES)
    if divergence in BETA_RANGES:
        check_number("beta", beta, "a number", lambda beta: True)
        domain, within = BETA_RANGES[divergence]
        if not within(beta):
            raise ValueError(f"{divergence} takes {domain}, got {beta}{end_point(divergence, beta)}")


def end_point(divergence, beta):
    """A hint for an error: TRL, Liger and the papers of GKD and DistiLLM use another divergence at this end of beta."""
    names = {0: "forward_kl", 1: "reverse_kl"} if divergence == "jensen_shannon" else {}
    return f': what TRL and Liger compute at beta={beta:g} is divergence="{names[beta]}"' if beta in names else ""


def check_weight(name, weight):
    check_number(name, weight, "finite and not negative", lambda x: 0 <= x < math.inf)


def canonical(divergence, beta):
    """The divergence that a mixture equals at a limit of its beta, else the divergence itself."""
    limit = LIMITS.get(divergence)
    return limit[1] if limit and beta == limit[0] else divergence


def loss_term(student, teacher, divergence, beta, weight=1.0, hard_weight=0.0, counted=True):
    """One term of the loss over sources: source `student` learns from source `teacher`.

    If both are the same index, it learns from the labels only. `build` fills in what depends on the sources.
    """
    check_divergence(divergence, beta)
    divergence = canonical(divergence, beta)
    plain = Transform()  # given, because torch.compile cannot follow a default that is an object
    objective = Objective(
        divergence=divergence,
        beta=float(beta) if divergence in BETA_RANGES else 0.5,
        soft_weight=float(weight),
        hard_weight=float(hard_weight),
        student=plain,
        teacher=plain,
        noisy=plain,
    )
    return LossTerm(student, teacher, None, objective, None, counted)


def check_terms(terms, sources, options):
    """Check terms, sources and options against each other, before any tensor is read."""
    hard = max(term.objective.hard_weight for term in terms)
    if options.labels is None and hard:
        raise ValueError(f"hard_weight {hard} needs labels")
    for term in terms:
        law = sources[term.teacher].law if isinstance(sources[term.teacher], Purified) else None
        check_target(law, options.labels)
        drops = law and law.outside == "drop" and law.plausibility
        if drops and term.objective.divergence == "reverse_kl" and options.teacher_floor is None:
            raise ValueError(
                "reverse_kl to a teacher that drops tokens is infinite: set teacher_floor, e.g. to -30, "
                'or use outside="clean"'
            )


def branches_of(source):
    return [source.clean, *source.noisy] if isinstance(source, Purified) else [source]


@dataclass(frozen=True, eq=False)
class Resolved:
    """What `build` and `reduce` need to know about the inputs."""

    lead: tuple  # leading dimensions of the logits
    device: torch.device
    vocab: int  # tokens compared
    firsts: list  # for each source, the index of the first that is the same object
    students: list  # indices of the distinct sources that are trained
    dtype: torch.dtype  # of losses and weights: float32, or float64
    part: Part | None  # under a Split; vocab is then this process's

    @property
    def rows(self):
        return math.prod(self.lead)


def resolve(names, sources, terms, options, part=None):
    """Check the sources against each other and the options; find shapes, device, vocabulary and dtype.

    Args:
        part: under a Split, as `cut` returns it.
    """
    check_terms(terms, sources, options)
    flat = [(name, branch) for name, source in zip(names, sources, strict=True) for branch in branches_of(source)]
    first_name, first = flat[0]
    for name, branch in flat:
        check_source(name, branch)
        check_pair(first_name, first, name, branch)
    vocab = check_vocab(sizes_of([branch for _, branch in flat]), options.vocab) if part is None else part.local
    lead, device = tuple(first.shape[:-1]), device_of(first)
    check_labels(options.labels, lead, device)
    check_weights("row_weight", options.row_weight, lead, device)
    firsts = [next(i for i, other in enumerate(sources) if other is source) for source in sources]
    students = list(dict.fromkeys(firsts[term.student] for term in terms))
    if options.precision == "difference":
        if len(students) > 1:
            raise ValueError(f'precision="difference" takes one student, got {len(students)} students')
        check_shared([sources[students[0]], *(branch for _, branch in flat)])
    dtypes = [parts(sources[i], math.prod(lead))[0].dtype for i in students]
    if options.precision != "float32" and torch.float64 in dtypes:
        raise ValueError(
            f'precision={options.precision!r} uses 16-bit tiles: for float64 heads use "float32", which keeps float64'
        )
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return Resolved(lead, device, vocab, firsts, students, dtype, part)


@dataclass(frozen=True)
class InputSlot:
    """Where a source is in the tile loop."""

    first: int  # index of its first (x, weight, bias)
    index: int  # of its Input; of the clean branch if it is purified
    transform: Transform
    noisy_transform: Transform
    noisy: int | None = None  # index of the Input of the noisy branch
    law: ContrastSpec | None = None
    alpha: int | None = None  # index of its per-row contrast weights


def add_input(source, rows, learns, tensors, inputs, alphas):
    """Append a source's tensors, Inputs and contrast weights to these lists; return its InputSlot."""
    first, index = len(tensors), len(inputs)
    for branch in branches_of(source):
        tensors.append([t if t is None or learns else t.detach() for t in parts(branch, rows)])
    inputs.append(Input((first,)))
    if not isinstance(source, Purified):
        return InputSlot(first, index, transform_of(source), Transform())
    transform, draws = noisy_transforms(source.noisy)
    inputs.append(Input(tuple(range(first + 1, len(tensors))), draws))
    alpha = None
    if source.alpha is not None:
        alpha = len(alphas)
        alphas.append(source.alpha)
    return InputSlot(first, index, transform_of(source.clean), transform, index + 1, source.law, alpha)


def build(sources, terms, options, found):
    """The LoopSpec over the distinct sources, their tensors, and which gradients of each Input are required."""
    tensors, inputs, alphas, slots = [], [], [], {}
    for i in dict.fromkeys(found.firsts):
        slots[i] = add_input(sources[i], found.rows, i in found.students, tensors, inputs, alphas)
    gain = options.temperature**2 if options.t_squared else 1
    placed, learned = [], []
    for term in terms:
        student, teacher = slots[found.firsts[term.student]], slots[found.firsts[term.teacher]]
        objective = replace(
            term.objective,
            soft_weight=float(term.objective.soft_weight * gain),
            temperature=float(options.temperature),
            ignore_index=int(options.ignore_index),
            teacher_floor=-math.inf if options.teacher_floor is None else float(options.teacher_floor),
            difference=options.precision == "difference",
            accumulate=student.index in learned,
            student=student.transform,
            teacher=teacher.transform,
            noisy=teacher.noisy_transform,
            law=teacher.law,
        )
        learned.append(student.index)
        placed.append(LossTerm(student.index, teacher.index, teacher.noisy, objective, teacher.alpha, term.counted))
    spec = LoopSpec(
        inputs=tuple(inputs),
        terms=tuple(placed),
        labels=per_row(options.labels, found.rows),
        alphas=[per_row(alpha, found.rows).to(found.dtype) for alpha in alphas],
        vocab=found.vocab,
        compute=autocast_dtype(found.device),
        precision=options.precision,
        tile_memory=options.memory_bytes,
        backend=options.backend,
        part=found.part,
    )
    wants = [[False] * 3 for _ in inputs]
    for i in found.students if torch.is_grad_enabled() else []:
        wants[slots[i].index] = [t is not None and t.requires_grad for t in tensors[slots[i].first]]
    return spec, tensors, wants


def per_row(x, rows):
    """A constant of the rows as a contiguous vector, or None."""
    return x if x is None else settled(x.detach()).reshape(rows).contiguous()


def mean_factor(num_items, n, labels, ignore_index, dtype):
    """1 / the denominator of the mean, 1 where that is 0; a tensor where only the device knows it.

    A denominator that the host could not read makes the loss NaN if it is negative or not finite.
    """
    if num_items is None:
        num_items = n if labels is None else (labels != ignore_index).sum()
    if not isinstance(num_items, torch.Tensor):
        return 1 / num_items if num_items else 1.0
    num_items = num_items.detach().reshape(()).to(dtype)
    right = (num_items >= 0) & (num_items < math.inf)
    return (1 / num_items.where(num_items != 0, 1)).where(right, math.nan)


def reduce(spec, tensors, wants, options, found, heads):
    """Run the loop: the reduced loss, and the metrics (counted terms, METRICS, rows).

    Args:
        heads: whether a student is a Head.
    """
    n, dtype, reduction = found.rows, found.dtype, options.reduction
    row_weight = None if options.row_weight is None else per_row(options.row_weight, n).to(dtype)
    mean = reduction == "mean"
    factor = mean_factor(options.num_items, n, spec.labels, options.ignore_index, dtype) if mean else 1.0
    # logits keep the gradient that backward returns, so the mean goes into it before it is rounded to their dtype; a
    # head keeps float32 sums, which the mean scales late, so that no tile of a 16-bit dtype underflows
    early = mean and not heads
    if early:
        row_weight = (torch.ones(n, dtype=dtype, device=found.device) if row_weight is None else row_weight) * factor
    function = UnreducedLoss if reduction == "none" else ReducedLoss
    flat = (t for given in tensors for t in given)
    loss, table = function.apply(spec, row_weight, wants, options.return_metrics, *flat)
    if reduction == "none":
        loss = loss.reshape(found.lead)
    elif mean and not early:
        loss = loss * factor
    return loss, table


def prepared(names, sources, terms, options):
    """(sources with this process's tokens, options with their Split, Resolved)."""
    for name, source in zip(names, sources, strict=True):
        if not isinstance(source, Purified):
            check_source(name, source)
    sources, part = cut(names, sources, sources[terms[0].student], options.split, options.vocab)
    if part is not None:
        options = replace(options, split=part.split)  # it may be the Split of a head
    return sources, options, resolve(names, sources, terms, options, part)


def coupled_rows_loss(names, sources, terms, options):
    """The loss of several sources that learn from each other.

    Args:
        names: names of the sources in error messages.
        sources: logits, Head or Purified. A student gets a gradient; a Purified can only be a teacher. An object that
            occurs several times is one Input of the loop.
        terms: list of LossTerm from `loss_term`; the counted ones come first.
        options: LossOptions.

    Returns:
        the loss, or with metrics (loss, {(student, teacher): {metric: (...)}}).
    """
    sources, options, found = prepared(names, sources, terms, options)
    spec, tensors, wants = build(sources, terms, options, found)
    heads = any(isinstance(sources[i], Head) for i in found.students)
    loss, table = reduce(spec, tensors, wants, options, found, heads)
    if not options.return_metrics:
        return loss
    return loss, {
        (term.student, term.teacher): {name: row.reshape(found.lead) for name, row in zip(METRICS, rows, strict=True)}
        for term, rows in zip(terms, table, strict=True)
        if term.counted
    }
