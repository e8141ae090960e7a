"""Checks of a single argument (a word, a number, a flag, a dense tensor), and helpers for autocast."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.dispatch import is_traced

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DENSE = {  # how to convert a tensor of another layout to a dense one
    "quantized": ".dequantize()",
    "nested": "padded or concatenated rows",
    "sparse": ".to_dense()",
    "mkldnn": ".to_dense()",
}


def shown(value: object) -> str:
    """A wrong value as an error message shows it: shortened, an array by its shape."""
    kind = type(value).__name__
    if isinstance(value, (Real, str)) or value is None:
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if hasattr(value, "shape"):
        return f"{kind} {tuple(value.shape)}"
    return f"{kind} of {len(value)}" if isinstance(value, (list, tuple, dict, set)) else kind


def check_word(name: str, word: object, words: Collection[str]) -> None:
    if not isinstance(word, str) or word not in words:
        raise ValueError(f"unknown {name} {shown(word)}, expected one of {', '.join(words)}")


def check_flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise ValueError(f"{name} must be True or False, got {shown(value)}")


def check_constant(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that requires a gradient for an argument that gets none."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gets no gradient, but requires one: pass {name}.detach()")


def check_number(name: str, value: Any, what: str, within: Callable[[Any], Any]) -> None:
    """Require a real number, or a tensor with one element, that satisfies `within`; `what` says so in words."""
    if isinstance(value, torch.Tensor):
        check_constant(name, value)
        good = value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
    else:
        good = isinstance(value, Real) and not isinstance(value, bool)
    if not good:
        raise ValueError(f"{name} must be {what}, got {shown(value)}")
    if not within(value):
        raise ValueError(f"{name} must be {what}, got {value}")


def check_whole(name: str, value: Any, what: str, within: Callable[[Any], Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not within(value):
        raise ValueError(f"{name} must be {what}, got {shown(value)}")


def check_floats(name: str, x: Any) -> None:
    """Require a dense tensor of a floating-point dtype that the losses support."""
    if not isinstance(x, torch.Tensor):
        hint = {"Linear": f": pass its .weight as {name}", "ndarray": ": pass torch.from_numpy(...)"}
        raise ValueError(f"{name} must be a floating point tensor, got {shown(x)}{hint.get(type(x).__name__, '')}")
    check_plain(name, x)
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if x.dtype not in FLOATS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ValueError(f"{name} must be one of {known}, got {x.dtype}")


def check_plain(name: str, x: Any) -> None:
    """Require a dense tensor with its own memory, because the kernels receive its address."""
    if not x.is_nested and is_traceable_wrapper_subclass(x):
        how = (
            "pass .full_tensor(), or .to_local() of whole rows" if hasattr(x, "full_tensor") else "pass a plain tensor"
        )
        raise ValueError(f"{name} is a {type(x).__name__}, whose data is in other tensors: {how}")
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise ValueError(f"{name} is inside a transform of torch.func, which the losses do not support: use autograd")
    if x.layout is not torch.strided or x.is_nested or x.is_quantized:
        layout = str(x.layout).removeprefix("torch.").strip("_").partition("_")[0]
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else layout
        raise ValueError(f"{name} is a {kind} tensor: pass {DENSE.get(kind, 'a dense tensor')}")
    if not is_traced(x) and not x.data_ptr() and x.numel() and not x._is_zerotensor():
        raise ValueError(f"{name} {tuple(x.shape)} has no memory: its storage was freed or is elsewhere")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast casts the operands of a linear layer, or None without autocast."""
    known = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if known else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def settled(x: Any) -> Any:
    """The tensor with its values in memory: a lazy negation and lazy zeros are materialized."""
    if x is None or torch.compiler.is_compiling():
        return x
    if x.is_neg():
        x = x.resolve_neg()
    return x + 0 if x._is_zerotensor() else x
