"""The first contact of a backend with a GPU: every kernel against float64 in seconds, then the time of each alone.

    timeout -k 5 90 python benchmarks/speed/smoke.py check BACKEND [--tiny]    exits with 1 at the first wrong result
    python benchmarks/speed/smoke.py time BACKEND [--tiny]                     ms and GB/s of the row operation

A case's name is printed before it runs, so that a kernel that hangs or crashes is named by the last line.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # where hkdfast is not installed

import torch

from hkdfast import DIVERGENCES
from hkdfast.ops import reference
from hkdfast.ops.dispatch import load
from hkdfast.ops.objective import ContrastSpec, Objective

LENGTHS = (1031, 8192, 32_000, 50_257, 128_256, 151_936, 262_144)
TIMED = (1024, 4096, 32_000, 128_256, 151_936, 262_144)  # short rows too, where Triton may be faster
DTYPES = {"bf16": (torch.bfloat16, torch.bfloat16), "heads": (torch.float32, torch.bfloat16)} | {
    "fp32": (torch.float32, torch.float32)
}  # of the tiles and of the gradient
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 4e-3}  # of the gradient's error, relative to its norm
LOSS_BOUND = 1e-4


def tiles(device, n, vocab, dtype, count, offset=0):
    """(N, V) tiles near each other; with an offset they begin so many elements behind an aligned address."""
    generator = torch.Generator(device).manual_seed(0)
    first = 3 * torch.randn(n, vocab, generator=generator, device=device)
    made = [first, *(first + torch.randn(n, vocab, generator=generator, device=device) for _ in range(count - 1))]
    wide = [torch.full((n, vocab + offset), float("nan"), dtype=dtype, device=device) for _ in made]
    for space, tile in zip(wide, made, strict=True):
        space[:, offset:] = tile.to(dtype)
    return [space[:, offset:] for space in wide]


def errors(module, device, divergence, kind, contrast, n, vocab, how):
    """(error of the losses, error of the gradient) of one call, both relative, against float64."""
    dtype, kept = DTYPES[kind]
    given = tiles(device, n, vocab, dtype, 3 if contrast else 2, 3 if how == "misaligned" else 0)
    law = ContrastSpec(schedule="linear", alpha=1.5) if contrast else None
    labels = torch.arange(n, device=device) * 7 % vocab if how == "labels" else None
    hard = 0.0 if labels is None else 0.5
    objective = Objective(divergence, beta=0.3, accumulate=how == "accumulated", hard_weight=hard, law=law)
    if labels is not None:
        labels[0] = -100
    exact = [None if t is None else t.double() for t in (*given, *[None] * (3 - len(given)))]
    truth = (
        torch.empty(n, device=device, dtype=torch.float64),
        torch.zeros(n, vocab, device=device, dtype=torch.float64),
    )
    reference.rows(objective, *exact, None, labels, None, *truth, None)
    if how == "in place":
        grad = given[0]
    else:
        grad = torch.full((n, vocab), 0.0 if how == "accumulated" else float("nan"), dtype=kept, device=device)
    loss = torch.full((n,), float("nan"), device=device)
    noisy = given[2] if contrast else None
    module.rows(objective, given[0], given[1], noisy, None, labels, None, loss, grad, None)
    loss_error = (loss.double() - truth[0]).abs().max() / truth[0].abs().max()
    return loss_error.item(), ((grad.double() - truth[1]).norm() / truth[1].norm()).item()


def far(module, device):
    """Rows that begin past 2**31 elements have the same bits as neighbors; written in place."""
    stride, vocab = 2**30 + 16, 4096
    student, teacher = tiles(device, 3, vocab, torch.bfloat16, 2)
    space = torch.empty(2 * stride + vocab, dtype=torch.bfloat16, device=device)
    away = space.as_strided((3, vocab), (stride, 1)).copy_(student)
    found = []
    for tile in (student, away):
        loss = torch.empty(3, device=device)
        module.rows(Objective("jensen_shannon"), tile, teacher, None, None, None, None, loss, tile, None)
        found.append((loss, tile.clone()))
    if not all(map(torch.equal, *found)):
        sys.exit("wrong: rows past 2**31 elements")
    print("rows past 2**31 elements: the same bits", flush=True)


def ways(kind, vocab):
    """How the rows are given, beside plainly."""
    yield "plain"
    yield "in place" if kind != "heads" else "accumulated"
    yield "misaligned" if vocab < 60_000 else "labels"


def check(module, device, lengths):
    count = 0
    if device == "cuda":
        far(module, device)
    for kind, divergence, contrast, vocab in itertools.product(DTYPES, DIVERGENCES, (False, True), lengths):
        for how in ways(kind, vocab):
            name = f"{kind}, {divergence}{', contrast' if contrast else ''}, {vocab} tokens, {how}"
            print(name, end=": ", flush=True)
            begun = time.perf_counter()
            try:
                loss, grad = errors(module, device, divergence, kind, contrast, 37 if vocab < 60_000 else 5, vocab, how)
            except ValueError as error:  # a row that does not fit in shared memory
                print("refused:", str(error)[:90], flush=True)
                continue
            right = loss < LOSS_BOUND and grad < BOUNDS[DTYPES[kind][1]]  # NaN is not
            print(f"loss {loss:.1e}, gradient {grad:.1e}, {time.perf_counter() - begun:.2f} s", flush=True)
            if not right:
                sys.exit(f"wrong: {name}")
            count += 1
    print(f"{count} cases are right")


def seconds(run, device, rounds=7, iterations=5):
    """Median time of a call."""
    run()
    found = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(iterations):
                run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / iterations / 1e3)
        else:
            begun = time.perf_counter()
            run()
            found.append(time.perf_counter() - begun)
    return sorted(found)[rounds // 2]


def times(module, device, lengths):
    """Milliseconds of the published vocabularies, the whole of the memory traffic beside."""
    cases = [("bf16", name, law) for name, law in (("reverse_kl", 0), ("jensen_shannon", 0), ("reverse_kl", 1))]
    cases += [("heads", "reverse_kl", 0), ("heads", "jensen_shannon", 0)]
    for vocab, (kind, divergence, contrast) in itertools.product(lengths, cases):
        dtype, kept = DTYPES[kind]
        n = max(1, (2**30 if device == "cuda" else 2**16) // vocab)
        given = tiles(device, n, vocab, dtype, 3 if contrast else 2)
        grad, loss = torch.empty(n, vocab, dtype=kept, device=device), torch.empty(n, device=device)
        objective = Objective(divergence, law=ContrastSpec(alpha=1.5) if contrast else None)
        arguments = (*given, *[None] * (3 - len(given)), None, None, None, loss, grad, None)
        name = f"{kind}, {divergence}{', contrast' if contrast else ''}, {n} x {vocab}"
        try:
            taken = seconds(lambda of=(objective, *arguments): module.rows(*of), device)
        except ValueError as error:
            print(f"{name}: refused: {str(error)[:90]}", flush=True)
            continue
        moved = n * vocab * (sum(tile.element_size() for tile in given) + grad.element_size())
        print(f"{name}: {taken * 1e3:.3f} ms, {moved / taken / 1e9:.0f} GB/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "time"))
    parser.add_argument("backend", choices=("cuda", "triton", "cpu", "reference"))
    parser.add_argument("--tiny", action="store_true", help="two short vocabularies, whose times say nothing")
    args = parser.parse_args()
    module = load(args.backend)
    module = getattr(module, "by_name", module)  # a row that does not fit is an error here, not another backend's
    device = "cuda" if args.backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    lengths = (257, 1031) if args.tiny else LENGTHS
    if args.what == "check":
        check(module, device, lengths)
    else:
        times(module, device, lengths if args.tiny else TIMED)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
