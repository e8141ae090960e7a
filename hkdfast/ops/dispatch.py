"""Which implementation runs. A backend is a module with the functions of reference.py."""

import os
import warnings
from importlib import import_module

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


def validate(name):
    """The backend's name, after a look that there is one of that name."""
    if name is not None and (not isinstance(name, str) or name not in MODULES):
        wrong = repr(name) if isinstance(name, str) else type(name).__name__
        raise ValueError(f"unknown backend {wrong}, expected one of {', '.join(MODULES)}")
    return name


def load(name):
    """The module of a backend that runs here; else an ImportError that says why it does not."""
    module = import_module(MODULES[validate(name)])
    if why := getattr(module, "unusable", str)():
        raise ImportError(f"the {name} backend does not run here: {why}")
    return module


def backends():
    """What runs here: {"reference": "ok", "cpu": "ModuleNotFoundError: No module named 'hkdfast._cpu'", ...}.

    "ok": a call with this backend would run, on tensors of a device that it is for; anything else says why it would
    not. Triton is ok on a GPU that it can compile for, or where TRITON_INTERPRET=1 made it an interpreter. A backend
    that is usable but not for every row has a second entry, "cuda-rows", that says for which.
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


def host_readable(tensor):
    """Whether the host can look at a tensor's numbers without waiting for a device or breaking a compiled graph."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def is_traced(tensor):
    """Whether a tensor has no numbers yet, and only operators can take it: torch.compile looks on, or it is fake or
    meta."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta


def find(device, dtype, backend=None):
    """The backend module for tensors of this device and dtype: the one asked for, or the fastest that is built here.

    A backend is asked for by argument or, for the whole process, by HKDFAST_BACKEND; then a missing one raises, and so
    does the backend on what is not for it.
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


def fallback_for(name, device, dtype, why):
    """The backend that takes over where this one cannot, as with a row that is too long for it. Why is told once."""
    order = ORDER[device.type]
    return first_usable(order[order.index(name) + 1 :], dtype, (why,))


def first_usable(names, dtype, skipped=()):
    """The first of these backends that is usable here and takes this dtype.

    Told once: that it is the reference, and that it took over from others; skipped says why they were skipped.
    """
    why = list(skipped)
    for name in names:
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


_warned = set()


def warn_fallback(name, why):
    """Say once that a slower backend runs, and why."""
    if (name, why) not in _warned:
        _warned.add((name, why))
        warnings.warn(
            f"hkdfast runs on its {name} backend, which is slower; missing: {'; '.join(why)}",
            stacklevel=4,
        )
