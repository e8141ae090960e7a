#!/usr/bin/env bash
# Collects what benchmarks/speed/gpu.sh needs beside torch, triton and transformers, as wheels in .whl/ (about 7 MB), and
# builds the CUDA extension for Hopper, so that the GPU machine's minutes do not go into it.
# Run it where pip has an index and nvcc is: benchmarks/speed/wheels.sh [PYTHON OF THE GPU MACHINE, 3.12 by default]
set -euo pipefail
cd "$(dirname "$0")/../.."
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${tag}_$(uname -m)"); done
rm -rf .whl && mkdir .whl
version=${1:-3.12}
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp "${platforms[@]}" \
    -c constraints.txt -d .whl \
    pip setuptools pybind11 pytest iniconfig pluggy pygments packaging pytest-xdist execnet hypothesis sortedcontainers \
    pytest-benchmark py-cpuinfo2 pytest-timeout liger-kernel trl peft accelerate
du -sh .whl && ls .whl

interpreter=
for candidate in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python; do
    if "$candidate" -c '' 2> /dev/null; then interpreter=$candidate; fi # pyenv has shims of what is not there
done
if [ -z "$interpreter" ]; then
    echo "there is no Python $version here to build the extensions with: gpu.sh builds them there, which takes minutes"
    exit
fi
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"$interpreter" -m venv "$tools"
"$tools/bin/pip" install -q -c constraints.txt setuptools pybind11
HKDFAST_CUDA_ARCHS=90a "$tools/bin/python" setup.py -q build_ext --inplace
tag=$("$tools/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
ls -l hkdfast/*"$tag"
