"""What the losses share: checks, the call of the tile loop, reductions."""

import math
from dataclasses import dataclass, replace

import torch

from ..heads import Head, Purified, device_of, disturbed, parts, transform_of
from ..ops.dispatch import visible
from ..ops.objective import METRICS, Law, Objective, Transform
from ..ops.reference import DIVERGENCES
from . import tile_loop as loop
from .arguments import autocast_dtype, check_constant, check_flag, check_number, check_whole, check_word, settled, shown
from .autograd import Rows, Total
from .checks import (
    check_labels,
    check_options,
    check_pair,
    check_shared,
    check_source,
    check_target,
    check_vocab,
    check_weights,
)

REDUCTIONS = ("mean", "sum", "none")
# domain of beta, in words and as a test, for the divergences that read it
MIXTURES = {
    "jensen_shannon": ("0 < beta < 1", lambda beta: 0 < beta < 1),
    "skew_kl": ("0 <= beta < 1", lambda beta: 0 <= beta < 1),
    "skew_reverse_kl": ("0 < beta <= 1", lambda beta: 0 < beta <= 1),
}
# ends of beta where a mixture is one side alone: no loop has to take the logarithm of a mixture that is not one
ENDS = {"skew_kl": (0, "forward_kl"), "skew_reverse_kl": (1, "reverse_kl")}


@dataclass(frozen=True)
class Teaching:
    """What the source in one place is taught by the source in another: by itself, of labels alone."""

    student: int
    teacher: int
    divergence: str
    beta: float
    weight: float = 1.0  # times the divergence
    hard_weight: float = 0.0  # times the cross entropy of the student
    counts: bool = True  # whether the value counts, or the gradient alone


def check_divergence(divergence, beta):
    check_word("divergence", divergence, DIVERGENCES)
    if divergence in MIXTURES:
        check_number("beta", beta, "a number", lambda beta: True)
        if not MIXTURES[divergence][1](beta):
            domain = MIXTURES[divergence][0]
            raise ValueError(f"{divergence} takes {domain}, got {beta}; ask for an end point by its name")


def at_end(teaching):
    """A teaching by a mixture that is one side alone as that which it is."""
    end = ENDS.get(teaching.divergence)
    return replace(teaching, divergence=end[1]) if end and teaching.beta == end[0] else teaching


def check_weight(name, weight):
    check_number(name, weight, "finite and not negative", lambda x: 0 <= x < math.inf)


def check_options_of(
    teachings,
    sources,
    *,
    reduction,
    num_items,
    labels,
    teacher_floor,
    ignore_index,
    t_squared,
    return_metrics,
    **options,
):
    """Everything about the options that needs no look at a tensor's numbers."""
    check_word("reduction", reduction, REDUCTIONS)
    check_options(**options)
    check_flag("t_squared", t_squared)
    check_flag("return_metrics", return_metrics)
    check_whole("ignore_index", ignore_index, "a whole number of 64 bits", lambda x: -(2**63) <= x < 2**63)
    if teacher_floor is not None:
        check_number(
            "teacher_floor", teacher_floor, "a log-probability, finite and not above 0", lambda x: -math.inf < x <= 0
        )
    check_num_items(num_items, reduction)
    hard = max(one.hard_weight for one in teachings)
    if labels is None and hard:
        raise ValueError(f"hard_weight {hard} needs labels")
    for one in teachings:
        law = sources[one.teacher].law if isinstance(sources[one.teacher], Purified) else None
        check_target(law, labels)
        if (
            law
            and law.outside == "drop"
            and law.plausibility
            and one.divergence == "reverse_kl"
            and teacher_floor is None
        ):
            raise ValueError(
                'reverse_kl to a teacher that drops words is infinite: give one, e.g. teacher_floor=-30, or outside="clean"'
            )


def check_num_items(num_items, reduction):
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f'num_items is the denominator of reduction="mean", which is {reduction!r} here')
    what, within = "finite and not negative", lambda x: 0 <= x < math.inf
    if isinstance(num_items, torch.Tensor) and not visible(num_items):
        check_constant("num_items", num_items)
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be {what}, one number, got {shown(num_items)}")
        return
    check_number("num_items", num_items, what, within)


def reciprocal(num_items, n, labels, ignore_index, dtype):
    """1 / the denominator of the mean, 1 where that is 0; on the device where only the device knows it.

    A denominator that the host could not see makes the loss NaN if it is negative or not finite.
    """
    if num_items is None:
        num_items = n if labels is None else (labels != ignore_index).sum()
    if not isinstance(num_items, torch.Tensor):
        return 1 / num_items if num_items else 1.0
    num_items = num_items.detach().reshape(()).to(dtype)
    right = (num_items >= 0) & (num_items < math.inf)
    return (1 / num_items.where(num_items != 0, 1)).where(right, math.nan)


def branches_of(source):
    return [source.clean, *source.noisy] if isinstance(source, Purified) else [source]


