"""hkdfast doctor: show what is installed, which backends run here, and why the others do not."""

import os
import platform
from pathlib import Path

import torch

from .. import __version__, backends
from ..ops import cuda_plan
from ..ops.native import not_built
from .extras import extras, version


def add_arguments(parser):
    pass


def run(args):
    for title, rows in report().items():
        print(title)
        width = max(map(len, rows))
        for name, fact in rows.items():
            print(f"  {name.ljust(width)}  {fact}")


def report():
    """{title: {name: fact}}, all strings."""
    return {
        "versions": {
            "hkdfast": f"{__version__} in {Path(__file__).parents[1]}",
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            "torch": torch.__version__,
            "triton": version("triton") or version("pytorch-triton") or "not installed",
        },
        "backends": backends() | {"HKDFAST_BACKEND": os.environ.get("HKDFAST_BACKEND") or "not set"},
        "processor": processor(),
        "GPU": (gpus() or {"none": gpu_reason()}) | {"CUDA kernels of hkdfast": cuda_kernels()},
        **cuda_plans(),
        "extras": {extra: extra_fact(extra, packages) for extra, packages in extras().items()}
        or {"unknown": "hkdfast is not installed (pip install -e .), so it has no metadata to read them from"},
    }


def processor():
    try:
        from .. import _cpu

        used = ", ".join(_cpu.instruction_sets()) + " (the first is used)"
    except ImportError:
        used = "none, the cpu backend is missing"
    return {
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "instructions of hkdfast": used,
        "instructions of torch": torch.backends.cpu.get_cpu_capability(),
    }


def cuda_kernels():
    try:
        from .. import _cuda

        return "built for " + ", ".join(f"sm_{arch}" for arch in _cuda.architectures.split())
    except ImportError:
        return f"not built: {not_built('_cuda')}"


def cuda_plans():
    """{title: {rows: how the CUDA kernels lay them out}}, for the first GPU on which they run, else for an H200."""
    try:
        from .. import _cuda
    except ImportError:
        return {}  # said under GPU
    index = next((i for i in range(torch.cuda.device_count()) if not _cuda.missing(i)), None)
    machine = cuda_plan.H200 if index is None else _cuda.machine(index)
    device = "an H200, which is not here" if index is None else f"GPU {index}"
    try:
        asked = cuda_plan.request(cuda_plan.text())
        rows = {cuda_plan.NAME: cuda_plan.text() or "not set"} | cuda_plan.plans(_cuda.plan, machine, asked)
    except ValueError as error:
        rows = {cuda_plan.NAME: str(error)}
    return {f"plans of the CUDA kernels on {device}": rows}


def gpus():
    """{"0": "NVIDIA H200, sm_90, 141 GB", ...}"""
    found = {}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        arch = getattr(facts, "gcnArchName", None) if torch.version.hip else f"sm_{facts.major}{facts.minor}"
        found[str(index)] = f"{facts.name}, {arch}, {facts.total_memory / 1e9:.0f} GB"
    return found


def gpu_reason():
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU only"
    return "torch finds no device"


def extra_fact(extra, packages):
    missing = [name for name, installed in packages.items() if installed is None]
    facts = ", ".join(f"{name} {installed or 'missing'}" for name, installed in packages.items())
    return facts + (f" (pip install 'hkdfast[{extra}]')" if missing else "")
