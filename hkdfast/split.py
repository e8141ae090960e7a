"""`Split`: this process's part of a vocabulary that is divided among the processes of a group."""

from dataclasses import dataclass
from typing import Any

from torch import distributed

from .engine.arguments import check_flag, check_whole, shown


@dataclass(frozen=True, eq=False)
class Split:
    """This process's part of a head, or of logits, whose vocabulary is divided among the processes of a group.

    Every process of the group calls the loss at the same time, on the same rows, with its own tokens: a Head with the
    same hidden states and a part (V_local, H) of the weight, or logits (..., V_local). All processes get the same loss,
    that of the whole vocabulary, bit for bit.

    Args:
        group: torch.distributed ProcessGroup; None: the default group.
        first: index of this process's first token in the whole vocabulary.
        total: tokens of the whole vocabulary; the parts must cover it without gap or overlap. A part may be empty.
        reduce_hidden: whether the loss sums the gradient of hidden states over the group. False where the layer that
            made them does, as Megatron's column-parallel layers do.

    Raises:
        ValueError: first or total out of range, a group of another type, or torch.distributed not initialized. From the
            loss, on every process: parts that leave a gap or overlap, or processes with different rows, labels, hidden
            states or options.
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
