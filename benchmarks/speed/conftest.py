"""Every benchmark states its error to float64 beside its time, and the results file how it came about.

On a GPU times are those between two CUDA events, and the peak of the memory taken on top of the inputs stands beside.
What could not run (a peer out of memory, say) is a result too: the file's "failures" tell who and why.
"""

import datetime
import gc
import os
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import hkdfast

torch._dynamo.config.cache_size_limit = 64
FAILURES = []


class DeviceClock:
    """Seconds by the device's own clock, summed up from event to event: a float32 of hours has no microseconds."""

    __name__ = "cuda events"

    def __init__(self):
        self.seconds, self.last = 0.0, None

    def __call__(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:
            self.seconds += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.seconds


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        clock = DeviceClock()
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.benchmark(timer=clock))


def lost(why):
    """Whether an error leaves a device that answers nothing any more in this process."""
    return any(words in why for words in ("illegal", "misaligned", "launch failure", "device-side assert"))


@pytest.fixture
def timed(benchmark):
    """Times a call: timed(call, who=..., what=..., shape=...) returns what its last run returned.

    A peer that fails is recorded among the failures and skipped; hkdfast that fails is a failed test.
    """

    def run(call, iterations=1, rounds=9, **info):
        benchmark.extra_info |= info
        try:
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                benchmark.extra_info["peak memory"] = torch.cuda.max_memory_allocated() - before
            return benchmark.pedantic(call, warmup_rounds=2, rounds=rounds, iterations=iterations)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            if info["who"].startswith("hkdfast") and not lost(why):
                raise
            FAILURES.append({**info, "why": why})
            if lost(why):  # what was measured is written
                pytest.exit(f"{info['who']}: {why}: run the stage again with PYTEST_ADDOPTS='--deselect ...'", 3)
        # out here the traceback holds none of its tensors any more
        gc.collect()
        pytest.skip(f"{info['who']}: {FAILURES[-1]['why']}")

    return run


@pytest.fixture
def step(timed):
    """Times loss and gradients of a function of tensors; returns (loss, gradients) of its last call."""

    def run(loss, tensors, trained, **info):
        leaves = [t.detach().requires_grad_(i < trained) for i, t in enumerate(tensors)]

        def once():
            for leaf in leaves:
                leaf.grad = None
            value = loss(*leaves)
            value.backward()
            return value.detach()

        value = timed(once, **info)
        return value, [leaf.grad for leaf in leaves[:trained]]

    return run


def driver():
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def pytest_benchmark_update_machine_info(config, machine_info):
    gpu = torch.cuda.is_available()
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if gpu else None
    machine_info["gpu_memory"] = torch.cuda.get_device_properties(0).total_memory if gpu else None
    machine_info["driver"] = driver() if gpu else None
    machine_info["cuda"] = torch.version.cuda


def pytest_benchmark_update_json(config, benchmarks, output_json):
    packages = ("torch", "triton", "trl", "liger-kernel", "transformers")
    versions = {"hkdfast": hkdfast.__version__}  # which may run from a checkout that is not installed
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    output_json["versions"] = versions
    output_json["date"] = datetime.date.today().isoformat()
    settings = [f"{name}={os.environ[name]}" for name in ("HKDFAST_TINY", "HKDFAST_BACKEND") if name in os.environ]
    output_json["command"] = shlex.join([*settings, "pytest", *sys.argv[1:]])
    output_json["failures"] = FAILURES
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
