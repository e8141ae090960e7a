#!/usr/bin/env bash
# Proves hkdfast on a machine with a GPU and measures it against its peers, stage by stage, what tells most first.
#
#   benchmarks/speed/gpu.sh [--tiny] [--seconds N] [STAGE...]     without a stage: all of them
#   benchmarks/speed/gpu.sh report [FOLDER...]      anywhere: one results file of the parts, its figures, README's table
#
# Stages add to one log and leave their parts of the results in $OUT (out/gpu by default); they build first what is not
# built, and do not run if that fails. Wheels in .whl/, collected by wheels.sh, are installed if there are any; nothing is
# downloaded. --seconds, for a machine that is lent by the minute, cuts what runs so long after the start: what a stage
# has measured by then is kept. --tiny takes every stage through on any machine, with or without a GPU, in shapes whose
# times say nothing.
set -euo pipefail
[ -z "${OUT:-}" ] || OUT=$(realpath -m "$OUT")
cd "$(dirname "$0")/../.."
self=benchmarks/speed/gpu.sh
STAGES=(build correct heads-ab logits coupled frozen heads-cde sweeps vocabulary sanitize)
export OUT=${OUT:-$PWD/out/gpu} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
site=${HKDFAST_SITE:-/tmp/hkdfast-site}
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # nvcc and compute-sanitizer, where they are not on it
mkdir -p "$OUT"

limited() { # a command, interrupted in time to write what it has found
    if [ -z "${HKDFAST_DEADLINE:-}" ]; then
        "$@"
    else
        local left=$((HKDFAST_DEADLINE - $(date +%s) - 20))
        timeout -s INT -k 15 $((left > 1 ? left : 1)) "$@" # 0 would be no limit
    fi
}

build() {
    if [ -z "${HKDFAST_TINY:-}" ]; then
        if compgen -G ".whl/*.whl" > /dev/null; then
            $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
        fi
        nvidia-smi
        nvcc --version
        rm -f hkdfast/_cpu*.so hkdfast/_cuda*.so
        $python setup.py -q build_ext --inplace
    fi
    $python -m hkdfast doctor
    $python - <<'PYTHON'
import sys

import torch

from hkdfast import backends

report = backends()
wanted = {"cpu"} if not torch.cuda.is_available() else {"cpu", "triton"}
if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9:
    wanted.add("cuda")
missing = {name: report.get(name, "unknown") for name in wanted if report.get(name) != "ok"}
sys.exit(f"backends that should run here do not: {missing}" if missing else 0)
PYTHON
    if [ -z "${HKDFAST_TINY:-}" ]; then
        mkdir -p build "$site"
        touch "$(built)"
    fi
}

tests() { # pytest on several processes where pytest-xdist is there: most of the time Triton compiles
    local several=()
    if $python -c 'import xdist' 2> /dev/null; then several=(-n "$(($(nproc) < 8 ? $(nproc) : 8))"); fi
    limited $python -m pytest -q -p no:cacheprovider "${several[@]}" "$@"
}

correct() {
    if [ -n "${HKDFAST_TINY:-}" ]; then
        tests tests/engine/test_device.py -k decoding
    else
        tests tests/ops/test_rows.py tests/engine/test_device.py tests/ops/test_triton.py $(compgen -G "tests/ops/test_cuda*.py")
    fi
}

watched() { # BACKEND DIVERGENCE OPERATION KERNEL, as tests/tools/sanitize.py --list has them
    if [ -n "${HKDFAST_TINY:-}" ]; then
        $python tests/tools/sanitize.py --few "$@"
        return
    fi
    local tool
    for tool in memcheck racecheck; do # addresses; shared memory. The kernels of torch are not watched.
        echo "$tool: $*"
        compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex "kns=$4" $python tests/tools/sanitize.py "$@"
    done
}

