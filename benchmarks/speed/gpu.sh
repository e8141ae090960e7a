#!/usr/bin/env bash
# Proves hkdfast on a machine with a GPU and measures it against its peers, stage by stage, what tells most first.
#
#   benchmarks/speed/gpu.sh [--seconds N] STAGE...  stages, or the names of groups of them: first, second, more
#   benchmarks/speed/gpu.sh --rehearse              the whole plan on any machine, in shapes whose times say nothing
#   benchmarks/speed/gpu.sh report [FOLDER...]      anywhere: one results file of the parts, its figures, README's table
#
# Stages add to one log and leave their parts of the results in $OUT (out/gpu by default); they build first what is not
# built, and do not run if that fails. Extensions that lie in hkdfast/ ready for this Python are not built again. Wheels
# in .whl/, collected by wheels.sh, are installed if there are any; nothing is downloaded. --seconds, for a machine that
# is lent by the minute, cuts what runs so long after the start: what a stage has measured by then is kept. A kernel that
# hangs costs its stage's process alone; if the first contact with the CUDA kernels fails, Triton runs in their place.
set -euo pipefail
[ -z "${OUT:-}" ] || OUT=$(realpath -m "$OUT")
cd "$(dirname "$0")/../.."
self=benchmarks/speed/gpu.sh
# stages in their order, with the seconds each is expected to take on an H200: by counting, not measured
declare -A EXPECTED=(
    [build]=10 [smoke]=60 [plans]=45 [logits]=60 [heads-a]=90 [frozen-a]=40
    [correct]=120 [compiled]=90 [heads-bd]=50 [coupled]=40 [errors]=20 [steps]=60
    [vocabulary]=120 [heads-more]=200 [frozen]=200 [tokens]=60 [compiled-more]=900 [sanitize]=300
)
FIRST=(build smoke plans logits heads-a frozen-a)
SECOND=(correct compiled heads-bd coupled errors steps)
MORE=(vocabulary heads-more frozen tokens compiled-more sanitize)
STAGES=("${FIRST[@]}" "${SECOND[@]}" "${MORE[@]}")
export OUT=${OUT:-$PWD/out/gpu} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
site=${HKDFAST_SITE:-/tmp/hkdfast-site}
export PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH} # programs in tests/ and benchmarks/ import hkdfast from here
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # nvcc and compute-sanitizer, where they are not on it
mkdir -p "$OUT"
if [ -e "$site/no-cuda" ]; then export HKDFAST_BACKEND=triton; fi # smoke has found a fault

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
        if $python -c 'from hkdfast.ops.dispatch import load; load("cuda")'; then
            echo "the extensions were built before"
        else
            nvcc --version
            rm -f hkdfast/_cpu*.so hkdfast/_cuda*.so
            $python setup.py -q build_ext --inplace
        fi
    fi
    $python -m hkdfast doctor
    $python - <<'PYTHON'
import sys

import torch

from hkdfast import backends

report = backends()
wanted = {"triton"} if torch.cuda.is_available() else {"cpu"}
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

smoke() { # seconds: every kernel of the CUDA and of the Triton backend, each in a process that may hang
    if [ -n "${HKDFAST_TINY:-}" ]; then
        $python benchmarks/speed/smoke.py check cpu --tiny
        return
    fi
    if ! timeout -k 5 90 $python benchmarks/speed/smoke.py check cuda; then
        echo "the CUDA kernels are left out from here on"
        touch "$site/no-cuda"
    fi
    timeout -k 5 90 $python benchmarks/speed/smoke.py check triton
}

PLANS=("" "blocks=1" "cluster=8,blocks=1" "blocks=2,warps=8" "blocks=4,warps=4" "chunk=256" "chunk=512")
plans() { # the times that decide how the CUDA kernels lay out a row
    if [ -n "${HKDFAST_TINY:-}" ]; then
        $python benchmarks/speed/smoke.py time cpu --tiny
        return
    fi
    local plan
    for plan in "${PLANS[@]}"; do
        if [ -e "$site/no-cuda" ]; then break; fi
        echo "HKDFAST_CUDA_PLAN=$plan"
        HKDFAST_CUDA_PLAN=$plan timeout -k 5 60 $python benchmarks/speed/smoke.py time cuda || echo "failed with $plan"
    done
    echo triton
    timeout -k 5 60 $python benchmarks/speed/smoke.py time triton
}

