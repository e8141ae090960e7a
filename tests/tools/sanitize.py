"""Every instantiation of a GPU backend on small cases: the program that compute-sanitizer watches.

Nothing is compared here, that is the tests' part. benchmarks/speed/gpu.sh runs it once for each line of --list.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # where hkdfast is not installed
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from cases import CASES, DEVICE, Case, home, inputs, law, run_rows

from hkdfast import DIVERGENCES, backends
from hkdfast.ops.dispatch import ORDER, load
from hkdfast.ops.objective import Objective

# rows that take a cluster of several blocks, up to the largest, and one that is misaligned
LONG = {
    f"{vocab} words, {name}": Case((2, vocab), dtype, options=options)
    for vocab in (49_153, 151_936, 262_144)
    for dtype in (torch.bfloat16, torch.float32)
    for name, options in (("plain", {}), ("purified", law()))
}
CONTRASTS = {f"contrast, {outside}, {beta}": law(plausibility=beta, outside=outside)
             for outside in ("clean", "drop") for beta in (0.0, 0.1)}  # fmt: skip


def runs():
    """(backend, divergence, operation, name of its kernel)"""
    usable = backends()
    for backend in ORDER[DEVICE]:
        if backend == "reference" or usable[backend] != "ok":
            continue
        for divergence in DIVERGENCES:
            yield backend, divergence, "rows", "rows_kernel"
        # the CUDA backend decodes by its row operation
        yield backend, "none", "contrast", "rows_kernel" if backend == "cuda" else "contrast_kernel"


def wide(module, divergence, options):
    """Float32 tiles with a bfloat16 gradient, as heads of bfloat16 models have them: a kind of its own on CUDA."""
    case = Case((5, 49_160), labels=True, ignored=(1,), options={**options, "hard_weight": 0.5})
    student, teacher, noisy, _, labels, _ = (t if t is None else t.to(home(module)) for t in inputs(case))
    loss, grad = student.new_empty(len(student)), torch.zeros_like(student, dtype=torch.bfloat16)
    for accumulate in (False, True):
        objective = Objective(divergence=divergence, beta=0.3, accumulate=accumulate, **case.options)
        module.rows(objective, student, teacher, noisy, None, labels, None, loss, grad, None)


def contrast(module, options):
    case = Case((3, 1031), torch.bfloat16, options=options)
    clean, noisy = (t.to(home(module)) for t in inputs(case)[1:3])
    out = torch.empty_like(clean, dtype=torch.float32)
    module.contrast(Objective(**case.options), clean, noisy, None, None, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the runs, BACKEND DIVERGENCE OPERATION KERNEL")
    parser.add_argument("--few", action="store_true", help="three cases of each run")
    parser.add_argument("run", nargs="*", help="a line of --list")
    args = parser.parse_args()
    if args.list:
        for line in runs():
            print(*line)
        return
    backend, divergence, operation, _ = args.run
    module = load(backend)
    if operation == "contrast":
        cases = {name: lambda options=options: contrast(module, options) for name, options in CONTRASTS.items()}
    else:
        cases = {name: lambda case=case: run_rows(module, case, divergence) for name, case in {**CASES, **LONG}.items()}
        for name, options in (("wide", {}), ("wide, purified", law())):
            cases[name] = lambda options=options: wide(module, divergence, options)
    names = list(cases)[:3] if args.few else list(cases)
    for name in names:
        cases[name]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{backend} {divergence} {operation}: {len(names)} cases ran")


if __name__ == "__main__":
    main()
