"""A vocabulary that is split over the processes of a group: which part this process holds."""

from dataclasses import dataclass
from typing import Any

from torch import distributed

from .engine.arguments import check_flag, check_whole, shown


@dataclass(frozen=True, eq=False)
class Split:
    """This process's part of a head, or of logits, whose tokens a group of processes holds together.

    With it, every process of the group calls the loss at the same time, on the same rows, each with its own tokens: a
    Head of the same hidden states and a part (V_local, H) of the weight, or logits (..., V_local). All get the same
    loss, that of the whole vocabulary, to the last bit.

    Args:
        group: torch.distributed ProcessGroup; None: the default group.
        first: number of this process's first token in the whole vocabulary.
        total: tokens of the whole vocabulary; the parts must cover it without gap or overlap. A part may be empty.
        reduce_hidden: whether the loss sums the gradient of hidden states over the group. False where the layer that
            made them does, as Megatron's column-parallel layers do.

    Raises:
        ValueError: numbers that are no part of a vocabulary, something that is no group, or torch.distributed that is
            not initialized. In the loss, on every process: parts that leave a gap or overlap, other rows, labels,
            hidden states or options than another process has.
    """

    group: Any
    first: int
    total: int
    reduce_hidden: bool = True

    def __post_init__(self) -> None:
        check_whole("total", self.total, "a whole number of tokens, at least 1", lambda x: x >= 1)
        what = f"a whole number of tokens from 0 to {self.total}"
        check_whole("first", self.first, what, lambda x: 0 <= x <= self.total)
        check_flag("reduce_hidden", self.reduce_hidden)
        if not distributed.is_available() or not distributed.is_initialized():
            raise ValueError("a Split needs processes: call torch.distributed.init_process_group first")
        if self.group is not None and not isinstance(self.group, distributed.ProcessGroup):
            raise ValueError(f"group must be a ProcessGroup of torch.distributed, or None, got {shown(self.group)}")
