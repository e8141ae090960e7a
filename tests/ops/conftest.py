"""The emulation of the CUDA kernels, tests/tools/cluster.cpp."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster():
    """tests/tools/cluster.cpp, compiled once for each state of its sources."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    source = ROOT / "tests/tools/cluster.cpp"
    headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    needs = subprocess.run(
        [compiler, "-std=c++17", "-MM", *headers, source], capture_output=True, text=True, check=True
    )
    ours = [Path(name) for name in needs.stdout.split() if name.startswith(str(ROOT))]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in ours)).hexdigest()[:16]
    target = ROOT / f"build/cluster-{state}/cluster{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")  # several processes may compile at once
        flags = ["-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared"]
        subprocess.run([compiler, *flags, *headers, source, "-o", made], check=True)
        made.replace(target)
    spec = importlib.util.spec_from_file_location("cluster", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
