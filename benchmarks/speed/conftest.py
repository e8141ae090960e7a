"""Every benchmark states its error to float64 beside its time, and the results file how it came about.

On a GPU times are those between two CUDA events, and the peak of the memory taken on top of the inputs stands beside.
What could not run (a peer out of memory, say) is a result too: the file's "failures" tell who and why.

HKDFAST_SECONDS bounds the time of all together. Each may take an equal share of what is left, has fewer rounds where
all of them would not fit, and is skipped where FEWEST would not, as is all that is left at the end. A first run that
compiles has FIRST seconds.
"""

import datetime
import gc
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import hkdfast
from hkdfast.budget import Budget, TooSlow

torch._dynamo.config.cache_size_limit = 64
FAILURES, TIMES = [], []
FIRST, FEWEST = 30, 3
FLOORS = ("copy", "its GEMMs alone")
share = pytest.StashKey()  # seconds of the benchmark that runs, where there is a bound
budget = pytest.StashKey()


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


def pytest_collection_finish(session):
    if os.environ.get("HKDFAST_SECONDS"):
        session.config.stash[budget] = Budget(float(os.environ["HKDFAST_SECONDS"]), len(session.items))


def pytest_runtest_setup(item):
    whole = item.config.stash.get(budget, None)
    if whole is not None:
        item.stash[share] = whole.begin(item.name)
        if not whole.left():
            pytest.skip(f"the {whole.seconds:g} s for all are over")


@contextmanager
def within(seconds, what):
    """Raise TooSlow in a block that takes longer, as soon as Python has its turn. Without signals it ends by itself."""
    if seconds is None or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TooSlow(f"{what} took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rounds_within(seconds, call, rounds, iterations, compiles):
    """How many rounds fit into the seconds, after two runs. Raises TooSlow if not even FEWEST do."""
    end = time.perf_counter() + seconds
    with within(max(seconds, FIRST) if compiles else seconds, "the first run"):
        call()
    begun = time.perf_counter()
    with within(seconds, "the second run"):
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    now = time.perf_counter()
    one, left = (now - begun) * iterations, seconds if compiles else end - now
    fewest = min(rounds, FEWEST)
    if fewest * one > left:
        raise TooSlow(f"a round takes {one:.1f} s, and {fewest} of them have {max(0, left):.1f} s")
    return min(rounds, int(left / one))


def lost(why):
    """Whether an error leaves a device that answers nothing any more in this process."""
    return any(words in why for words in ("illegal", "misaligned", "launch failure", "device-side assert"))


@pytest.fixture
def timed(benchmark, request):
    """Times a call: timed(call, who=..., what=..., shape=...) returns what its last run returned.

    A peer that fails is recorded among the failures and skipped, as is whatever would take too long; hkdfast that fails
    is a failed test.
    """

    def run(call, iterations=1, rounds=9, **info):
        benchmark.extra_info |= info
        warmups = 2
        try:
            if share in request.node.stash:
                compiles = torch.cuda.is_available() or "compile" in info["who"]
                rounds = rounds_within(request.node.stash[share], call, rounds, iterations, compiles)
                warmups = 0  # it has had two
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                benchmark.extra_info["peak memory"] = torch.cuda.max_memory_allocated() - before
            found = benchmark.pedantic(call, warmup_rounds=warmups, rounds=rounds, iterations=iterations)
            TIMES.append({**info, "seconds": benchmark.stats.stats.median if benchmark.stats else None})
            return found
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            if info["who"].startswith("hkdfast") and not lost(why) and not isinstance(error, TooSlow):
                raise
            FAILURES.append({**info, "why": why})
            if lost(why):  # what was measured is written
                pytest.exit(f"{info['who']}: {why}: run the stage again with PYTEST_ADDOPTS='--deselect ...'", 3)
        # out here the traceback holds none of its tensors any more
        gc.collect()
        pytest.skip(f"{info['who']}: {FAILURES[-1]['why']}")

    return run


@pytest.fixture
def interleaved(benchmark, request):
    """Times a call, and another one before each of its rounds, so that both meet the same machine:
    interleaved(call, other, clock, who=..., what=..., shape=...) returns the seconds of the other's rounds, by the
    clock that the benchmark is marked with. At most seven rounds."""

    def run(call, other, clock, rounds=7, **info):
        benchmark.extra_info |= info
        seconds = []

        def first():
            start = clock()
            other()
            seconds.append(clock() - start)

        if share in request.node.stash:
            try:
                rounds = rounds_within(request.node.stash[share], lambda: (first(), call()), rounds, 1, False)
            except TooSlow as error:
                FAILURES.append({**info, "why": f"TooSlow: {error}"})
                pytest.skip(str(error))
        benchmark.pedantic(call, setup=first, warmup_rounds=1, rounds=rounds, iterations=1)
        if benchmark.stats:
            TIMES.append({**info, "seconds": benchmark.stats.stats.median})
            TIMES.append({**info, "who": "unpatched", "seconds": statistics.median(seconds[-rounds:])})
        return seconds[-rounds:]

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


def meaning(times, failures, skipped):
    """What the times say, in one sentence."""
    settings = defaultdict(dict)
    for one in times:
        if one["who"] not in FLOORS and one["seconds"] is not None:
            side = "hkdfast" if one["who"].startswith("hkdfast") else "peer"
            sides = settings[one["what"], one["shape"]]
            sides[side] = min(sides.get(side, one["seconds"]), one["seconds"])
    ratios = sorted(sides["hkdfast"] / sides["peer"] for sides in settings.values() if len(sides) == 2)
    late = skipped - len(failures)
    left = f"; {len(failures)} failed or would have taken too long, {late} came too late" if skipped else ""
    if not ratios:
        return f"{len(times)} benchmarks ran, and none can be compared with a peer{left}."
    faster = sum(ratio < 1 for ratio in ratios)
    return (
        f"hkdfast is faster than its fastest peer in {faster} of {len(ratios)} settings, at {ratios[0]:.2g} to "
        f"{ratios[-1]:.2g} of its time{left}."
    )


@pytest.hookimpl(trylast=True)  # below the tables
def pytest_terminal_summary(terminalreporter):
    skipped = len(terminalreporter.stats.get("skipped", ()))
    if TIMES or FAILURES:
        terminalreporter.write_line(meaning(TIMES, FAILURES, skipped))


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
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
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
    settings = [
        f"{name}={os.environ[name]}"
        for name in ("HKDFAST_TINY", "HKDFAST_BACKEND", "HKDFAST_CUDA_PLAN", "HKDFAST_SECONDS")
        if name in os.environ
    ]
    output_json["command"] = shlex.join([*settings, "pytest", *sys.argv[1:]])
    output_json["failures"] = FAILURES
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
