"""What setup.py builds, for which GPUs, and what it says where it cannot. The compilers are stand-ins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hkdfast.cli import doctor
from hkdfast.ops import native

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(tmp_path):
    """setup.py build_ext with an nvcc that writes its arguments down, and no C++ compiler.

    Returns a function of what nvidia-smi prints (None: there is none) and of HKDFAST_CUDA_ARCHS. It returns what was
    printed, what nvcc was given, and what is noted for `hkdfast doctor`.
    """
    for package in ("pybind11", "setuptools"):
        pytest.importorskip(package)
    tools, home, built = tmp_path / "tools", tmp_path / "cuda", tmp_path / "built"

    def script(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(gpus=None, archs=None, nvcc='printf "%s\\n" "$@" > "$0.given"; for last; do :; done; echo > "$last"'):
        if gpus is not None:
            script(tools / "nvidia-smi", f'[ "$1" = --query-gpu=compute_cap ] && printf "{gpus}"')
        if nvcc:
            script(home / "bin/nvcc", nvcc)
        environment = {name: text for name, text in os.environ.items() if name != "HKDFAST_CUDA_ARCHS"}
        environment |= {
            "PATH": str(tools),
            "CUDA_HOME": str(home),
            "CC": "/bin/false",
            "CXX": "/bin/false",
        }
        if archs is not None:
            environment["HKDFAST_CUDA_ARCHS"] = archs
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", built, "--build-temp", tmp_path / "temp"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        given, notes = home / "bin/nvcc.given", built / "hkdfast/_build.json"
        return (
            done.stdout + done.stderr,
            given.read_text().split("\n") if given.exists() else [],
            json.loads(notes.read_text()) if notes.exists() else None,
        )

    return run


def compiled(given):
    return [argument.partition(",code=")[2] for argument in given if argument.startswith("-gencode")]


@pytest.mark.parametrize(
    ("gpus", "archs", "expected"),
    [
        ("9.0\\n", None, ["sm_90a"]),
        ("9.0\\n9.0\\n10.0\\n", None, ["sm_90a", "sm_100"]),
        ("8.0\\n12.0\\n", None, ["sm_120"]),
        ("9.0\\n", "100", ["sm_100"]),  # a name overrules what is there
        (None, "90a 100", ["sm_90a", "sm_100"]),
        (None, "9.0a;10.0", ["sm_90a", "sm_100"]),
        (None, "sm_90a, 8.6", ["sm_90a"]),
    ],
)
def test_cuda_kernels_are_built_for_the_gpus_here_or_those_named(build, gpus, archs, expected):
    said, given, notes = build(gpus, archs)
    assert compiled(given) == expected
    assert f'-DHKDFAST_CUDA_ARCHS="{" ".join(arch.removeprefix("sm_") for arch in expected)}"' in given
    assert f"hkdfast: the CUDA kernels are built for {', '.join(expected)}" in said
    assert "_cuda" not in notes


def test_older_gpus_beside_a_newer_one_are_named(build):
    assert "they need compute capability 9.0 or later, not 8.0, 7.5" in build("8.0\\n9.0\\n7.5\\n")[0]


@pytest.mark.parametrize(
    ("gpus", "archs", "why"),
    [
        (None, None, "no NVIDIA GPU was found at install"),
        ("No devices were found\\n", None, "no NVIDIA GPU was found at install"),
        ("8.0\\n8.6\\n8.0\\n", None, "they need compute capability 9.0 or later, not 8.0, 8.6"),
        ("9.0\\n", "", "HKDFAST_CUDA_ARCHS is empty"),
        ("9.0\\n", "8.0", "they need compute capability 9.0 or later, not 8.0"),
    ],
)
def test_without_a_gpu_nothing_is_compiled_and_one_line_says_how_to_get_it(build, gpus, archs, why):
    said, given, notes = build(gpus, archs)
    assert given == []
    assert notes["_cuda"].startswith(f"{why}; ") and "HKDFAST_CUDA_ARCHS='90a 100'" in notes["_cuda"]
    assert f"hkdfast: the CUDA kernels are NOT built, GPUs run on Triton: {notes['_cuda']}\n" in said


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="nvcc is where setup.py always looks")
def test_without_nvcc_the_toolkit_is_named(build):
    assert build("9.0\\n", nvcc=None)[2]["_cuda"].startswith("nvcc was not found (CUDA_HOME, /usr/local/cuda, PATH); ")


def test_a_compiler_that_fails_is_named_and_nothing_half_made_is_left(build, tmp_path):
    said, _, notes = build("9.0\\n", nvcc="exit 3")
    assert "nvcc' failed with exit code 3" in said
    assert "nvcc failed; it must know the architectures 90a," in notes["_cuda"]
    assert "the C++ compiler failed; one for C++17" in notes["_cpu"] and len(notes["_cpu"]) < 200
    assert "the slower reference runs on the CPU" in said
    assert [path.name for path in (tmp_path / "built/hkdfast").iterdir()] == ["_build.json"]


def test_an_architecture_that_is_none_is_refused_before_anything_is_built(build):
    said, given, notes = build("9.0\\n", "90a hopper")
    assert "HKDFAST_CUDA_ARCHS names 'hopper'" in said and "90a" in said
    assert given == [] and notes is None


@pytest.mark.parametrize("noted", [{"_cuda": "no NVIDIA GPU was found at install; name some"}, {}, None])
def test_doctor_says_why_there_are_no_cuda_kernels(monkeypatch, tmp_path, noted):
    if noted is not None:
        (tmp_path / "_build.json").write_text(json.dumps(noted))
    monkeypatch.setattr(native, "files", lambda package: tmp_path)
    monkeypatch.setitem(sys.modules, "hkdfast._cuda", None)  # an import of it fails
    monkeypatch.delattr("hkdfast._cuda", raising=False)
    expected = (noted or {}).get("_cuda", "install hkdfast again to build it; pip install -v shows what the build says")
    assert doctor.report()["GPU"]["CUDA kernels of hkdfast"] == f"not built: {expected}"


def test_doctor_says_what_the_cuda_kernels_are_built_for(monkeypatch):
    made = type(sys)("hkdfast._cuda")
    made.architectures = "90a 100"
    monkeypatch.setitem(sys.modules, "hkdfast._cuda", made)
    monkeypatch.setattr("hkdfast._cuda", made, raising=False)
    assert doctor.cuda_kernels() == "built for sm_90a, sm_100"


def test_the_marker_of_types_is_in_the_wheel_and_the_sdist(tmp_path):
    pytest.importorskip("pybind11")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_py",
        "--build-lib",
        tmp_path,
        "egg_info",
        "--egg-base",
        tmp_path,
    ]
    subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert (tmp_path / "hkdfast/py.typed").is_file()
    assert (tmp_path / "hkdfast/_cpu.pyi").is_file()
    listed = (tmp_path / "hkdfast.egg-info/SOURCES.txt").read_text().split("\n")
    assert {"hkdfast/py.typed", "hkdfast/_cpu.pyi", "hkdfast/_cuda.pyi", "hkdfast/losses.py"} <= set(listed)
