"""The loop over row blocks: make each party's tile once, run the row operation, take the gradients back.

Written once, for every backend, divergence, kind of source and number of models that teach each other. In GEMM units,
one product through each head: 3 for a trained model, 2 with a frozen head, 1 without gradients, whatever the number of
lessons between them. A student and its teacher: 3S + T, 2S + T, S + T.
"""

import logging
import warnings
from dataclasses import dataclass

import torch

from ..heads import same
from ..ops.dispatch import find, visible
from ..ops.objective import METRICS, UNLABELED, Objective, Transform
from .tile_sources import Average, Logits, Projection

logger = logging.getLogger("hkdfast")

TILES = ("float32", "bfloat16", "difference")
# Bytes of tiles, unless the caller says. Each block after the first reads and writes the float32 gradient of a trained
# head once more (8 V H bytes; by arithmetic, not measured, 1.2 ms at shape A on an H200): few blocks pay there.
BUDGET = {"cpu": 512 << 20, "cuda": 2 << 30, "cuda, trained head": 8 << 30}
GRAIN = 256  # rows of a tile of a GPU's GEMM: a block of a few more would cost it another wave


def room(tile_memory, device, weights, averaged, trained):
    """Bytes for tiles. None where logits that exist are only read, which takes none."""
    if tile_memory is not None or not (averaged or any(weight is not None for weight in weights)):
        return tile_memory
    if device.type != "cuda":
        return BUDGET["cpu"]
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    most = BUDGET["cuda, trained head" if trained else "cuda"]
    return min(most, (torch.cuda.mem_get_info(device)[0] + idle) // 2)


def plan(sides, rows, tile_memory):
    """Rows per block: the fewest, evenly filled blocks whose tiles fit the memory."""
    per_row, fixed = sum(side.bytes_per_row for side in sides), max(side.fixed_bytes for side in sides)
    if not per_row or not rows:
        return max(rows, 1)
    if tile_memory < fixed + per_row:
        raise ValueError(f"tile_memory of {tile_memory} bytes is too small: one row of tiles takes {fixed + per_row}")
    most = (tile_memory - fixed) // per_row
    grain = GRAIN if most >= GRAIN else 1
    blocks = -(-rows // (most - most % grain))
    step = min(rows, -(-rows // blocks // grain) * grain)
    logger.info("%d rows in %d blocks of %d, %.1f MB of tiles", rows, blocks, step, (fixed + step * per_row) / 1e6)
    return step


@dataclass(frozen=True)
class Party:
    """A side of the loop: whose tile it is."""

    branches: tuple  # places of its tensors; several are draws, whose logits are averaged
    draws: tuple = ()  # Transform of each draw if there are several


@dataclass(frozen=True)
class Lesson:
    """One run of the row operation over a block: what a student is told by a teacher. Sides are places of parties."""

    student: int
    teacher: int
    noisy: int | None  # the disturbed branch of a purified teacher
    objective: Objective
    alpha: int | None = None  # place of the purification weights of the rows, where the law reads them
    counts: bool = True  # whether its loss is part of the total; its gradient always is


def side_of(party, tensors, vocab, compute, precision, tile_memory):
    """What makes the tiles of a party, from its (x, weight, bias)."""
    piece = tile_memory and tile_memory // 4
    mine = [tensors[place] for place in party.branches]
    hiddens, weights, biases = zip(*mine, strict=True)
    head = weights[0] is not None and all(same(w, weights[0]) and same(b, biases[0]) for _, w, b in mine)
    if head and not any(transform != Transform() for transform in party.draws):
        return Projection(list(hiddens), weights[0], biases[0], vocab, precision, compute, piece)
    sides = [
        Logits(x, vocab) if weight is None else Projection([x], weight, bias, vocab, precision, compute, piece)
        for x, weight, bias in mine
    ]
    return Average(sides, party.draws) if party.draws else sides[0]


def counted(labels, ignore_index, sides):
    """Indices of the rows that cost a GEMM, or None for all. Their number is the one thing the host waits for."""
    if labels is None or all(isinstance(side, Logits) for side in sides):
        return None  # the row operation itself skips what is ignored: no gather, no wait
    return (labels != ignore_index).nonzero().squeeze(-1)


def check_labels(call):
    """Looked at for nothing on the CPU; on CUDA a bad label is an assertion of the device."""
    labels, vocab, ignore_index = call.labels, call.vocab, call.lessons[0].objective.ignore_index
    if labels is None or not labels.numel():
        return
    laws = [lesson.objective.law for lesson in call.lessons]
    others = {"ignore_index": ignore_index}
    if not any(law and law.reads_labels for law in laws):
        others["UNLABELED"] = UNLABELED
    known = (labels >= 0) & (labels < vocab)
    for other in others.values():
        known |= labels == other
    if labels.is_cuda:
        torch._assert_async(known.all(), f"a label is neither a word of the vocabulary nor {' nor '.join(others)}")
    elif visible(labels) and not known.all():
        wrong, names = labels[~known][0].item(), " nor ".join(f"{name} {label}" for name, label in others.items())
        raise ValueError(f"label {wrong} is neither in 0..{vocab - 1} nor {names}")


@dataclass(frozen=True, eq=False)
class Call:
    """Everything that is asked of the loop but the tensors that may get a gradient."""

    parties: tuple  # of Party
    lessons: tuple  # of Lesson, those that count first; a student's first writes its gradient, its others accumulate
    labels: torch.Tensor | None  # (N,) int64
    alphas: list  # of (N,) float32, purification weights of the rows
    vocab: int  # words compared, the first so many on every side
    compute: torch.dtype | None  # in which heads are multiplied; None: their own
    precision: str
    tile_memory: int | None
    backend: str | None


def sides_of(call, tensors, trained):
    """The sides of a call's parties, and the bytes for their tiles; trained: whether a head gets a gradient."""
    averaged = any(party.draws for party in call.parties)
    memory = room(call.tile_memory, tensors[0][0].device, [head for _, head, _ in tensors], averaged, trained)
    return [side_of(party, tensors, call.vocab, call.compute, call.precision, memory) for party in call.parties], memory


def read_by_others(place, lessons):
    """Whether a party's tile is still read when a lesson has written its gradient."""
    as_student = sum(lesson.student == place for lesson in lessons)
    return as_student > 1 or any(place in (lesson.teacher, lesson.noisy) for lesson in lessons)


def run(call, tensors, row_weight, wants, return_metrics, deferred=False):
    """Losses and metrics of the rows, and the gradients of sum_i weight_i loss_i over all lessons.

    Args:
        call: Call.
        tensors: (x, weight, bias) at each place: logits (N, V), None, None; or hidden states (N, H) and their head's
            (V, H), (V,) or None.
        weight: (N,) float32 or None for 1.
        wants: for each party which gradients of x, weight, bias are wanted.
        metrics: whether to return METRICS.
        deferred: whether the gradients are left to a later call, whose memory is looked at now.

    Returns:
        loss (lessons, N), metrics (lessons, 7, N) or None, and for each party d_x, d_weight, d_bias (None where not
        wanted, or deferred). Gradients of hidden states and weights are float32, those of logits have the logits' dtype
        (fp16: float32). float64 stays float64.
    """
    lessons, labels, alphas = call.lessons, call.labels, call.alphas
    check_labels(call)
    n, device = len(tensors[0][0]), tensors[0][0].device
    sides, memory = sides_of(call, tensors, any(row_weight for _, row_weight, _ in wants))
    if lessons[0].objective.difference:
        main = sides[lessons[0].student]
        for other in sides:
            if other is not main:
                other.subtract(main)
    index = counted(labels, lessons[0].objective.ignore_index, sides)
    if index is not None:
        for one in sides:
            one.select(index)
        labels, row_weight, *alphas = (t if t is None else t[index] for t in (labels, row_weight, *alphas))
    rows = n if index is None else len(index)
    students = [sides[lesson.student] for lesson in lessons]
    wide = next((side.dtype for side in sides if side.dtype == torch.float64), students[0].dtype)
    module = find(device, wide, call.backend)
    dtype = widest(students)
    loss = torch.empty(len(lessons), rows, dtype=dtype, device=device)
    table = torch.empty(len(lessons), len(METRICS), rows, dtype=dtype, device=device) if return_metrics else None
    trained = [place for place in range(len(sides)) if any(wants[place])]
    for place in trained:
        sides[place].want(*wants[place], apart=read_by_others(place, lessons))
        if row_weight is not None:
            sides[place].leave_out(row_weight)
    step = plan(sides, rows, memory)
    if deferred:
        for place in trained:
            sides[place].want(False, False, False)
        trained, step = [], plan(sides, rows, memory)

    def block(start, stop):
        rows_of = slice(start, stop)
        made = [side.tile(start, stop) for side in sides]
        grads = {place: sides[place].gradient(start, stop, made[place]) for place in trained}
        for i, lesson in enumerate(lessons):
            alpha = None if lesson.alpha is None else alphas[lesson.alpha]
            module.rows(
                lesson.objective,
                made[lesson.student],
                made[lesson.teacher],
                None if lesson.noisy is None else made[lesson.noisy],
                *(None if t is None else t[rows_of] for t in (alpha, labels, row_weight)),
                loss[i, rows_of],
                grads.get(lesson.student),
                None if table is None else table[i, :, rows_of],
            )
        for place, grad in grads.items():
            sides[place].back(grad, start, stop)

    def sweep(step):
        for place in trained:
            sides[place].reset()
        for one in sides:
            one.allocate(min(step, rows))
        for start in range(0, rows, step):
            block(start, min(start + step, rows))

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
        loss = loss.new_zeros(len(lessons), n).index_copy_(1, index, loss)
        table = table if table is None else table.new_zeros(*table.shape[:2], n).index_copy_(2, index, table)
    grads = [sides[place].gradients() if place in trained else (None, None, None) for place in range(len(sides))]
    return loss, table, grads


def widest(sides):
    """dtype of numbers that come of several sides: float32, or float64."""
    return torch.float64 if any(side.dtype == torch.float64 for side in sides) else torch.float32


def contrast(call, tensors):
    """Purified log-probabilities (N, vocab) of the one lesson's teacher, float32 or better."""
    (lesson,), labels, alphas = call.lessons, call.labels, call.alphas
    check_labels(call)
    n, device = len(tensors[0][0]), tensors[0][0].device
    sides, memory = sides_of(call, tensors, False)
    clean, noisy = sides[lesson.teacher], sides[lesson.noisy]
    dtype = widest(sides)
    alpha = None if lesson.alpha is None else alphas[lesson.alpha].to(dtype)
    out = torch.empty(n, call.vocab, dtype=dtype, device=device)
    module = find(device, dtype, call.backend)
    step = plan(sides, n, memory)
    for one in sides:
        one.allocate(min(step, n))
    for start in range(0, n, step):
        stop = min(start + step, n)
        module.contrast(
            lesson.objective,
            clean.tile(start, stop),
            noisy.tile(start, stop),
            *(None if t is None else t[start:stop] for t in (alpha, labels)),
            out[start:stop],
        )
    return out
