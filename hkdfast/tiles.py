"""The loop over row blocks: make each side's tile once, run the row operation, take the student's gradient back.

Written once, for every backend, divergence and kind of source. In GEMM units, S and T for one product through the
student's and the teacher's head: 3S + T with all gradients, 2S + T with a frozen head, S + T without gradients.
"""

import logging
import warnings

import torch

from .backends import find
from .objective import METRICS
from .sources import Average, Logits, Projection

logger = logging.getLogger("hkdfast")

TILES = ("float32", "bfloat16", "difference")
BUDGET = {"cpu": 512 << 20, "cuda": 4 << 30}  # bytes of tiles, unless the caller says


def budget(device, memory):
    if memory is not None:
        return memory
    most = BUDGET.get(device.type, BUDGET["cpu"])
    if device.type == "cuda":
        most = min(most, torch.cuda.mem_get_info(device)[0] // 2)
    return most


def plan(sides, rows, device, memory):
    """Rows per block: the fewest, evenly filled blocks whose tiles fit the budget."""
    per_row, fixed = (
        sum(side.bytes_per_row for side in sides),
        max(side.fixed_bytes for side in sides),
    )
    if not per_row or not rows:
        return max(rows, 1)
    if memory is not None and memory < fixed + per_row:
        raise ValueError(f"memory of {memory} bytes is too small: one row of tiles takes {fixed + per_row}")
    fit = max(1, (budget(device, memory) - fixed) // per_row)
    blocks = -(-rows // fit)
    step = -(-rows // blocks)
    logger.info(
        "%d rows in %d blocks of %d, %.1f MB of tiles",
        rows,
        blocks,
        step,
        (fixed + step * per_row) / 1e6,
    )
    return step


def side(x, weight, bias, vocab, tiles, compute):
    return Logits(x, vocab) if weight is None else Projection(x, weight, bias, vocab, tiles, compute)


def sides_of(xs, weights, biases, draws, vocab, tiles):
    """The sides of the loop, the several draws of a disturbed branch (the last ones) made one."""
    device = xs[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    made = [
        side(x, weight, bias, vocab, tiles, autocast or x.dtype)
        for x, weight, bias in zip(xs, weights, biases, strict=True)
    ]
    return [*made[: -len(draws)], Average(made[-len(draws) :], draws)] if draws else made


def counted(labels, objective, sides):
    """Indices of the rows that cost a GEMM, or None for all. Their number is the one thing the host waits for."""
    if labels is None or all(isinstance(side, Logits) for side in sides):
        return None  # the row operation itself skips what is ignored: no gather, no wait
    return (labels != objective.ignore_index).nonzero().squeeze(-1)


def check_rows(labels, weight, objective, vocab):
    """Values that can be looked at for nothing on the CPU; on CUDA a bad label is an assertion of the device."""
    if labels is not None and labels.numel():
        known = (labels == objective.ignore_index) | ((labels >= 0) & (labels < vocab))
        if labels.is_cuda:
            torch._assert_async(
                known.all(),
                "a label is neither a word of the vocabulary nor ignore_index",
            )
        elif not known.all():
            wrong = labels[~known][0].item()
            raise ValueError(f"label {wrong} is neither in 0..{vocab - 1} nor ignore_index {objective.ignore_index}")
    if weight is not None and not weight.is_cuda and not (weight >= 0).all():
        raise ValueError(f"weights must be finite and not negative, got {weight[~(weight >= 0)][0].item()}")


def run(
    xs,
    weights,
    biases,
    labels,
    weight,
    alpha,
    objective,
    draws,
    vocab,
    wants,
    metrics,
    tiles,
    memory,
    backend,
):
    """Per-row loss, metrics and the gradients of sum_i weight_i loss_i.

    Args:
        xs, weights, biases: of the student, the teacher and the disturbed branches: logits (N, V) with weight and bias
            None, or hidden states (N, H) with their head's weight (V, H) and bias (V,) or None.
        labels, weight, alpha: (N,) int64, float32, float32, or None.
        objective: Objective.
        draws: Transform of each disturbed branch if there are several, else empty.
        vocab: words compared, the first so many on every side.
        wants: gradients wanted of the student's x, weight, bias.
        metrics: whether to return METRICS.
        tiles, memory, backend: as in distill_loss.

    Returns:
        loss (N,), metrics (7, N) or (0,), d_x, d_weight, d_bias (empty where not wanted). Gradients of hidden states
        and weights are float32, those of logits have the logits' dtype (fp16: float32).
    """
    check_rows(labels, weight, objective, vocab)
    sides = sides_of(xs, weights, biases, draws, vocab, tiles)
    student, teacher, noisy = sides if len(sides) == 3 else (*sides, None)
    if objective.difference:
        for other in sides[1:]:
            other.subtract(student)
    n, device = len(xs[0]), xs[0].device
    index = counted(labels, objective, sides)
    if index is not None:
        for one in sides:
            one.select(index)
        labels, weight, alpha = (t if t is None else t[index] for t in (labels, weight, alpha))
    rows = n if index is None else len(index)
    module = find(device, student.dtype, backend)
    dtype = torch.promote_types(student.dtype, torch.float32)
    loss = torch.empty(rows, dtype=dtype, device=device)
    table = torch.empty(len(METRICS), rows, dtype=dtype, device=device) if metrics else None
    if any(wants):
        student.want(*wants)

    def sweep(step):
        if any(wants):
            student.reset()
        for one in sides:
            one.allocate(min(step, rows))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            block = slice(start, stop)
            z = student.tile(start, stop)
            grad = student.gradient(start, stop, z) if any(wants) else None
            module.rows(
                objective,
                z,
                teacher.tile(start, stop),
                None if noisy is None else noisy.tile(start, stop),
                None if alpha is None else alpha[block],
                None if labels is None else labels[block],
                None if weight is None else weight[block],
                loss[block],
                grad,
                None if table is None else table[:, block],
            )
            if grad is not None:
                student.back(grad, start, stop)

    step = plan(sides, rows, device, memory)
    try:
        sweep(step)
    except torch.OutOfMemoryError:
        warnings.warn(
            f"out of memory with blocks of {step} rows: trying once more with half",
            stacklevel=2,
        )
        sweep(-(-step // 2))
    if index is not None:
        loss = loss.new_zeros(n).index_copy_(0, index, loss)
        table = table if table is None else table.new_zeros(len(METRICS), n).index_copy_(1, index, table)
    return loss, table, *(student.gradients() if any(wants) else (None, None, None))
