"""benchmarks/speed/gpu.sh without a GPU: every stage in shapes that take seconds, and what becomes of its results."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "speed" / "gpu.sh"
HEADS = {"bench_heads", "bench_gemms"}
BENCHMARKS = {
    "logits": {"bench_logits", "bench_seed", "bench_contrast", "bench_copy"},
    "heads-a": HEADS,
    "frozen-a": HEADS,
    "heads-bd": HEADS,
    "coupled": {"bench_coupled", "bench_coupled_gemms"},
    "errors": {"bench_errors"},
    "steps": {"bench_language_model", "bench_seed"},
    "vocabulary": {"bench_vocabulary"},
    "heads-more": HEADS,
    "frozen": HEADS,
    "tokens": {"bench_tokens"},
}
OTHERS = {
    "build",
    "smoke",
    "plans",
    "correct",
    "sanitize",
    "compiled",
    "compiled-more",
}  # no peer compiles in tiny shapes

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="not a checkout")
for package in ("pytest_benchmark", "trl", "liger_kernel", "matplotlib"):
    pytest.importorskip(package)


def run(*args, **environment):
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([SCRIPT, *args], capture_output=True, text=True, env=os.environ | settings)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What all stages leave in $OUT."""
    out = tmp_path_factory.mktemp("gpu")
    code, said = run("--rehearse", OUT=str(out), HKDFAST_SITE=str(out / "site"))
    assert code == 0, said[-4000:]
    return out


@pytest.mark.slow
def test_every_stage_runs_and_leaves_its_log(parts):
    log = (parts / "gpu.log").read_text()
    told = {one.split("\n")[0]: one for one in log.split("\n=== ")[1:] if "done" not in one.split("\n")[0]}
    assert set(told) == OTHERS | set(BENCHMARKS)
    assert " passed" in told["correct"] and "3 cases ran" in told["sanitize"]
    assert "216 cases are right" in told["smoke"] and "GB/s" in told["plans"]


def test_a_call_leaves_as_many_files_as_come_back_from_the_machine_that_is_lent():
    for group in ("FIRST", "SECOND"):
        stages = re.search(rf"^{group}=\((.*)\)$", SCRIPT.read_text(), re.M)[1].split()
        assert len({*stages} - OTHERS | {*stages} & {"compiled"}) + 1 <= 8  # and the log


@pytest.mark.slow
def test_the_rehearsal_ends_with_the_seconds_of_each_stage(parts):
    table = (parts / "gpu.log").read_text().split("expected there, s\n")[1]
    rows = dict(re.findall(r"^(\S+) +(\d+) +\d+$", table, re.M))
    assert set(rows) == OTHERS | set(BENCHMARKS)
    sums = dict(re.findall(r"^all of (\w+) +(\d+)$", table, re.M))
    assert int(sums["first"]) + int(sums["second"]) <= 900 - 120 - 60  # start and transfers


@pytest.mark.slow
@pytest.mark.parametrize("stage", BENCHMARKS)
def test_a_stage_measures_what_it_says(parts, stage):
    part = json.loads((parts / f"{stage}.json").read_text())
    names = {benchmark["name"].split("[")[0] for benchmark in part["benchmarks"]}
    assert names == BENCHMARKS[stage] and part["failures"] == []
    for benchmark in part["benchmarks"]:
        info = benchmark["extra_info"]
        assert info["who"] and info["what"] and info["shape"] and benchmark["stats"]["rounds"] in (1, 3, 9)
        if info["who"].startswith("hkdfast") and "float32 tiles" in info["who"] and "gradient error" in info:
            assert info["gradient error"] < 4e-3, info


@pytest.mark.slow
def test_the_parts_become_one_file_with_figures_and_a_table(parts, tmp_path, monkeypatch):
    collect, figures, table = (import_module(name) for name in ("collect", "figures", "speed_table"))
    monkeypatch.setattr(sys, "argv", ["collect.py", str(parts), "--into", str(tmp_path), "--name", "here"])
    collect.main()
    path = tmp_path / "here.json"
    whole = json.loads(path.read_text())
    assert len(whole["benchmarks"]) == sum(len(json.loads(p.read_text())["benchmarks"]) for p in parts.glob("*.json"))
    assert len(whole["command"]) == len(BENCHMARKS) and whole["versions"]["torch"] and whole["date"]
    drawn = {figure.stem.removeprefix("here-") for figure in figures.draw(path)}
    times = {f"{what}-time" for what in ("heads", "logits", "seed", "coupled")}
    assert times | {"vocabulary", "tokens", "error", "fraction"} <= drawn
    rows = list(table.rows(path))
    assert any("three heads" in row[0] for row in rows)
    assert any("frozen head" in row[0] for row in rows) and not any("tokens" in row[0] for row in rows)
    assert all(row[2].endswith("x") for row in rows)  # each knows its floor


