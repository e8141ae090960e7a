"""hkdfast bench: run the speed benchmarks, which are in the repository but not in the wheel."""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from ..data import outputs

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "speed"


def add_arguments(parser):
    parser.add_argument("-k", dest="select", metavar="WORDS", help="run only benchmarks whose name matches (pytest -k)")
    parser.add_argument("--json", metavar="FILE", help="JSON file for the results of pytest-benchmark")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1800,
        help="time limit for the whole run; benchmarks that would exceed their share are skipped, with the reason",
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks without running them")


def run(args):
    if not 0 < args.seconds < float("inf"):
        raise ValueError(f"--seconds is {args.seconds}, expected a finite number above 0")
    outputs.check("--json", args.json)
    if not any(FOLDER.glob("bench_*.py")):
        raise FileNotFoundError(
            f"no benchmarks in {FOLDER}: they are in the repository only. "
            "In a clone of it: pip install -e '.[bench]' && hkdfast bench"
        )
    for module in ("pytest", "pytest_benchmark"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"the benchmarks need {module}", name=module)
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-rs", "--benchmark-group-by=param:shape"]
    command += ["-k", args.select] if args.select else []
    command += ["--collect-only", "-q"] if args.list else []
    environment = os.environ | {"HKDFAST_SECONDS": f"{args.seconds:g}"}
    with tempfile.TemporaryDirectory() as folder:
        # pytest-benchmark empties its file before the first benchmark, and the run may be stopped
        figures = Path(folder) / "figures.json"
        command += ["--benchmark-json", str(figures)] if args.json else []
        code = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, check=False).returncode
        if args.json and figures.is_file() and figures.stat().st_size:
            with outputs.replacing(args.json) as file:
                file.write(figures.read_text(encoding="utf-8"))
    return code
