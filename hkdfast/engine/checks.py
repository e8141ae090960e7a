"""Checks of logits, heads and per-row tensors against each other, before any work."""

from collections.abc import Sequence
from typing import Any

import torch

from ..heads import Head, device_of, same
from ..ops.dispatch import host_readable
from ..ops.objective import ContrastSpec
from .arguments import check_constant, check_floats, check_plain, shown


def check_source(name: str, source: Any) -> None:
    """Check logits. A Head has already checked its tensors."""
    if isinstance(source, Head):
        return
    if not isinstance(source, torch.Tensor):
        how = ": pass its .logits" if hasattr(source, "logits") else ""
        how = ": pass torch.from_numpy(...)" if type(source).__name__ == "ndarray" else how
        raise ValueError(f"{name} must be a tensor of logits or a Head, got {shown(source)}{how}")
    check_floats(name, source)
    if not source.dim():
        raise ValueError(f"{name} must be logits (..., V), got a number without dimensions")


def check_pair(name: str, source: torch.Tensor | Head, other_name: str, other: torch.Tensor | Head) -> None:
    """Require the same rows and the same device for two sources."""
    if tuple(source.shape[:-1]) != tuple(other.shape[:-1]):
        raise ValueError(f"{name} {tuple(source.shape)} and {other_name} {tuple(other.shape)} differ in their rows")
    if device_of(source) != device_of(other):
        raise ValueError(f"{name} is on {device_of(source)} but {other_name} is on {device_of(other)}")


def sizes_of(sources: Sequence[torch.Tensor | Head]) -> list[int]:
    """Vocabulary size of each source."""
    return [int(source.shape[-1]) for source in sources]


def check_vocab(sizes: Sequence[int], vocab: int | str | None) -> int:
    """The number of tokens to compare, from the option `vocab` and the sizes of the sources' vocabularies."""
    if not min(sizes):
        raise ValueError(f"vocabularies of {' and '.join(map(str, sizes))} tokens: one is empty")
    if vocab is None:
        if len(set(sizes)) > 1:
            raise ValueError(
                f"vocabularies of {' and '.join(map(str, dict.fromkeys(sizes)))} tokens differ: "
                'vocab="common" compares the tokens up to the smallest vocabulary, a number N the first N tokens'
            )
        return sizes[0]
    if isinstance(vocab, str):  # "common"
        return min(sizes)
    if vocab > min(sizes):
        what = f'None, "common" or a number of tokens from 1 to {min(sizes)}'
        raise ValueError(f"vocab must be {what}, got {shown(vocab)}")
    return vocab


def check_per_row(name: str, numbers: Any, lead: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(numbers, torch.Tensor):
        raise ValueError(f"{name} must be a tensor {lead}, one number per row, got {shown(numbers)}")
    check_plain(name, numbers)
    if tuple(numbers.shape) != lead:
        raise ValueError(f"{name} {tuple(numbers.shape)} must be one number per row, {lead}")
    if numbers.device != device:
        raise ValueError(f"{name} is on {numbers.device} but the logits are on {device}")


def check_labels(labels: torch.Tensor | None, lead: tuple[int, ...], device: torch.device) -> None:
    if labels is None:
        return
    check_per_row("labels", labels, lead, device)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")


def check_weights(name: str, weights: torch.Tensor | None, lead: tuple[int, ...], device: torch.device) -> None:
    """Require finite weights that are not negative. Values are checked only if the host can read them."""
    if weights is None:
        return
    check_per_row(name, weights, lead, device)
    check_floats(name, weights)
    check_constant(name, weights)
    if not host_readable(weights):
        return
    wrong = weights[~((weights >= 0) & weights.isfinite())]  # NaN is neither
    if wrong.numel():
        raise ValueError(f"every {name} must be finite and not negative, got {wrong[0].item()}")


def check_target(law: ContrastSpec | None, labels: torch.Tensor | None) -> None:
    if law and law.reads_labels and labels is None:
        raise ValueError('confidence "target" needs labels')


def check_shared(sources: Sequence[torch.Tensor | Head]) -> None:
    """precision="difference" requires one head that all sources share."""
    heads = []
    for one in sources:
        if not isinstance(one, Head):
            raise ValueError(f'precision="difference" needs heads on all sides, got {type(one).__name__}')
        heads.append(one)
    first = heads[0]
    for one in heads:
        shared = same(one.weight, first.weight) and same(one.bias, first.bias) and one.scale == first.scale
        if not shared or one.softcap is not None or first.softcap is not None:
            raise ValueError('precision="difference" needs one weight, bias and scale on all sides, and no softcap')
