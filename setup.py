"""Builds hkdfast._cpu from csrc/. Every other fact of the package is in pyproject.toml."""

import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, ExecError, PlatformError

# Contraction is off so that equal inputs give exactly equal probabilities; csrc/numbers.h fuses where it means to.
ARITHMETIC = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]

CPU = Pybind11Extension(
    "hkdfast._cpu",
    sorted(glob("csrc/*.cpp")),
    depends=glob("csrc/*.h"),
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", *ARITHMETIC],
    extra_link_args=["-fopenmp"],
)


class BuildExt(build_ext):
    """build_ext, taught one thing: without a compiler the package is installed all the same, and says what it lacks."""

    def run(self):
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError) as error:
            print(
                f"hkdfast: the `cpu` backend is NOT built, the slower reference will run on the CPU: {error}\n"
                "hkdfast: install a C++17 compiler with OpenMP (Debian: g++) and install hkdfast again",
                file=sys.stderr,
            )


setup(ext_modules=[CPU], cmdclass={"build_ext": BuildExt})
