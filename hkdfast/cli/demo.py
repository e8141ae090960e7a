"""hkdfast demo: compare distill_loss with plain PyTorch on this machine. Needs torch only."""

import ctypes
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import Head, distill_loss
from ..budget import Budget, TooSlow, measure
from ..data import devices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser):
    parser.description = (
        "Compute loss and gradient of a forward KL between two models over a vocabulary, with plain PyTorch and with "
        "distill_loss: first from logits, then from the two language-model heads, where PyTorch has to compute the "
        "logits. error: the largest error of the gradient against float64, relative to its largest entry. memory: the "
        "peak above the inputs. A case that would exceed its share of --seconds is skipped, with the reason."
    )
    parser.add_argument("--rows", type=int, default=512, help="tokens in the batch")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens in the vocabulary")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of both models")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="data type of logits, hidden states and heads"
    )
    parser.add_argument("--device", help="torch device; by default a GPU if there is one")
    parser.add_argument("--repeats", type=int, default=3, help="number of timed runs; the fastest one is reported")
    parser.add_argument("--seconds", type=float, default=120, help="time limit for the whole command")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the inputs")


def run(args):
    for name in ("rows", "vocab", "hidden", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least 1")
    if not 0 < args.seconds < float("inf"):
        raise ValueError(f"--seconds is {args.seconds}, expected a finite number above 0")
    device = devices.find(args.device)
    print(f"{args.rows} rows, vocabulary {args.vocab}, width {args.hidden}, {args.dtype} on {device}")
    print(f"{'forward KL, loss and gradient':34}{'time':>12}{'error':>12}{'memory':>12}")
    found = {}
    budget = Budget(args.seconds, sum(1 + len(names) for names in cases(args.dtype).values()))
    try:
        for title, inputs, rowwise in problems(args, device):
            losses = cases(args.dtype)[title]
            truth = true_gradients(inputs, rowwise, budget.begin(f"{title}, float64 as the truth"), device)
            for name, loss in losses.items():
                share = budget.begin(f"{title}, {name}")
                try:
                    row = found[title, name] = one_row(loss, inputs, rowwise, truth, share, args.repeats, device)
                    text = (
                        f"{row['time'] * 1e3:>9.1f} ms{shown(row['error'], '.1e')}{shown(row['memory'], '.0f', 'MiB')}"
                    )
                except TooSlow as slow:
                    text = f"   skipped: {slow}"
                budget.clear()
                print(f"{title + ', ' + name:34}{text}", flush=True)
    finally:
        budget.clear()
    print(meaning(found, args))


def shown(number, form, unit=""):
    return f"{'unknown' if number is None else f'{number:{form}} {unit}'.strip():>12}"


def one_row(loss, inputs, rowwise, truth, share, repeats, device):
    """{"time": seconds, "error", "memory": MiB}; error and memory are None if unknown."""
    wait = partial(synchronize, device)
    seconds = measure(lambda n: gradients(loss, few(inputs, rowwise, n)), len(inputs[0]), share, repeats, wait)
    before = peak(device, reset=True)
    got = gradients(loss, inputs)
    wait()
    memory = None if before is None else (peak(device) - before) / 2**20
    pairs = () if truth is None else zip(got, truth, strict=True)
    errors = [((ours.double() - exact).abs().max() / exact.abs().max()).item() for ours, exact in pairs]
    return {"time": seconds, "error": max(errors, default=None), "memory": memory}


def true_gradients(inputs, rowwise, share, device):
    """Gradients in float64, or None if they would exceed their share of the time."""
    exact = [x.double() for x in inputs]
    loss = partial(plain, dtype=torch.float64)
    try:
        measure(
            lambda n: gradients(loss, few(exact, rowwise, n)), len(exact[0]), share, 0, partial(synchronize, device)
        )
    except TooSlow:
        return None
    return gradients(loss, exact)


def meaning(found, args):
    """A sentence that summarizes the table."""
    compared, missing = [], []
    for title, losses in cases(args.dtype).items():
        plain_row = found.get((title, "PyTorch"))
        missing += [f"{title}, {name}" for name in losses if (title, name) not in found]
        for name in losses:
            row = found.get((title, name))
            if name == "PyTorch" or row is None or plain_row is None:
                continue
            shares = [
                f"{row[of] / plain_row[of]:.2g} of its {of}" for of in row if row[of] is not None and plain_row[of]
            ]
            compared.append(f"{title + name.removeprefix('hkdfast')} {', '.join(shares)}")
    other = "" if args.dtype == "float32" else ", or --dtype float32"
    left = f" Skipped: {'; '.join(missing)}; they need more --seconds, fewer --rows{other}." if missing else ""
    return (f"hkdfast against PyTorch: {'; '.join(compared)}." if compared else "There is nothing to compare.") + left


def problems(args, device):
    """(title, tensors, indices of those with one row per token). The first half of the tensors is the student's, for
    which gradients are computed."""
    generator = torch.Generator().manual_seed(args.seed)

    def random(*shape, scale=1.0):
        x = torch.randn(*shape, generator=generator) * scale
        return x.to(device, DTYPES[args.dtype])

    spread = 2 * args.hidden**-0.5  # logits with a standard deviation of 2
    student, teacher = (random(args.rows, args.hidden) for _ in range(2))
    weight, teacher_weight = (random(args.vocab, args.hidden, scale=spread) for _ in range(2))
    # in float32: on a processor without 16-bit matrix products these would take minutes
    logits = (x.float() @ w.float().T for x, w in ((student, weight), (teacher, teacher_weight)))
    yield "logits", [x.to(student.dtype) for x in logits], (0, 1)
    yield "heads", [student, weight, teacher, teacher_weight], (0, 2)


def cases(dtype):
    """{title of a problem: {name: function from its tensors to a loss}}"""

    def heads(precision):
        return lambda x, w, y, v: distill_loss(Head(x, w), Head(y, v), precision=precision)

    found = {"PyTorch": plain, "hkdfast": heads("float32")}
    if dtype != "float32":
        # PyTorch rounds its logits to 16 bits too: a comparison of times at the same precision
        found["hkdfast, 16-bit tiles"] = heads("bfloat16")
    return {"logits": {"PyTorch": plain, "hkdfast": distill_loss}, "heads": found}


def few(tensors, rowwise, rows):
    """The tensors, restricted to the first `rows` tokens."""
    return [x[:rows] if i in rowwise else x for i, x in enumerate(tensors)]


def plain(*tensors, dtype=torch.float32):
    """The loss in plain PyTorch: logits in the models' dtype, log-softmax and KL in float32."""
    if len(tensors) == 4:
        x, w, y, v = tensors
        tensors = x @ w.T, y @ v.T
    student, teacher = (x.to(dtype).log_softmax(-1) for x in tensors)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def gradients(loss, inputs):
    half = len(inputs) // 2
    leaves = [x.detach().requires_grad_() for x in inputs[:half]]
    return torch.autograd.grad(loss(*leaves, *inputs[half:]), leaves)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device, reset=False):
    """Peak bytes since the last reset; with reset, bytes now. On a CPU those of the process (Linux), or None."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            # the C library keeps freed memory and would reuse it without a visible change
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None
    return int(status["VmHWM"].split()[0]) * 1024