sanitize() {
    if [ -z "${HKDFAST_TINY:-}" ] && ! compute-sanitizer $python -c 'import torch; torch.ones(1, device="cuda").add_(1)'; then
        echo "compute-sanitizer does not work on this machine"
        return 1
    fi
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # each tensor an allocation of its own, so that a step beyond it is seen
    local status=0 logs
    logs=$(mktemp -d)
    $python tests/tools/sanitize.py --list > "$logs/runs"
    if [ -n "${HKDFAST_TINY:-}" ]; then sed -i -n '1p;$p' "$logs/runs"; fi
    # each run in a process with a log of its own, told as it ends: most of the time goes into compiling for Triton
    limited xargs -P "$(nproc)" -L 1 bash -c \
        'log="'"$logs"'/$1-$2-$3.log"; "$0" --watched "$@" > "$log" 2>&1 || bad=1; tail -n 100 "$log"
        if [ -n "${bad:-}" ]; then echo "failed: $*"; exit 1; fi' "$self" < "$logs/runs" || status=$?
    rm -r "$logs"
    return $status
}

bench() { # bench NAME PYTEST-ARGUMENTS...: one part of the results
    local name=$1
    shift
    limited $python -m pytest -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds --benchmark-group-by=param:shape \
        --benchmark-json="$OUT/$name.json" "$@"
}
speed=benchmarks/speed
logits() { bench logits $speed/bench_logits.py -k "not vocabulary"; }
vocabulary() { bench vocabulary $speed/bench_logits.py -k vocabulary; }
heads="$speed/bench_heads.py::bench_gemms $speed/bench_heads.py::bench_heads" # the floor first: nothing is judged without
heads-ab() { bench heads-ab $heads -k "trained and (A: or B:)"; }
heads-cde() { bench heads-cde $heads -k "trained and not (A: or B:)"; }
frozen() { bench frozen $heads -k frozen; }
coupled() { bench coupled $speed/bench_coupled.py; }
sweeps() { bench sweeps $speed/bench_heads.py -k "bench_tokens or bench_errors"; }

report() {
    $python $speed/collect.py "${@:-$OUT}"
    $python $speed/figures.py
    $python benchmarks/readme.py
}

stage() { # in a process of its own, for errexit is off in a function whose failure is looked at
    local start=$SECONDS status=0
    {
        printf '\n=== %s\n' "$1"
        if [ -n "${HKDFAST_DEADLINE:-}" ] && [ $((HKDFAST_DEADLINE - $(date +%s))) -lt 40 ]; then
            status=124
        else
            "$BASH" "$self" --stage "$1" || status=$?
        fi
        case $status in 0) ;; 124 | 137) echo "out of time: the rest of it did not run" ;; *) echo "it failed with $status" ;; esac
        printf '=== %s: %s after %d s\n' "$1" "$([ $status = 0 ] && echo done || echo FAILED)" $((SECONDS - start))
        [ $status = 0 ]
    } 2>&1 | tee -a "$OUT/gpu.log"
}

built() { # what stands in build/ for these sources: the marker goes with the machine's copy of the tree
    echo "build/gpu-$(find setup.py csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum | cut -c -16)"
}

main() { # whole before it runs: bash would read on in a file that is edited meanwhile
    if [ "${1:-}" = --tiny ]; then
        export HKDFAST_TINY=1
        shift
    fi
    if [ "${1:-}" = --seconds ]; then
        export HKDFAST_DEADLINE=$(($(date +%s) + $2))
        shift 2
    fi
    case "${1:-}" in
        --stage) "$2"; return ;;
        --watched) shift; watched "$@"; return ;;
        report) shift; report "$@"; return ;;
    esac
    local name failed=()
    for name in "$@"; do
        if [[ " ${STAGES[*]} " != *" $name "* ]]; then
            echo "unknown stage '$name', expected report or some of: ${STAGES[*]}" >&2
            return 2
        fi
    done
    if [ $# = 0 ]; then set -- "${STAGES[@]}"; fi
    if [ "$1" != build ] && [ -z "${HKDFAST_TINY:-}" ] && { [ ! -e "$(built)" ] || [ ! -d "$site" ]; }; then
        stage build || failed+=(build)
    fi
    for name in "$@"; do
        if [ "${failed[*]}" = build ]; then break; fi # the rest would measure something else
        stage "$name" || failed+=("$name")
    done
    if [ ${#failed[@]} != 0 ]; then
        echo "failed: ${failed[*]}; the log is $OUT/gpu.log"
        return 1
    fi
}

main "$@"
exit
