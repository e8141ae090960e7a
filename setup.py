"""Builds hkdfast._cpu and hkdfast._cuda from csrc/. Every other fact of the package is in pyproject.toml."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CCompilerError, ExecError, PlatformError

# Contraction is off so that equal inputs give exactly equal probabilities; csrc/common/simd.h fuses where it means to.
ARITHMETIC = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
TOOLKITS = [Path(home) / "bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
NVCC = next((str(nvcc) for nvcc in TOOLKITS if nvcc.exists()), shutil.which("nvcc"))
BY_NAME = (
    "to build the CUDA kernels all the same, name compute capabilities, as in HKDFAST_CUDA_ARCHS='90a 100', and "
    "install hkdfast again"
)
NOTES = "hkdfast/_build.json"  # {module: why it was not built}; `hkdfast doctor` shows it

CPU = Pybind11Extension(
    "hkdfast._cpu",
    sorted(glob("csrc/cpu/*.cpp")),
    depends=[*glob("csrc/common/*.h"), *glob("csrc/cpu/*.h")],
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", *ARITHMETIC],
    extra_link_args=["-fopenmp"],
)
CUDA = Extension(
    "hkdfast._cuda",
    ["csrc/cuda/cuda.cpp", *sorted(glob("csrc/cuda/**/*.cu", recursive=True))],
    depends=[*glob("csrc/common/*.h"), *glob("csrc/cuda/*.h")],
)


def say(text):
    print(f"hkdfast: {text}", file=sys.stderr, flush=True)


def capability(name):
    """(9, 0, "a") of 90a, 9.0a or sm_90a."""
    found = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)", name)
    if not found:
        sys.exit(f"HKDFAST_CUDA_ARCHS names {name!r}, which is no compute capability such as 90a, 100 or 12.0")
    return int(found[1]), int(found[2]), found[3]


def gpus():
    """Compute capabilities of the GPUs that are here, as in "9.0"."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^\s*(\d+\.\d)\s*$", done.stdout, re.M)


def architectures():
    """What to compile the CUDA kernels for, as nvcc spells it; and, in words, why not for what was found or named."""
    named = os.environ.get("HKDFAST_CUDA_ARCHS")
    if named is None:
        wanted = [capability(gpu) for gpu in gpus()]
        # 90a has instructions that plain 90 lacks
        wanted = [(major, minor, "a" if major == 9 else letter) for major, minor, letter in wanted]
        why = "no NVIDIA GPU was found at install"
    else:
        wanted = [capability(name) for name in re.split(r"[\s;,]+", named) if name]
        why = "HKDFAST_CUDA_ARCHS is empty"
    old = dict.fromkeys(f"{major}.{minor}" for major, minor, _ in wanted if major < 9)
    if old:
        why = f"they need compute capability 9.0 or later, not {', '.join(old)}"
    archs = list(dict.fromkeys(f"{major}{minor}{letter}" for major, minor, letter in wanted if major >= 9))
    return archs, why if old or not archs else ""


ARCHS, LEFT_OUT = architectures()
if not ARCHS:
    WHY = f"{LEFT_OUT}; {BY_NAME}"
elif not NVCC:
    WHY = (
        "nvcc was not found (CUDA_HOME, /usr/local/cuda, PATH); install the CUDA toolkit, 12.8 or later for Blackwell, "
        "then hkdfast again"
    )
else:
    WHY = ""


class BuildExt(build_ext):
    """build_ext that compiles the CUDA module with nvcc, and goes without a module that cannot be built. It prints why,
    and writes it to NOTES."""

    def build_extensions(self):
        self.notes = {}
        if WHY:
            self.leave_out(CUDA, WHY)
        super().build_extensions()
        notes = Path(self.build_lib, NOTES)
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(json.dumps(self.notes, indent=1) + "\n")

    def build_extension(self, ext):
        try:
            if ext.name != CUDA.name:
                return super().build_extension(ext)
            self.build_cuda(ext)
            built = f"built for {', '.join(f'sm_{arch}' for arch in ARCHS)}"
            say(f"the CUDA kernels are {built}{LEFT_OUT and '; ' + LEFT_OUT}; HKDFAST_CUDA_ARCHS names others")
        except (CCompilerError, ExecError, PlatformError) as error:
            say(error)  # the whole command line, which is too long for a note
            why = "the C++ compiler failed; one for C++17 with OpenMP is needed (Debian: g++)"
            if ext.name == CUDA.name:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                why = (
                    f"{NVCC} failed; it must know the architectures {' '.join(ARCHS)}, HKDFAST_CUDA_ARCHS names others"
                )
            self.leave_out(ext, f"{why}; pip install -v shows what it said")

    def leave_out(self, ext, why):
        name = ext.name.rpartition(".")[2]
        what = {
            "_cpu": "the C++ kernels are NOT built, the slower reference runs on the CPU",
            "_cuda": "the CUDA kernels are NOT built, GPUs run on Triton",
        }
        say(f"{what[name]}: {why}")
        self.notes[name] = why

    def build_cuda(self, ext):
        target, stamp = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / "archs"
        made_of = [Path(path) for path in (*ext.sources, *ext.depends, "setup.py")]
        made = target.stat().st_mtime if target.exists() else 0
        same = stamp.exists() and stamp.read_text() == " ".join(ARCHS)
        if same and not self.force and all(path.stat().st_mtime < made for path in made_of):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(" ".join(ARCHS))
        flags = ["-shared", "-O3", "-std=c++17", "-fmad=false", f"--threads={os.cpu_count() or 1}"]
        host = "-Xcompiler=-fPIC,-fvisibility=hidden"
        archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        headers = [f"-I{path}" for path in (*CPU.include_dirs, sysconfig.get_path("include"))]
        named = f'-DHKDFAST_CUDA_ARCHS="{" ".join(ARCHS)}"'
        self.spawn([NVCC, *flags, host, *archs, *headers, named, *ext.sources, "-o", str(target)])

    def copy_extensions_to_source(self):
        # an editable install has the package where its source is
        built, package = Path(self.build_lib), self.get_finalized_command("build_py").get_package_dir("hkdfast")
        self.extensions = [ext for ext in self.extensions if (built / self.get_ext_filename(ext.name)).exists()]
        super().copy_extensions_to_source()
        shutil.copy(built / NOTES, package)


setup(ext_modules=[CPU, CUDA] if not WHY else [CPU], cmdclass={"build_ext": BuildExt})
