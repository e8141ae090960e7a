#!/usr/bin/env bash
# Collects what benchmarks/speed/gpu.sh needs beside torch, triton and transformers, as wheels in .whl/ (about 6 MB).
# Run it where pip has an index: benchmarks/speed/wheels.sh [PYTHON VERSION OF THE GPU MACHINE, 3.12 by default]
set -euo pipefail
cd "$(dirname "$0")/../.."
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${tag}_$(uname -m)"); done
rm -rf .whl && mkdir .whl
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "${1:-3.12}" --implementation cp "${platforms[@]}" \
    -c constraints.txt -d .whl \
    pip setuptools pybind11 pytest iniconfig pluggy pygments packaging pytest-xdist execnet hypothesis sortedcontainers \
    pytest-benchmark py-cpuinfo2 liger-kernel trl
du -sh .whl && ls .whl