correct() { # what a GPU alone can tell; the emulations have run elsewhere
    if [ -n "${HKDFAST_TINY:-}" ]; then
        tests tests/engine/test_device.py -k decoding
        return
    fi
    local limit=()
    if $python -c 'import pytest_timeout' 2> /dev/null; then limit=(--timeout 60 --timeout-method thread); fi
    tests "${limit[@]}" tests/ops/test_rows.py tests/engine/test_device.py tests/ops/test_cuda.py tests/ops/test_triton.py \
        -k "cuda or gpu or graph or does_not_fit or (triton and not any_row)"
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

bench() { # bench NAME WHICH PYTEST-ARGUMENTS...: one part of the results, ours, Triton's and the peers' apart
    local name=$1 which=$2 who status=0 ended
    shift 2
    # a rehearsal of one stage in three processes says enough of all
    if [ -n "${HKDFAST_TINY:-}" ] && [ "$name" != logits ] && [ ${#APART[@]} = 3 ]; then APART=("not compile"); fi
    for who in "${APART[@]}"; do
        ended=0
        limited $python -m pytest -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds \
            --benchmark-group-by=param:shape --benchmark-json="$OUT/$name-$((++parts)).part" -k "($which) and ($who)" "$@" ||
            ended=$?
        if [ $ended != 0 ] && [ $ended != 5 ]; then status=$ended; fi # 5: none of these
    done
    find "$OUT" -name "$name-*.part" -empty -delete # of a process that was killed
    if compgen -G "$OUT/$name-*.part" > /dev/null; then
        $python $speed/collect.py --join "$OUT/$name.json" "$OUT/$name"-*.part
        rm "$OUT/$name"-*.part
    fi
    return $status
}
parts=0
speed=benchmarks/speed
APART=("hkdfast and not triton and not compile" "hkdfast and triton and not compile" "not hkdfast and not compile")
heads="$speed/bench_heads.py::bench_gemms $speed/bench_heads.py::bench_heads" # the floor first: nothing is judged without
logits() { bench logits "not vocabulary" $speed/bench_logits.py; }
heads-a() { bench heads-a "trained and A:" $heads; }
frozen-a() { bench frozen-a "frozen and A:" $heads; }
compiled() {
    APART=(compile)
    bench compiled "(reverse_kl or jensen_shannon) and (qwen or A:) and not frozen and not vocabulary" $speed/bench_logits.py \
        $speed/bench_heads.py::bench_heads
}
heads-bd() { bench heads-bd "trained and (B: or D:)" $heads; }
coupled() { bench coupled "coupled" $speed/bench_coupled.py; }
errors() { APART=("hkdfast and not compile") && bench errors "bench_errors" $speed/bench_heads.py; }
steps() { APART=("not nothing") && bench steps "bench" $speed/bench_steps.py; }
vocabulary() { bench vocabulary "vocabulary" $speed/bench_logits.py; }
heads-more() { bench heads-more "trained and not (A: or B: or D:)" $heads; }
frozen() { bench frozen "frozen and not A:" $heads; }
tokens() { bench tokens "bench_tokens" $speed/bench_heads.py; }
compiled-more() { APART=(compile) && bench compiled-more "not compiled" $speed/bench_logits.py $heads $speed/bench_coupled.py; }

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

timetable() { # seconds of each stage in this log, beside those that are expected on an H200
    local group name call sum
    printf '\n%-14s %10s %20s\n' stage "here, s" "expected there, s"
    for group in first second more; do
        local -n stages=${group^^}
        sum=0
        for name in "${stages[@]}"; do
            call=$(sed -n "s/^=== $name: done after \([0-9]*\) s$/\1/p" "$OUT/gpu.log" | tail -n 1)
            printf '%-14s %10s %20s\n' "$name" "${call:--}" "${EXPECTED[$name]}"
            sum=$((sum + EXPECTED[$name]))
        done
        printf '%-14s %10s %20s\n\n' "all of $group" "" "$sum"
    done
}

main() { # whole before it runs: bash would read on in a file that is edited meanwhile
    local rehearsal=
    case "${1:-}" in
        --rehearse) rehearsal=1 && shift && export HKDFAST_TINY=1 ;;
        --tiny) shift && export HKDFAST_TINY=1 ;;
    esac
    if [ "${1:-}" = --seconds ]; then
        export HKDFAST_DEADLINE=$(($(date +%s) + $2))
        shift 2
    fi
    case "${1:-}" in
        --stage) "$2"; return ;;
        --watched) shift; watched "$@"; return ;;
        report) shift; report "$@"; return ;;
    esac
    local name failed=() wanted=()
    for name in "$@"; do
        case $name in
            first) wanted+=("${FIRST[@]}") ;;
            second) wanted+=("${SECOND[@]}") ;;
            more) wanted+=("${MORE[@]}") ;;
            *)
                if [[ " ${STAGES[*]} " != *" $name "* ]]; then
                    echo "unknown stage '$name', expected report, first, second, more or some of: ${STAGES[*]}" >&2
                    return 2
                fi
                wanted+=("$name")
                ;;
        esac
    done
    if [ ${#wanted[@]} = 0 ]; then wanted=("${STAGES[@]}"); fi
    if [ "${wanted[0]}" != build ] && [ -z "${HKDFAST_TINY:-}" ] && { [ ! -e "$(built)" ] || [ ! -d "$site" ]; }; then
        stage build || failed+=(build)
    fi
    for name in "${wanted[@]}"; do
        if [ "${failed[*]}" = build ]; then break; fi # the rest would measure something else
        stage "$name" || failed+=("$name")
        if [ -e "$site/no-cuda" ]; then export HKDFAST_BACKEND=triton; fi # smoke has found a fault
    done
    if [ -n "$rehearsal" ]; then timetable | tee -a "$OUT/gpu.log"; fi
    if [ ${#failed[@]} != 0 ]; then
        echo "failed: ${failed[*]}; the log is $OUT/gpu.log"
        return 1
    fi
}

main "$@"
exit
