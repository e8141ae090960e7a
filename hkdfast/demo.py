"""hkdfast demo: distill_loss against plain PyTorch on this machine, through the public API, with torch only."""

import ctypes
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from . import Head, devices, distill_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser):
    parser.description = (
        "Loss and gradient of a forward KL between two models over a vocabulary, as plain PyTorch writes it and by "
        "distill_loss: once from logits that exist, once from the two language-model heads, which PyTorch has to "
        "multiply out. Error is that of the gradient against float64, relative to its largest entry; memory is the "
        "peak above the inputs."
    )
    parser.add_argument("--rows", type=int, default=512, help="tokens of the batch")
    parser.add_argument("--vocab", type=int, default=32000, help="words of the vocabulary")
    parser.add_argument("--hidden", type=int, default=512, help="width of both models")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of logits, hidden states and heads")
    parser.add_argument("--device", help="torch device; without it a GPU if there is one")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the fastest counts")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")


def run(args):
    for name in ("rows", "vocab", "hidden", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least 1")
    device = devices.find(args.device)
    print(f"{args.rows} rows, vocabulary {args.vocab}, width {args.hidden}, {args.dtype} on {device}")
    print(f"{'forward KL, loss and gradient':34}{'time':>12}{'error':>12}{'memory':>12}")
    for title, inputs, cases in problems(args, device):
        truth = gradients(lambda *x: plain(*x, dtype=torch.float64), [x.double() for x in inputs])
        for name, loss in cases.items():
            found, seconds, memory = measure(loss, inputs, args.repeats, device)
            error = max(
                ((got.double() - exact).abs().max() / exact.abs().max()).item()
                for got, exact in zip(found, truth, strict=True)
            )
            size = "unknown" if memory is None else f"{memory / 2**20:.0f} MiB"
            print(f"{title + ', ' + name:34}{seconds * 1e3:>9.1f} ms{error:>12.1e}{size:>12}")


def problems(args, device):
    """(title, tensors, {name: loss of the tensors}); the first half is the student's, whose gradients count."""
    generator = torch.Generator().manual_seed(args.seed)

    def random(*shape, scale=1.0):
        x = torch.randn(*shape, generator=generator) * scale
        return x.to(device, DTYPES[args.dtype])

    spread = 2 * args.hidden**-0.5  # logits with a standard deviation of 2
    student, teacher = (random(args.rows, args.hidden) for _ in range(2))
    weight, teacher_weight = (random(args.vocab, args.hidden, scale=spread) for _ in range(2))
    yield "logits", [student @ weight.T, teacher @ teacher_weight.T], {"PyTorch": plain, "hkdfast": distill_loss}

    def heads(tiles):
        return lambda x, w, y, v: distill_loss(Head(x, w), Head(y, v), tiles=tiles)

    cases = {"PyTorch": plain, "hkdfast": heads("float32")}
    if args.dtype != "float32":
        # as inexact as PyTorch, which rounds its logits: the like to compare times with
        cases["hkdfast, 16-bit tiles"] = heads("bfloat16")
    yield "heads", [student, weight, teacher, teacher_weight], cases


def plain(*tensors, dtype=torch.float32):
    """What a training loop writes today: logits in the models' dtype, log-softmax and KL in float32."""
    if len(tensors) == 4:
        x, w, y, v = tensors
        tensors = x @ w.T, y @ v.T
    student, teacher = (x.to(dtype).log_softmax(-1) for x in tensors)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def gradients(loss, inputs):
    half = len(inputs) // 2
    leaves = [x.detach().requires_grad_() for x in inputs[:half]]
    return torch.autograd.grad(loss(*leaves, *inputs[half:]), leaves)


def measure(loss, inputs, repeats, device):
    """(gradients, seconds of the fastest run, bytes of the peak above what was there or None where that is unknown)."""
    found = gradients(loss, inputs)  # warm-up: builds and caches are not timed
    best = float("inf")
    for _ in range(repeats):
        del found
        synchronize(device)
        start = time.perf_counter()
        found = gradients(loss, inputs)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    del found
    before = peak(device, reset=True)
    found = gradients(loss, inputs)
    synchronize(device)
    memory = None if before is None else peak(device) - before
    return found, best, memory


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device, reset=False):
    """Bytes at the peak since the last reset; with reset, bytes now. The process's own on Linux, else None."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            # what the C library keeps of freed memory would be taken again unseen
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None
    return int(status["VmHWM"].split()[0]) * 1024
