"""The speed benchmarks under a bound of time."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "speed"

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="not a checkout")
pytest.importorskip("pytest_benchmark")

SLOW = """
import time, functools

def pytest_configure():
    import peers
    for who, seconds in {"eager": 1.0, "compiled": 0.3}.items():
        peers.PURIFIED[who] = functools.partial(slow, [], seconds, peers.eager_purified)

def slow(ran, seconds, loss, *args):
    if seconds == 1.0 or not ran:  # as what is compiled at the first run
        time.sleep(seconds)
    ran.append(1)
    return loss(*args)
"""


@pytest.mark.slow
def test_what_takes_too_long_is_left_out_with_the_reason(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "slow", "-p", "no:cacheprovider", "-k", "bench_seed",
         "--benchmark-json", tmp_path / "part.json", "benchmarks/speed/bench_logits.py"],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HKDFAST_TINY": "1", "HKDFAST_SECONDS": "9"},
    )  # fmt: skip
    assert done.returncode == 0 and "2 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "eager: TooSlow: a round takes 1.0 s, and 3 of them have" in done.stdout
    assert re.search(r"hkdfast is faster than its fastest peer in \d of 1 settings, .*; 1 failed or would", done.stdout)
    (failure,) = json.loads((tmp_path / "part.json").read_text())["failures"]
    assert failure["who"] == "eager" and failure["why"].startswith("TooSlow")


def conftest():
    spec = spec_from_file_location("speed_conftest", FOLDER / "conftest.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_first_run_without_end_is_stopped():
    module = conftest()
    start = time.monotonic()
    with pytest.raises(module.TooSlow, match="the first run took more than 0 s"):
        with module.within(0.3, "the first run"):
            while True:
                time.sleep(0.01)
    assert time.monotonic() - start < 2
    with module.within(0.1, "nothing"):
        pass
    time.sleep(0.2)  # nothing rings later


def test_fewer_rounds_where_all_would_not_fit():
    module = conftest()

    def call():
        time.sleep(0.02)

    assert module.rounds_within(5, call, 9, 1, False) == 9
    assert 3 <= module.rounds_within(0.16, call, 9, 1, False) <= 6
    with pytest.raises(module.TooSlow, match="a round takes 0.1 s, and 3 of them have 0.1 s"):
        module.rounds_within(0.16, call, 9, 5, False)
    assert module.rounds_within(0.04, call, 1, 1, True) == 1  # the first run is not counted where it may compile


TIMES = [("eager", 2.0), ("hkdfast, cpu", 1.5), ("hkdfast, triton", 1.0), ("its GEMMs alone", 0.1)]


def test_the_times_are_told_in_one_sentence():
    times = [dict(who=who, what="heads", shape="A", seconds=seconds) for who, seconds in TIMES]
    times += [dict(who="hkdfast", what="logits", shape="A", seconds=3.0), dict(times[0], what="SEED")]
    module = conftest()
    told = module.meaning(times, [], 0)
    assert told == "hkdfast is faster than its fastest peer in 1 of 1 settings, at 0.5 to 0.5 of its time."
    assert module.meaning(times, [{}], 3).endswith("; 1 failed or would have taken too long, 2 came too late.")
    assert "none can be compared with a peer" in module.meaning(times[-1:], [], 0)


@pytest.mark.slow
def test_all_that_is_left_at_the_end_is_skipped(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "bench_contrast", FOLDER],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HKDFAST_TINY": "1", "HKDFAST_SECONDS": "1e-9"},
    )  # fmt: skip
    assert "2 skipped" in done.stdout and "the 1e-09 s for all are over" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_step_of_a_trainer_is_measured_with_and_without(tmp_path):
    """The loss of both is right, and its row is in the table of trainers and in no other."""
    pytest.importorskip("trl")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "GKDTrainer",
         "--benchmark-json", tmp_path / "part.json", "benchmarks/speed/bench_trainers.py"],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HKDFAST_TINY": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "part.json").read_text())["benchmarks"]
    assert found["extra_info"]["loss error"] < 1e-5 and found["extra_info"]["unpatched"]["loss error"] < 1e-4
    table = import_module("speed_table")
    (row,) = table.trainer_rows(tmp_path / "part.json")
    ratio = found["stats"]["median"] / found["extra_info"]["unpatched"]["median"]
    assert row[0] == "GKDTrainer, beta 0.5, tiny" and row[2].startswith(f"{ratio:.2f}x (")
    assert list(table.rows(tmp_path / "part.json")) == []
