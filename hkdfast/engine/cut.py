"""Sources under a Split: a whole source is sliced to this process's tokens, and one that does not fit is refused."""

from dataclasses import replace
from typing import Any

from torch import distributed

from ..heads import Head, Purified
from .checks import check_vocab
from .split_call import Part

LEAST = 0.75  # a whole teacher has at least this fraction of the vocabulary; fewer tokens are a part of another process


def cut(names, sources, learner, split, vocab) -> tuple[list[Any], Part | None]:
    """(sources with this process's tokens, Part), or (sources, None) without a Split.

    Args:
        names: names of the sources in error messages.
        sources: logits, Head or Purified. An object that occurs twice is sliced once.
        learner: a source that is trained, or a clean branch; its tokens are this process's part.
        split: Split; None: the Split of the learner's Head, if it has one.
        vocab: as in `hkdfast.distill_loss`.
    """
    split = split or own_split(learner)
    branches = [branch for source in sources for branch in branches_of(source)]
    if split is None:
        if any(own_split(branch) is not None for branch in branches):
            raise ValueError("the teacher's head is split over processes, but the student's is whole: split both")
        return list(sources), None
    held = int(learner.shape[-1])
    if split.first + held > split.total:
        raise ValueError(
            f"the part of this process, {held} tokens from token {split.first}, ends beyond the Split's total of "
            f"{split.total}"
        )
    made: dict[int, Any] = {}
    for name, source in zip(names, sources, strict=True):
        if id(source) not in made:
            made[id(source)] = cut_source(name, source, split, held)
    sizes = [split.total if int(branch.shape[-1]) == held else int(branch.shape[-1]) for branch in branches]
    compared = check_vocab(sizes, vocab)
    return [made[id(source)] for source in sources], Part(split, held, compared)


def branches_of(source):
    return [source.clean, *source.noisy] if isinstance(source, Purified) else [source]


def own_split(source):
    return source.split if isinstance(source, Head) else None


def cut_source(name, source, split, held):
    """A source, or each of its branches, with this process's tokens."""
    if isinstance(source, Purified):
        noisy = tuple(cut_source(name, branch, split, held) for branch in source.noisy)
        return replace(source, clean=cut_source(name, source.clean, split, held), noisy=noisy)
    own, size = own_split(source), int(source.shape[-1])
    if own is not None and not alike(own, split):
        raise ValueError(
            f"{name} is split differently (from token {own.first} of {own.total}) than the student (from {split.first} "
            f"of {split.total}): split both heads in the same way over the same processes"
        )
    if size == held:
        return source
    if size < LEAST * split.total:
        raise ValueError(
            f"{name} has {size} tokens, expected the {held} of this process, or a whole vocabulary of about "
            f"{split.total}"
        )
    if trained(source):
        raise ValueError(
            f"{name} is trained and whole, with {size} tokens: under a Split it must have this process's {held}"
        )
    tokens = slice(split.first, split.first + held)
    if not isinstance(source, Head):
        return source[..., tokens]
    return replace(source, weight=source.weight[tokens], bias=None if source.bias is None else source.bias[tokens])


def trained(source):
    weights = (source.weight, source.bias) if isinstance(source, Head) else (source,)
    return any(x is not None and x.requires_grad for x in weights)


def alike(one, other):
    """Whether two Splits are the same part of one vocabulary over the same processes."""
    groups = [distributed.get_process_group_ranks(each.group or distributed.group.WORLD) for each in (one, other)]
    return groups[0] == groups[1] and (one.first, one.total) == (other.first, other.total)