def couple(
    names,
    sources,
    teachings,
    *,
    temperature,
    t_squared,
    labels,
    row_weight,
    reduction,
    num_items,
    ignore_index,
    vocab,
    teacher_floor,
    precision,
    tile_memory,
    return_metrics,
    backend,
):
    """The loss of several sources that teach each other. Arguments are those of `distill_loss`.

    Args:
        names: what errors call the sources.
        sources: logits, Head or Purified. One that is taught gets a gradient; a Purified only teaches. An object that
            stands in several places is one party of the loop.
        teachings: list of Teaching, in which those that count come first.

    Returns:
        the loss, or with metrics (loss, {(student, teacher): {metric: (...)}}).
    """
    for one in teachings:
        check_divergence(one.divergence, one.beta)
    teachings = [at_end(one) for one in teachings]
    check_options_of(
        teachings, sources, reduction=reduction, num_items=num_items, labels=labels, teacher_floor=teacher_floor,
        ignore_index=ignore_index, t_squared=t_squared, return_metrics=return_metrics,
        temperature=temperature, precision=precision, tile_memory=tile_memory, backend=backend,
    )  # fmt: skip
    flat = [(name, branch) for name, source in zip(names, sources, strict=True) for branch in branches_of(source)]
    first_name, first = flat[0]
    for name, branch in flat:
        check_source(name, branch)
        check_pair(first_name, first, name, branch)
    words = check_vocab([branch for _, branch in flat], vocab)
    lead, device = tuple(first.shape[:-1]), device_of(first)
    check_labels(labels, lead, device)
    check_weights("row_weight", row_weight, lead, device)
    first_place = [next(i for i, other in enumerate(sources) if other is source) for source in sources]
    students = list(dict.fromkeys(first_place[one.student] for one in teachings))
    if precision == "difference":
        if len(students) > 1:
            raise ValueError(f'precision="difference" are differences to one student, got {len(students)} students')
        check_shared([sources[students[0]], *(branch for _, branch in flat)])
    n = math.prod(lead)
    dtypes = [parts(sources[place], n)[0].dtype for place in students]
    if precision != "float32" and torch.float64 in dtypes:
        raise ValueError(
            f'precision={precision!r} are of 16 bits: heads of float64 take "float32", which then is float64'
        )

    exact = torch.float64 if torch.float64 in dtypes else torch.float32
    tensors, parties, alphas, seats = [], [], [], {}
    for place in dict.fromkeys(first_place):
        seats[place] = seat(sources[place], n, place in students, tensors, parties, alphas)
    scalars = dict(
        temperature=float(temperature),
        ignore_index=int(ignore_index),
        teacher_floor=-math.inf if teacher_floor is None else float(teacher_floor),
        difference=precision == "difference",
    )
    lessons, taught = [], []
    for one in teachings:
        student, teacher = (seats[first_place[place]] for place in (one.student, one.teacher))
        again = student.party in taught
        taught.append(student.party)
        lessons.append(lesson(one, student, teacher, again, temperature**2 if t_squared else 1, scalars))
    labels, row_weight, *alphas = (
        t if t is None else settled(t.detach()).reshape(n).contiguous() for t in (labels, row_weight, *alphas)
    )
    row_weight, *alphas = (t if t is None else t.to(exact) for t in (row_weight, *alphas))
    share = 1.0 if reduction != "mean" else reciprocal(num_items, n, labels, ignore_index, exact)
    # logits keep the gradient that backward returns, so the mean goes into it before it is rounded to their dtype; a
    # head keeps float32 sums, which the mean scales late, so that no tile of a 16-bit dtype underflows
    early = reduction == "mean" and not any(isinstance(sources[place], Head) for place in students)
    if early:
        row_weight = (torch.ones(n, dtype=exact, device=device) if row_weight is None else row_weight) * share
    call = loop.Call(
        parties=tuple(parties),
        lessons=tuple(lessons),
        labels=labels,
        alphas=alphas,
        vocab=words,
        compute=autocast_dtype(device),
        precision=precision,
        tile_memory=None if tile_memory is None else int(tile_memory),
        backend=backend,
    )
    wants = [[False] * 3 for _ in parties]
    for place in students if torch.is_grad_enabled() else []:
        wants[seats[place].party] = [t is not None and t.requires_grad for t in tensors[seats[place].first]]
    function = Rows if reduction == "none" else Total
    loss, table = function.apply(call, row_weight, wants, return_metrics, *(t for given in tensors for t in given))
    if reduction == "none":
        loss = loss.reshape(lead)
    elif reduction == "mean" and not early:
        loss = loss * share
    if not return_metrics:
        return loss
    return loss, {
        (one.student, one.teacher): {name: row.reshape(lead) for name, row in zip(METRICS, rows, strict=True)}
        for one, rows in zip(teachings, table, strict=True)
        if one.counts
    }


@dataclass(frozen=True)
class Seat:
    """Where the loop finds a source."""

    first: int  # place of its first tensors
    party: int
    transform: Transform
    disturbed: Transform
    noisy: int | None = None  # party of the disturbed branch
    law: Law | None = None
    alpha: int | None = None


def seat(source, n, learns, tensors, parties, alphas):
    """Put the tensors of a source of n rows and its parties at the ends of these lists."""
    first, party = len(tensors), len(parties)
    for branch in branches_of(source):
        tensors.append([t if t is None or learns else t.detach() for t in parts(branch, n)])
    parties.append(loop.Party((first,)))
    if not isinstance(source, Purified):
        return Seat(first, party, transform_of(source), Transform())
    transform, draws = disturbed(source.noisy)
    parties.append(loop.Party(tuple(range(first + 1, len(tensors))), draws))
    alpha = None
    if source.alpha is not None:
        alpha = len(alphas)
        alphas.append(source.alpha)
    return Seat(first, party, transform_of(source.clean), transform, party + 1, source.law, alpha)


def lesson(teaching, student, teacher, again, gain, scalars):
    """A teaching between two seats; again: the student has had one; gain: of every divergence."""
    objective = Objective(
        divergence=teaching.divergence,
        beta=float(teaching.beta) if teaching.divergence in MIXTURES else 0.5,
        soft_weight=float(teaching.weight * gain),
        hard_weight=float(teaching.hard_weight),
        accumulate=again,
        student=student.transform,
        teacher=teacher.transform,
        noisy=teacher.disturbed,
        law=teacher.law,
        **scalars,
    )
    return loop.Lesson(student.party, teacher.party, teacher.noisy, objective, teacher.alpha, teaching.counts)
