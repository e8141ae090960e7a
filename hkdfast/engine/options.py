"""The options of every loss, in one list, with the checks that need no logits."""

import math
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from ..ops.dispatch import host_readable
from ..ops.dispatch import validate as check_backend
from ..split import Split
from .arguments import check_constant, check_flag, check_number, check_whole, check_word, shown

PRECISIONS = ("float32", "bfloat16", "difference")
REDUCTIONS = ("mean", "sum", "none")


class BatchKeywords(TypedDict, total=False):
    """For type checkers: the fields of LossOptions that are options of a loss over models and a batch."""

    temperature: float
    t_squared: bool
    reduction: str
    num_items: float | torch.Tensor | None
    vocab: int | str | None
    teacher_floor: float | None
    precision: str
    tile_memory: float | None
    backend: str | None
    split: Split | None


class RowKeywords(BatchKeywords, total=False):
    """For type checkers: the same, and the options of a loss with one tensor per row."""

    row_weight: torch.Tensor | None
    ignore_index: int


class LossKeywords(RowKeywords, total=False):
    """For type checkers: the fields of LossOptions except return_metrics, on which the type of the result depends."""

    labels: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class LossOptions:
    """The options that `hkdfast.distill_loss` and `hkdfast.coupled_loss` share; `distill_loss` documents them.

    Checks that depend on the logits (shapes, devices, vocabularies) are in `terms.resolve`.

    Raises:
        ValueError: naming the option, the wrong value and the right ones.
    """

    temperature: float = 1.0
    t_squared: bool = False
    labels: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None
    reduction: str = "mean"
    num_items: float | torch.Tensor | None = None
    ignore_index: int = -100
    vocab: int | str | None = None
    teacher_floor: float | None = None
    precision: str = "float32"
    tile_memory: float | None = None
    return_metrics: bool = False
    backend: str | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        check_word("reduction", self.reduction, REDUCTIONS)
        check_number("temperature", self.temperature, "positive and finite", lambda x: 0 < x < math.inf)
        check_word("precision", self.precision, PRECISIONS)
        if self.tile_memory is not None:
            check_number("tile_memory", self.tile_memory, "a positive number of bytes", lambda x: 0 < x < math.inf)
        check_backend(self.backend)
        check_flag("t_squared", self.t_squared)
        check_flag("return_metrics", self.return_metrics)
        check_whole("ignore_index", self.ignore_index, "a whole number of 64 bits", lambda x: -(2**63) <= x < 2**63)
        if self.teacher_floor is not None:
            what = "a log-probability, finite and not above 0"
            check_number("teacher_floor", self.teacher_floor, what, lambda x: -math.inf < x <= 0)
        if self.num_items is not None:
            check_num_items(self.num_items, self.reduction)
        check_split(self.split, self.reduction, self.backend)
        number = isinstance(self.vocab, int) and not isinstance(self.vocab, bool) and self.vocab >= 1
        if not (self.vocab is None or number or isinstance(self.vocab, str) and self.vocab == "common"):
            what = 'None, "common" or a whole number of tokens, at least 1'
            raise ValueError(f"vocab must be {what}, got {shown(self.vocab)}")

    @property
    def memory_bytes(self) -> int | None:
        return None if self.tile_memory is None else int(self.tile_memory)


def check_split(split: Any, reduction: str, backend: str | None) -> None:
    if split is None:
        return
    if not isinstance(split, Split):
        raise ValueError(f"split must be a hkdfast.Split or None, got {shown(split)}")
    if reduction == "none":
        raise ValueError('reduction="none" is not possible under a Split: backward would have to exchange gradients')
    if backend not in (None, "reference"):
        raise ValueError(f"backend {backend!r} does not support a Split: leave it out, or pass backend='reference'")


def check_num_items(num_items: float | torch.Tensor, reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(f'num_items is the denominator of reduction="mean", which is {reduction!r} here')
    what, within = "finite and not negative", lambda x: 0 <= x < math.inf
    if isinstance(num_items, torch.Tensor) and not host_readable(num_items):
        check_constant("num_items", num_items)
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be {what}, one number, got {shown(num_items)}")
        return
    check_number("num_items", num_items, what, within)
