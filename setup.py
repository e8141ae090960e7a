"""Builds hkdfast._cpu and hkdfast._cuda from csrc/. Every other fact of the package is in pyproject.toml."""

import os
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CCompilerError, ExecError, PlatformError

# Contraction is off so that equal inputs give exactly equal probabilities; csrc/common/simd.h fuses where it means to.
ARITHMETIC = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
# Compute capabilities, separated by blanks or semicolons; none for no GPU code.
ARCHS = os.environ.get("HKDFAST_CUDA_ARCHS", "90a 100").replace(";", " ").split()
TOOLKITS = [Path(home) / "bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
NVCC = next((str(nvcc) for nvcc in TOOLKITS if nvcc.exists()), shutil.which("nvcc"))

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


class BuildExt(build_ext):
    """build_ext, taught two things: what is for the GPU goes to nvcc, and without a compiler the package is installed
    all the same, and says what it lacks."""

    def run(self):
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError) as error:
            print(
                f"hkdfast: the `cpu` backend is NOT built, the slower reference will run on the CPU: {error}\n"
                "hkdfast: install a C++17 compiler with OpenMP (Debian: g++) and install hkdfast again",
                file=sys.stderr,
            )

    def build_extension(self, ext):
        if ext.name != CUDA.name:
            return super().build_extension(ext)
        target, stamp = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / "archs"
        made_of = [Path(path) for path in (*ext.sources, *ext.depends, "setup.py")]
        made = target.stat().st_mtime if target.exists() else 0
        same = stamp.exists() and stamp.read_text() == " ".join(ARCHS)
        if same and not self.force and all(path.stat().st_mtime < made for path in made_of):
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(" ".join(ARCHS))
        flags = ["-shared", "-O3", "-std=c++17", "-fmad=false", f"--threads={os.cpu_count() or 1}"]
        host = "-Xcompiler=-fPIC,-fvisibility=hidden"
        archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        headers = [f"-I{path}" for path in (*CPU.include_dirs, sysconfig.get_path("include"))]
        told = f'-DHKDFAST_CUDA_ARCHS="{" ".join(ARCHS)}"'
        try:
            self.spawn([NVCC, *flags, host, *archs, *headers, told, *ext.sources, "-o", str(target)])
        except (CCompilerError, ExecError, PlatformError) as error:
            target.unlink(missing_ok=True)
            print(
                f"hkdfast: the `cuda` backend is NOT built, GPUs will run on Triton: {error}\n"
                f"hkdfast: {NVCC} must know the architectures {' '.join(ARCHS)}; HKDFAST_CUDA_ARCHS names others",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self):
        # of an editable install; an extension that could not be built is not there to be copied
        built = Path(self.build_lib)
        self.extensions = [ext for ext in self.extensions if (built / self.get_ext_filename(ext.name)).exists()]
        super().copy_extensions_to_source()


setup(ext_modules=[CPU, CUDA] if NVCC and ARCHS else [CPU], cmdclass={"build_ext": BuildExt})
