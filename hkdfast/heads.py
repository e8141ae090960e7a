"""Inputs of the losses other than logits: a language-model head (`Head`), and a purified teacher (`Purified`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from .engine.arguments import autocast_dtype, check_floats, check_number, settled, shown
from .ops.objective import ContrastSpec, Transform
from .split import Split


@dataclass(frozen=True, eq=False)
class Head:
    """Hidden states and the language-model head after them: logits = cap(scale * (hidden @ weight.T + bias)).

    The loss computes these logits tile by tile; they never exist as a whole.

    Args:
        hidden: (..., H) states before the head, any float dtype. Gets a gradient if the Head is a student.
        weight: (V, H), hidden's dtype unless autocast is on. Gets a gradient if the Head is a student.
        bias: (V,) or None, weight's dtype unless autocast is on. Gets a gradient if the Head is a student.
        scale: factor of the logits (Granite and Cohere call it logit scale), positive and finite.
        softcap: if given, logits become softcap * tanh(logits / softcap), as in Gemma 2. Positive.
        split: Split if weight and bias are this process's part of a head that several processes hold.

    Raises:
        ValueError: on shapes, dtypes or devices that differ, on tensors that are not dense (sparse, nested,
            quantized, distributed), or a scale or softcap out of range.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        hidden, weight, bias = self.hidden, self.weight, self.bias
        named = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
        for name, tensor in named.items():
            check_floats(name, tensor)
        if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (..., H) and (V, H) with one H"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias {tuple(bias.shape)} must be ({weight.shape[0]},) for weight {tuple(weight.shape)}")
        for name, tensor in named.items():
            if tensor.device != hidden.device:
                raise ValueError(f"hidden is on {hidden.device} but {name} is on {tensor.device}")
            if tensor.dtype != hidden.dtype and autocast_dtype(hidden.device) is None:
                raise ValueError(f"hidden is {hidden.dtype} but {name} is {tensor.dtype}: cast one, or use autocast")
        check_number("scale", self.scale, "positive and finite", lambda x: 0 < x < math.inf)
        if self.softcap is not None:
            check_number("softcap", self.softcap, "positive and finite", lambda x: 0 < x < math.inf)

    @classmethod
    def from_linear(
        cls, hidden: torch.Tensor, lm_head: torch.nn.Module, scale: float = 1.0, softcap: float | None = None
    ) -> "Head":
        """The Head of a linear layer: `Head(hidden, lm_head.weight, lm_head.bias, scale, softcap)`.

        Args:
            hidden: (..., H) states before the layer.
            lm_head: torch.nn.Linear (H to V), with or without bias. Its weight and bias get a gradient if the Head is a
                student.
            scale, softcap: as in `Head`.

        Raises:
            ValueError: if lm_head is not a torch.nn.Linear. The output of a quantized layer, or of one with an adapter,
                is not hidden @ weight.T + bias. Otherwise as `Head`.
        """
        if not isinstance(lm_head, torch.nn.Linear):
            raise ValueError(f"lm_head must be a torch.nn.Linear, got {shown(lm_head)}: pass its weight to Head(...)")
        return cls(hidden, lm_head.weight, lm_head.bias, scale, softcap)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits: (..., V)."""
        return *self.hidden.shape[:-1], self.weight.shape[0]

    @property
    def transform(self) -> Transform:
        return Transform(float(self.scale), None if self.softcap is None else float(self.softcap))


@dataclass(frozen=True, eq=False)
class Purified:
    """A contrasted teacher, as `hkdfast.purify` returns it."""

    clean: torch.Tensor | Head
    noisy: tuple[torch.Tensor | Head, ...]
    law: ContrastSpec
    alpha: torch.Tensor | None  # (...) contrast weights if law.schedule == "per_row"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.clean.shape)


Source: TypeAlias = torch.Tensor | Head
Parts: TypeAlias = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # (x, weight, bias)


def device_of(source: Source) -> torch.device:
    return source.hidden.device if isinstance(source, Head) else source.device


def transform_of(source: Source) -> Transform:
    return source.transform if isinstance(source, Head) else Transform()


def parts(source: Source, rows: int) -> Parts:
    """The tensors of a source, its leading dimensions flattened: (x, weight, bias)."""
    if isinstance(source, Head):
        hidden = settled(source.hidden)
        return hidden.reshape(rows, hidden.shape[-1]), settled(source.weight), settled(source.bias)
    return settled(source).reshape(rows, source.shape[-1]), None, None


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors share memory, or are one object under torch.compile, which has no addresses."""
    if a is b:
        return True
    if a is None or b is None or torch.compiler.is_compiling():
        return False
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def noisy_transforms(branches: Sequence[Source]) -> tuple[Transform, tuple[Transform, ...]]:
    """(Transform of the mean of the noisy branches, Transform of each before it is averaged).

    A scale that all share is applied to the mean; a softcap cannot be. The second is empty for a single branch.
    """
    transforms = [transform_of(branch) for branch in branches]
    if len(branches) == 1:
        return transforms[0], ()
    if all(each == transforms[0] for each in transforms) and transforms[0].softcap is None:
        return transforms[0], (Transform(),) * len(branches)
    return Transform(), tuple(transforms)
