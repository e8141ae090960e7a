"""Compiles the Triton kernels for GPUs that are not here, and fails where one does not compile or spills.

    python tests/tools/compile_triton.py                      sm_80, sm_90, sm_100 and gfx942, as CI does
    python tests/tools/compile_triton.py --targets 90 120     those, or others that this triton and its assembler know
    python tests/tools/compile_triton.py --table              every instantiation: registers, spills, shared memory

The cases meet every divergence with every option of the kernels and every law, on bf16 tiles, and the lightest and the
heaviest of them on float32 tiles and on fp16 tiles of an odd vocabulary. Triton 3.7 brings assemblers for all four
targets; one that it has not is an error. No code for a GPU is run.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # where hkdfast is not installed
os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported: interpreted functions cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from hkdfast.kernels import contrast, distill, scale
from hkdfast.kernels.launch import tile_choice
from hkdfast.ops.objective import METRICS, ContrastSpec, Objective, Transform
from hkdfast.ops.reference import DIVERGENCES

TARGETS = ("80", "90", "100", "gfx942")
ROWS = 32
# dtype, vocabulary, whether every case is met: the others differ in their loads, stores and steps alone
TILES = ((torch.bfloat16, 151936, True), (torch.float32, 151936, False), (torch.float16, 50257, False))
CAPPED = {"student": Transform(1.0, 30.0), "teacher": Transform(1.0, 30.0), "noisy": Transform(1.0, 30.0)}

# name: what is asked beside the divergence (of Objective, or which tensors are there)
CASES = {
    "gradient": {},
    "loss only": {"grad": False},
    "metrics": {"grad": False, "metrics": True},
    "labels": {"labels": True, "weight": True, "metrics": True, "hard_weight": 0.5},
    "teacher_floor": {"teacher_floor": -30.0},
    "accumulated": {"accumulate": True, "labels": True, "weight": True, "hard_weight": 0.5},
    "softcap": {**CAPPED, "labels": True, "hard_weight": 0.5},
    "difference": {"difference": True},
    "law": {"law": ContrastSpec()},
    "law, everything": {"law": ContrastSpec(schedule="linear", confidence="entropy", plausibility=0.1), "labels": True}
    | {"weight": True, "metrics": True, "hard_weight": 0.5, "teacher_floor": -30.0, **CAPPED, "difference": True},
}
# laws do not depend on the divergence, so one is enough
LAWS = {
    "gate by target": ContrastSpec(schedule="gate", confidence="target"),
    "rows, subtract": ContrastSpec(schedule="per_row", mode="subtract"),
    "entropy, drop": ContrastSpec(schedule="linear", confidence="entropy", plausibility=0.1, outside="drop"),
    "set": ContrastSpec(plausibility=0.1),
}


def empty(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")


def instantiations():
    """(name, kernel, arguments, options) of every case."""
    for dtype, vocab, every in TILES:
        tile, short = empty(dtype, ROWS, vocab), str(dtype).removeprefix("torch.")
        numbers, labels = empty(torch.float32, ROWS), empty(torch.int64, ROWS)
        cases = [(f"{d}, {name}", {"divergence": d, **case}) for d in DIVERGENCES for name, case in CASES.items()]
        cases += [(name, {"divergence": "reverse_kl", "law": law, "labels": True}) for name, law in LAWS.items()]
        if not every:
            cases = [case for case in cases if case[0].endswith(("gradient", "labels", "everything"))]
        for name, case in cases:
            given = dict(case)
            there = {key: given.pop(key, key == "grad") for key in ("grad", "metrics", "labels", "weight")}
            objective = Objective(**given)
            metrics = empty(torch.float32, len(METRICS), ROWS) if there["metrics"] else None
            yield (
                f"rows, {short}, {name}",
                distill.rows_kernel,
                distill.arguments(
                    objective,
                    tile,
                    tile,
                    tile if objective.law else None,
                    numbers if objective.law and objective.law.schedule == "per_row" else None,
                    labels if there["labels"] else None,
                    numbers if there["weight"] else None,
                    numbers,
                    tile if there["grad"] else None,
                    metrics,
                ),
                distill.choice(objective, (tile,), labels if there["labels"] else None, metrics),
            )
        for name, law in {"constant": ContrastSpec(), **LAWS}.items():
            yield (
                f"contrast, {short}, {name}",
                contrast.contrast_kernel,
                contrast.arguments(
                    Objective(law=law),
                    tile,
                    tile,
                    numbers if law.schedule == "per_row" else None,
                    labels if law.confidence == "target" else None,
                    empty(torch.float32, ROWS, vocab),
                ),
                tile_choice((tile,)),
            )
    for dtype, out in (("bfloat16", None), ("float32", None), ("float32", "bfloat16"), ("float32", "float16")):
        x = empty(getattr(torch, dtype), ROWS, 151936)
        to = x if out is None else empty(getattr(torch, out), *x.shape)
        yield (
            f"scale, {dtype} to {out or 'itself'}",
            scale.scale_kernel,
            (x, empty(torch.float32, 1), to, x.numel(), to is x),
            {"BLOCK": scale.BLOCK, "num_warps": scale.WARPS},
        )


def source(kernel, given):
    """As the launch would specialise it: None and 1 are constants, multiples of 16 are known to be."""
    signature, constants, known = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = given[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
        else:
            signature[param.name] = mangle_type(value)
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                known[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, known)


def nvidia_resources(compiled):
    """(registers, bytes of local memory per thread), from the assembler's own report."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"\b{word}:(\d+)", report)[1]) for word in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def amd_resources(compiled):
    words = ("vgpr_count", "vgpr_spill_count")
    return tuple(int(re.search(rf"\.{word}:\s+(\d+)", compiled.asm["amdgcn"])[1]) for word in words)


