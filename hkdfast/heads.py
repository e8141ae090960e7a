"""Where a tile of logits comes from, and how its gradient goes back.

Head and Purified are what the public functions take. Inside the tile loop a side is a Logits, a Projection or an
Average: three classes with the same few methods. Their tiles hold the numbers before scale and softcap, which the row
operation applies.
"""

import math
from dataclasses import dataclass

import torch

from .engine.arguments import autocast_dtype, check_floats, check_number, settled
from .ops.objective import ContrastSpec, Transform


@dataclass(frozen=True, eq=False)
class Head:
    """A language-model head not multiplied out yet: logits = cap(scale * (hidden @ weight.T + bias)).

    Args:
        hidden: (..., H) states that enter the head, any float dtype. Gets a gradient as the student's.
        weight: (V, H), hidden's dtype unless autocast is on. Gets a gradient as the student's.
        bias: (V,) or None, weight's dtype unless autocast is on. Gets a gradient as the student's.
        scale: factor of the logits (Granite and Cohere call it logit scale), positive and finite.
        softcap: if given, logits become softcap * tanh(logits / softcap), as in Gemma 2. Positive.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, on tensors that are not dense (sparse, nested,
            quantized, distributed), or a scale or softcap out of range.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
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

    @property
    def shape(self):
        """Of the logits: (..., V)."""
        return *self.hidden.shape[:-1], self.weight.shape[0]

    @property
    def transform(self):
        return Transform(float(self.scale), None if self.softcap is None else float(self.softcap))


@dataclass(frozen=True, eq=False)
class Purified:
    """A teacher contrasted row by row: what `hkdfast.purify` returns."""

    clean: torch.Tensor | Head
    noisy: tuple[torch.Tensor | Head, ...]
    law: ContrastSpec
    alpha: torch.Tensor | None  # (...) weights of the rows if law.weight == "rows"

    @property
    def shape(self):
        return tuple(self.clean.shape)


def device_of(source):
    return source.hidden.device if isinstance(source, Head) else source.device


def transform_of(source):
    return source.transform if isinstance(source, Head) else Transform()


def parts(source, rows):
    """The tensors of a source, its leading dimensions made one: (x, weight, bias)."""
    if isinstance(source, Head):
        hidden = settled(source.hidden)
        return hidden.reshape(rows, hidden.shape[-1]), settled(source.weight), settled(source.bias)
    return settled(source).reshape(rows, source.shape[-1]), None, None


def same(a, b):
    """Whether two tensors are one memory, or one object where torch.compile looks on, which knows no addresses."""
    if a is b:
        return True
    if a is None or b is None or torch.compiler.is_compiling():
        return False
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def noisy_transforms(branches):
    """(Transform of the mean of the disturbed branches, Transform of each before it is averaged).

    A scale that all share is left to the mean, a softcap cannot be. The second is empty where there is one branch.
    """
    transforms = [transform_of(branch) for branch in branches]
    if len(branches) == 1:
        return transforms[0], ()
    if all(each == transforms[0] for each in transforms) and transforms[0].softcap is None:
        return transforms[0], (Transform(),) * len(branches)
    return Transform(), tuple(transforms)
