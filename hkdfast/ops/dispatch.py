"""The choice of a backend: a module with the functions `rows` and `contrast` of reference.py."""

import os
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

# Fastest first, per device type. The reference runs everywhere, so no call is skipped without a home.
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
MODULES = {
    "cpu": "hkdfast.ops.cpu",
    "cuda": "hkdfast.ops.cuda",
    "triton": "hkdfast.kernels.distill",
    "reference": "hkdfast.ops.reference",
}
# Types of the devices whose tensors a backend takes; the reference takes any, Triton's interpreter the CPU's too.
DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}
# Dtypes of the tiles; the reference takes any.
DTYPES = {name: (torch.float32, torch.bfloat16, torch.float16) for name in ("cpu", "cuda", "triton")}


def validate(name: Any) -> Any:
    """The backend's name, if there is a backend of that name, or None."""
    if name is not None and (not isinstance(name, str) or name not in MODULES):
        wrong = repr(name) if isinstance(name, str) else type(name).__name__
        raise ValueError(f"unknown backend {wrong}, expected one of {', '.join(MODULES)}")
    return name


def load(name: str) -> ModuleType:
    """The module of a backend. Raises an ImportError with the reason if it does not run here."""
    module = import_module(MODULES[validate(name)])
    if why := getattr(module, "unusable", str)():
        raise ImportError(f"the {name} backend does not run here: {why}")
    return module


def backends() -> dict[str, str]:
    """What runs here: {"reference": "ok", "cpu": "ModuleNotFoundError: No module named 'hkdfast._cpu'", ...}.

    "ok": a call with this backend runs on tensors of its device types; anything else is the reason why it does not.
    Triton is ok on a GPU for which it can compile, or with TRITON_INTERPRET=1 as an interpreter. A backend that does
    not take every row has a second entry, "cuda-rows", with the rows that it takes.
    """
    report = {}
    for name in MODULES:
        try:
            module = load(name)
            report[name] = "ok"
            if hasattr(module, "limits"):
                report[f"{name}-rows"] = module.limits()
        except ImportError as error:
            report[name] = f"{type(error).__name__}: {error}"
    return report


def host_readable(tensor: torch.Tensor) -> bool:
    """Whether the host can read a tensor's values without waiting for a device or breaking a compiled graph."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no values, so that only operators take it: under torch.compile, or a fake or meta tensor."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta


def find(device: torch.device, dtype: torch.dtype, backend: str | None = None) -> Any:
    """The backend module for tensors of this device and dtype: the one named, or the fastest that runs here.

    A backend is named by the argument or, for the whole process, by HKDFAST_BACKEND. A named backend that does not run
    here raises, and so does one on tensors that it does not take.
    """
    backend = validate(backend or os.environ.get("HKDFAST_BACKEND") or None)
    if backend is not None:
        if dtype not in DTYPES.get(backend, (dtype,)):
            raise ValueError(f"backend {backend!r} takes {DTYPES[backend]}, not {dtype}; the reference takes any")
        module = load(backend)
        takes = DEVICES.get(backend, (device.type,)) + getattr(module, "more_devices", tuple)()
        if device.type not in takes:
            raise ValueError(f"the {backend} backend takes tensors on {' or '.join(takes)}, not on {device.type}")
        return getattr(module, "by_name", module)
    return first_usable(ORDER.get(device.type, ("reference",)), dtype)


def fallback_for(name: str, device: torch.device, dtype: torch.dtype, why: str) -> ModuleType:
    """The next backend after this one, which cannot run, e.g. because a row is too long. Warns once with why."""
    order = ORDER[device.type]
    return first_usable(order[order.index(name) + 1 :], dtype, (why,))


def first_usable(names: Sequence[str], dtype: torch.dtype, skipped: tuple[str, ...] = ()) -> ModuleType:
    """The first of these backends that runs here and takes this dtype.

    Args:
        skipped: why the backends before these were skipped. A warning, once, reports them, and a fall to the reference.
    """
    why = list(skipped)
    for name in names:  # the reference, the last of every order, always runs
        if dtype not in DTYPES.get(name, (dtype,)):
            continue
        try:
            found = load(name)
        except ImportError as error:
            why.append(f"{name}: {error}")
            continue
        if skipped or why and name == "reference":
            warn_fallback(name, tuple(why))
        return found
    raise ImportError(f"no backend for {dtype}: {'; '.join(why)}")


_warned: set[tuple[str, tuple[str, ...]]] = set()


def warn_fallback(name: str, why: tuple[str, ...]) -> None:
    """Warn once that a slower backend runs, and why."""
    if (name, why) not in _warned:
        _warned.add((name, why))
        warnings.warn(
            f"hkdfast runs on its {name} backend, which is slower; missing: {'; '.join(why)}",
            stacklevel=4,
        )