def target_of(word):
    return GPUTarget("hip", word, 64) if word.startswith("gfx") else GPUTarget("cuda", int(word), 32)


def compile_one(word, index):
    """(registers, bytes or registers spilled, bytes of shared memory) of an instantiation."""
    target, (_, kernel, given, choice) = target_of(word), list(instantiations())[index]
    given = dict(zip(kernel.arg_names, (*given, choice.pop("BLOCK")), strict=True))
    if target.backend == "hip":
        choice.pop("maxnreg", None)
    compiled = triton.compile(source(kernel, given), target=target, options=choice)
    resources = amd_resources if target.backend == "hip" else nvidia_resources
    return *resources(compiled), compiled.metadata.shared


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--table", action="store_true", help="print a line for each instantiation")
    parser.add_argument("--only", default="", help="instantiations whose name has this in it")
    options = parser.parse_args()
    start = time.perf_counter()
    names = [name for name, *_ in instantiations()]
    jobs = [(word, i) for word in options.targets for i, name in enumerate(names) if options.only in name]
    if not jobs:
        sys.exit(f"no instantiation has {options.only!r} in its name; there are:\n" + "\n".join(names))
    words, indices = zip(*jobs, strict=True)
    spilled, most = [], {}
    with ProcessPoolExecutor() as pool:
        for (word, i), (registers, spills, shared) in zip(jobs, pool.map(compile_one, words, indices), strict=True):
            most[word] = max(most.get(word, 0), registers)
            line = f"{word:7} {registers:4} registers {spills:4} spilled {shared:6} shared  {names[i]}"
            if options.table:
                print(line, flush=True)
            if spills:
                spilled.append(line)
    print(
        f"{len(jobs)} instantiations for {', '.join(options.targets)} by Triton {triton.__version__} in "
        f"{time.perf_counter() - start:.0f} s;",
        end=" ",
    )
    print("most registers:", ", ".join(f"{word}: {count}" for word, count in most.items()))
    if spilled:
        sys.exit("spilled:\n" + "\n".join(spilled))


if __name__ == "__main__":
    main()
