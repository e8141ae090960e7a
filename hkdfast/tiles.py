"""The loop over row blocks: make each side's tile once, run the row operation, take the student's gradient back.

Written once, for every backend, divergence and kind of source. In GEMM units, S and T for one product through the
student's and the teacher's head: 3S + T with all gradients, 2S + T with a frozen head, S + T without gradients.
"""

import logging
import warnings
from dataclasses import dataclass

import torch

from .backends import find, visible
from .objective import METRICS, Objective, Transform
from .sources import Average, Logits, Projection, same

logger = logging.getLogger("hkdfast")

TILES = ("float32", "bfloat16", "difference")
# Bytes of tiles, unless the caller says. Each block after the first reads and writes the float32 gradient of a trained
# head once more (8 V H bytes; by arithmetic, not measured, 1.2 ms at shape A on an H200): few blocks pay there.
BUDGET = {"cpu": 512 << 20, "cuda": 2 << 30, "cuda, trained head": 8 << 30}
GRAIN = 256  # rows of a tile of a GPU's GEMM: a block of a few more would cost it another wave


def room(memory, device, weights, draws, trained):
    """Bytes for tiles. None where logits that exist are only read, which takes none."""
    if memory is not None or not (draws or any(weight is not None for weight in weights)):
        return memory
    if device.type != "cuda":
        return BUDGET["cpu"]
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    most = BUDGET["cuda, trained head" if trained else "cuda"]
    return min(most, (torch.cuda.mem_get_info(device)[0] + idle) // 2)


def plan(sides, rows, memory):
    """Rows per block: the fewest, evenly filled blocks whose tiles fit the memory."""
    per_row, fixed = sum(side.bytes_per_row for side in sides), max(side.fixed_bytes for side in sides)
    if not per_row or not rows:
        return max(rows, 1)
    if memory < fixed + per_row:
        raise ValueError(f"memory of {memory} bytes is too small: one row of tiles takes {fixed + per_row}")
    most = (memory - fixed) // per_row
    grain = GRAIN if most >= GRAIN else 1
    blocks = -(-rows // (most - most % grain))
    step = min(rows, -(-rows // blocks // grain) * grain)
    logger.info("%d rows in %d blocks of %d, %.1f MB of tiles", rows, blocks, step, (fixed + step * per_row) / 1e6)
    return step


def autocast_dtype(device):
    """In which a linear layer would compute here, or None for its operands' own dtype."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def sides_of(xs, weights, biases, draws, vocab, compute, tiles, memory):
    """The sides of the loop, the several draws of a disturbed branch (the last ones) made one."""
    piece = memory and memory // 4

    def side(x, weight, bias):
        return Logits(x, vocab) if weight is None else Projection([x], weight, bias, vocab, tiles, compute, piece)

    single = len(xs) - len(draws)
    sides = [side(*tensors) for tensors in zip(xs[:single], weights[:single], biases[:single], strict=True)]
    if not draws:
        return sides
    hiddens, weight, bias = xs[single:], weights[single], biases[single]
    shared = weight is not None and all(
        same(w, weight) and same(b, bias) for w, b in zip(weights[single:], biases[single:], strict=True)
    )
    if shared and not any(transform != Transform() for transform in draws):
        return [*sides, Projection(hiddens, weight, bias, vocab, tiles, compute, piece)]
    several = [side(*tensors) for tensors in zip(hiddens, weights[single:], biases[single:], strict=True)]
    return [*sides, Average(several, draws)]


def counted(labels, objective, sides):
    """Indices of the rows that cost a GEMM, or None for all. Their number is the one thing the host waits for."""
    if labels is None or all(isinstance(side, Logits) for side in sides):
        return None  # the row operation itself skips what is ignored: no gather, no wait
    return (labels != objective.ignore_index).nonzero().squeeze(-1)


def check_labels(labels, objective, vocab):
    """Looked at for nothing on the CPU; on CUDA a bad label is an assertion of the device."""
    if labels is None or not labels.numel():
        return
    known = (labels == objective.ignore_index) | ((labels >= 0) & (labels < vocab))
    if labels.is_cuda:
        torch._assert_async(known.all(), "a label is neither a word of the vocabulary nor ignore_index")
    elif visible(labels) and not known.all():
        wrong = labels[~known][0].item()
        raise ValueError(f"label {wrong} is neither in 0..{vocab - 1} nor ignore_index {objective.ignore_index}")


@dataclass(frozen=True, eq=False)
class Call:
    """Everything that is asked of the loop but the student's own tensors."""

    xs: list  # of the teacher and of the disturbed branches: logits (N, V), or hidden states (N, H)
    weights: list  # (V, H) of their heads, or None for logits
    biases: list  # (V,) or None
    labels: torch.Tensor | None  # (N,) int64
    alpha: torch.Tensor | None  # (N,) float32, purification weights of the rows
    objective: Objective
    draws: list  # Transform of each disturbed branch if there are several, else empty
    vocab: int  # words compared, the first so many on every side
    compute: torch.dtype | None  # in which heads are multiplied; None: their own
    tiles: str
    memory: int | None
    backend: str | None


def run(call, student, weight, wants, metrics):
    """Per-row loss, metrics and the gradients of sum_i weight_i loss_i.

    Args:
        call: Call.
        student: (x, weight, bias): logits (N, V), None, None; or hidden states (N, H) and their head's (V, H), (V,).
        weight: (N,) float32 or None for 1.
        wants: which gradients of x, weight, bias are wanted.
        metrics: whether to return METRICS.

    Returns:
        loss (N,), metrics (7, N) or None, d_x, d_weight, d_bias (None where not wanted). Gradients of hidden states
        and weights are float32, those of logits have the logits' dtype (fp16: float32). float64 stays float64.
    """
    objective, labels, alpha = call.objective, call.labels, call.alpha
    check_labels(labels, objective, call.vocab)
    xs, weights, biases = (
        [one, *others] for one, others in zip(student, (call.xs, call.weights, call.biases), strict=True)
    )
    n, device = len(xs[0]), xs[0].device
    memory = room(call.memory, device, weights, call.draws, wants[1])
    sides = sides_of(xs, weights, biases, call.draws, call.vocab, call.compute, call.tiles, memory)
    main, teacher, noisy = sides if len(sides) == 3 else (*sides, None)
    if objective.difference:
        for other in sides[1:]:
            other.subtract(main)
    index = counted(labels, objective, sides)
    if index is not None:
        for one in sides:
            one.select(index)
        labels, weight, alpha = (t if t is None else t[index] for t in (labels, weight, alpha))
    rows = n if index is None else len(index)
    wide = next((side.dtype for side in sides if side.dtype == torch.float64), main.dtype)
    module = find(device, wide, call.backend)
    dtype = torch.promote_types(main.dtype, torch.float32)
    loss = torch.empty(rows, dtype=dtype, device=device)
    table = torch.empty(len(METRICS), rows, dtype=dtype, device=device) if metrics else None
    if any(wants):
        main.want(*wants)

    def block(start, stop):
        rows_of = slice(start, stop)
        z = main.tile(start, stop)
        grad = main.gradient(start, stop, z) if any(wants) else None
        module.rows(
            objective,
            z,
            teacher.tile(start, stop),
            None if noisy is None else noisy.tile(start, stop),
            *(None if t is None else t[rows_of] for t in (alpha, labels, weight)),
            loss[rows_of],
            grad,
            None if table is None else table[:, rows_of],
        )
        if grad is not None:
            main.back(grad, start, stop)

    def sweep(step):
        if any(wants):
            main.reset()
        for one in sides:
            one.allocate(min(step, rows))
        for start in range(0, rows, step):
            block(start, min(start + step, rows))

    step = plan(sides, rows, memory)
    try:
        sweep(step)
        again = False
    except torch.OutOfMemoryError:
        if step == 1:
            raise
        again = True
    if again:  # out here the traceback holds no tile of the first try any more
        for one in sides:
            one.release()
        warnings.warn(f"out of memory with blocks of {step} rows: trying once more with half", stacklevel=2)
        sweep(-(-step // 2))
    if index is not None:
        loss = loss.new_zeros(n).index_copy_(0, index, loss)
        table = table if table is None else table.new_zeros(len(METRICS), n).index_copy_(1, index, table)
    return loss, table, *(main.gradients() if any(wants) else (None, None, None))