@pytest.mark.slow
def test_what_is_cut_off_keeps_what_it_has_measured(tmp_path):
    """A stage is interrupted, not killed, so that pytest-benchmark writes its figures; the next ones do not begin."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ndef pytest_runtest_setup(item):\n    time.sleep(6)\n")
    code, said = run(
        "--tiny", "--seconds", "60", "logits", "coupled",
        OUT=str(tmp_path), PYTHONPATH=str(tmp_path), PYTEST_ADDOPTS="-p slow",
    )  # fmt: skip
    assert code == 1 and "out of time" in said and "failed: logits coupled" in said
    found = json.loads((tmp_path / "logits.json").read_text())["benchmarks"]
    assert 1 <= len(found) < 10 and not (tmp_path / "coupled.json").exists()


def test_nothing_is_measured_without_what_is_to_be_measured(tmp_path):
    code, said = run("--tiny", "build", "logits", OUT=str(tmp_path), PYTHON="false")
    assert code == 1 and "failed: build; the log is" in said and not (tmp_path / "logits.json").exists()


def part(gpu="one", **benchmarks):
    return {
        "machine_info": {"gpu": gpu},
        "commit_info": {},
        "versions": {},
        "date": "",
        "command": "",
        "failures": [],
        "benchmarks": [
            {
                "name": name,
                "fullname": name,
                "stats": dict.fromkeys(import_module("collect").STATISTICS, seconds),
                "extra_info": {"who": "hkdfast", "what": "logits", "shape": "", "gradient error": 1.0},
            }
            for name, seconds in benchmarks.items()
        ],
    }


def test_parts_of_two_machines_are_refused():
    with pytest.raises(SystemExit, match="machine_info.gpu"):
        import_module("collect").merge([part("one"), part("another")])


def test_a_stage_run_again_replaces_its_figures():
    merged = import_module("collect").merge([part(a=1.0, b=1.0), part(b=2.0)])
    assert [one["stats"]["median"] for one in merged["benchmarks"]] == [1.0, 2.0]


@pytest.mark.slow
def test_a_peer_out_of_memory_is_a_result(tmp_path):
    (tmp_path / "full.py").write_text(
        "import torch\n"
        "def pytest_configure():\n"
        "    import peers\n"
        "    def full(*args):\n"
        "        raise torch.OutOfMemoryError('of nothing left')\n"
        "    peers.PURIFIED['eager'] = full\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "full", "-p", "no:cacheprovider", "-k", "bench_seed",
         "--benchmark-json", tmp_path / "part.json", "benchmarks/speed/bench_logits.py"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path), "HKDFAST_TINY": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    (failure,) = json.loads((tmp_path / "part.json").read_text())["failures"]
    assert failure["who"] == "eager" and failure["why"] == "OutOfMemoryError: of nothing left"
    (row,) = import_module("speed_table").rows(tmp_path / "part.json")
    assert row[3] == "out of memory"


def test_an_unknown_stage_is_named():
    code, said = run("bench")
    assert code == 2 and "unknown stage 'bench'" in said and "heads-bd" in said


def test_time_is_summed_from_event_to_event(monkeypatch):
    """Milliseconds of a float32 since the first event would be off by 0.06 after ten minutes."""
    from importlib.util import module_from_spec, spec_from_file_location

    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return torch.tensor((other.at - self.at) * 1e3, dtype=torch.float32).item()

    spec = spec_from_file_location("speed_conftest", SCRIPT.with_name("conftest.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = module.DeviceClock()
    clock()
    now[0] = 3600.0
    start = clock()
    now[0] += 1.7e-6
    assert clock() - start == pytest.approx(1.7e-6, rel=1e-2)


PROGRAMS = [*ROOT.glob("tests/tools/*.py"), *(ROOT / "benchmarks" / name for name in ("readme.py", "speed/collect.py"))]
PROGRAMS += [ROOT / "benchmarks" / "speed" / name for name in ("smoke.py", "figures.py")]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_programs_run_where_hkdfast_is_not_installed(program, tmp_path):
    """Without its site the interpreter has no .pth files: packages are there, a checkout that is installed is not."""
    packages = str(Path(torch.__file__).parents[1])
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": packages}}
    without = subprocess.run([sys.executable, "-S", "-c", "import hkdfast"], **how)
    assert "No module named 'hkdfast'" in without.stderr
    done = subprocess.run([sys.executable, "-S", program, "--help"], **how)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]
