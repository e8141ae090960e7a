"""The loop over row blocks: make each input's tile once, run the row operation, propagate the gradients.

One loop serves every backend, divergence, kind of source and number of models. Cost in GEMM units, one unit being one
product through a head: 3 for a trained model, 2 with a frozen head, 1 without gradients, whatever the number of terms
between them. A student and its teacher: 3S + T, 2S + T, S + T.
"""

import logging
import warnings
from dataclasses import dataclass
from functools import partial

import torch

from ..heads import same
from ..ops import stages
from ..ops.dispatch import find, host_readable
from ..ops.objective import METRICS, UNLABELED, Objective, Transform
from .memory import capturing
from .split_call import Part, SplitCall, exchanges
from .tile_sources import AveragedTiles, LogitTiles, ProjectedTiles

logger = logging.getLogger("hkdfast")

# Bytes of tiles unless tile_memory is given. Each block after the first reads and writes the float32 gradient of a
# trained head once more (8 V H bytes; by arithmetic, not measured, 1.2 ms at shape A on an H200): few, large blocks are
# faster.
DEFAULT_BUDGET = {"cpu": 512 << 20, "cuda": 2 << 30, "cuda, trained head": 8 << 30}
ROW_MULTIPLE = 256  # rows of a GPU's GEMM tile: a block of a few rows more would cost another wave


def tile_budget(tile_memory, device, weights, averaged, trained):
    """Memory budget for tiles in bytes, or None if all inputs are logits: they are read in place."""
    if tile_memory is not None or not (averaged or any(weight is not None for weight in weights)):
        return tile_memory
    if device.type != "cuda":
        return DEFAULT_BUDGET["cpu"]
    most = DEFAULT_BUDGET["cuda, trained head" if trained else "cuda"]
    if capturing(device):
        return most  # the free memory cannot be read during capture
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(most, (torch.cuda.mem_get_info(device)[0] + idle) // 2)


def rows_per_block(sources, rows, tile_memory):
    """Rows per block: the fewest, evenly filled blocks whose tiles fit the memory."""
    per_row, fixed = sum(source.bytes_per_row for source in sources), max(source.fixed_bytes for source in sources)
    if not per_row or not rows:
        return max(rows, 1)
    if tile_memory < fixed + per_row:
        raise ValueError(f"tile_memory of {tile_memory} bytes is too small: one row of tiles takes {fixed + per_row}")
    most = (tile_memory - fixed) // per_row
    multiple = ROW_MULTIPLE if most >= ROW_MULTIPLE else 1
    blocks = -(-rows // (most - most % multiple))
    step = min(rows, -(-rows // blocks // multiple) * multiple)
    logger.info("%d rows in %d blocks of %d, %.1f MB of tiles", rows, blocks, step, (fixed + step * per_row) / 1e6)
    return step


@dataclass(frozen=True)
class Input:
    """One tile per block: which tensors make it."""

    branches: tuple  # indices of its tensors; several are draws, whose logits are averaged
    draws: tuple = ()  # Transform of each draw if there are several


@dataclass(frozen=True)
class LossTerm:
    """One call of the row operation per block: one student against one teacher, both as indices into `inputs`."""

    student: int
    teacher: int
    noisy: int | None  # the noisy branch of a purified teacher
    objective: Objective
    alpha: int | None = None  # index into `alphas` of the rows' contrast weights, if the schedule is "per_row"
    counted: bool = True  # whether its loss is part of the total; its gradient always is


def make_tile_source(given, tensors, vocab, compute, precision, tile_memory):
    """The tile source of an input, from its (x, weight, bias)."""
    piece = tile_memory and tile_memory // 4
    mine = [tensors[place] for place in given.branches]
    hiddens, weights, biases = zip(*mine, strict=True)
    head = weights[0] is not None and all(same(w, weights[0]) and same(b, biases[0]) for _, w, b in mine)
    if head and not any(transform != Transform() for transform in given.draws):
        return ProjectedTiles(list(hiddens), weights[0], biases[0], vocab, precision, compute, piece)
    sources = [
        LogitTiles(x, vocab) if weight is None else ProjectedTiles([x], weight, bias, vocab, precision, compute, piece)
        for x, weight, bias in mine
    ]
    return AveragedTiles(sources, given.draws) if given.draws else sources[0]


def active_rows(labels, ignore_index, sources):
    """Indices of the rows that are not ignored, or None for all rows. The host waits for their number only."""
    if labels is None or all(isinstance(source, LogitTiles) for source in sources) or capturing(labels.device):
        return None  # the row operation skips ignored rows itself: no gather, no wait
    return (labels != ignore_index).nonzero().squeeze(-1)


def check_labels(spec):
    """Refuse a label outside the vocabulary: a ValueError on the CPU, a device assertion on CUDA."""
    labels, ignore_index = spec.labels, spec.terms[0].objective.ignore_index
    vocab = spec.vocab if spec.part is None else spec.part.compared
    if labels is None or not labels.numel():
        return
    laws = [term.objective.law for term in spec.terms]
    others = {"ignore_index": ignore_index}
    if not any(law and law.reads_labels for law in laws):
        others["UNLABELED"] = UNLABELED
    known = (labels >= 0) & (labels < vocab)
    for other in others.values():
        known |= labels == other
    if labels.is_cuda:
        torch._assert_async(known.all(), f"a label is neither a token of the vocabulary nor {' nor '.join(others)}")
    elif host_readable(labels) and not known.all():
        wrong, names = labels[~known][0].item(), " nor ".join(f"{name} {label}" for name, label in others.items())
        raise ValueError(f"label {wrong} is neither in 0..{vocab - 1} nor {names}")


@dataclass(frozen=True, eq=False)
class LoopSpec:
    """All arguments of the loop except the tensors that may get a gradient."""

    inputs: tuple  # of Input
    terms: tuple  # of LossTerm, counted ones first; a student's first term writes its gradient, the others add to it
    labels: torch.Tensor | None  # (N,) int64
    alphas: list  # of (N,) float32 or float64: contrast weights of the rows
    vocab: int  # tokens compared, the first so many of every input
    compute: torch.dtype | None  # dtype in which heads are multiplied; None: their own
    precision: str
    tile_memory: int | None
    backend: str | None
    part: Part | None = None  # under a Split: this process's part of the vocabulary; vocab is then the part's


def make_tile_sources(spec, tensors, trained):
    """(tile source of every input, memory budget of their tiles); trained: whether a head gets a gradient."""
    averaged = any(given.draws for given in spec.inputs)
    memory = tile_budget(spec.tile_memory, tensors[0][0].device, [head for _, head, _ in tensors], averaged, trained)
    how = spec.vocab, spec.compute, spec.precision, memory
    return [make_tile_source(given, tensors, *how) for given in spec.inputs], memory


def tile_reused(place, terms):
    """Whether an input's tile is still read after a term has written its gradient."""
    as_student = sum(term.student == place for term in terms)
    return as_student > 1 or any(place in (term.teacher, term.noisy) for term in terms)


def request_grads(sources, terms, wants):
    """Request the required gradients from the sources; return the indices of the sources that get one."""
    trained = [place for place in range(len(sources)) if any(wants[place])]
    for place in trained:
        sources[place].request_grads(*wants[place], separate_grad=tile_reused(place, terms))
    return trained


def memory_needed(spec, tensors, wants, return_metrics):
    """Peak bytes that `run` allocates for these arguments, including gradients and results."""
    sources, memory = make_tile_sources(spec, tensors, any(weight for _, weight, _ in wants))
    trained, rows = request_grads(sources, spec.terms, wants), len(tensors[0][0])
    step = rows_per_block(sources, rows, memory)
    tiles = max(source.fixed_bytes for source in sources) + step * sum(source.bytes_per_row for source in sources)
    grads = sum(
        x.numel() * torch.promote_types(sources[place].dtype, torch.float32).itemsize
        for place in trained
        for x, wanted in zip(tensors[spec.inputs[place].branches[0]], wants[place], strict=True)
        if wanted
    )
    columns = len(spec.terms) * (1 + (len(METRICS) if return_metrics else 0))
    return tiles + grads + columns * rows * widest(sources).itemsize


def run(spec, tensors, row_weight, wants, return_metrics, deferred=False):
    """Losses and metrics of the rows, and the gradients of sum_i row_weight_i loss_i over all terms.

    Args:
        spec: LoopSpec.
        tensors: list of (x, weight, bias): logits (N, V), None, None; or hidden states (N, H) and their head's (V, H),
            (V,) or None.
        row_weight: (N,) float32 or None for 1.
        wants: for each input, which gradients of x, weight, bias are required.
        return_metrics: whether to return METRICS.
        deferred: whether a later call computes the gradients; its memory is checked now.

    Returns:
        loss (terms, N), metrics (terms, 7, N) or None, and for each input d_x, d_weight, d_bias (None where not
        required, or deferred). Gradients of hidden states and weights are float32, those of logits have the logits'
        dtype (fp16: float32). float64 stays float64.
    """

    def make():
        return Loop(spec, tensors, row_weight, wants, return_metrics, deferred)

    if spec.part is not None:
        return run_split(spec, make, tensors[0][0].device)
    loop = make()
    step = loop.step
    try:
        loop.sweep(step)
        again = False
    except torch.OutOfMemoryError as error:
        if loop.captured:  # the graph would also contain the failed first try and run it at every replay
            limit = "" if loop.memory is None else f", with a smaller tile_memory than {loop.memory} bytes"
            raise torch.OutOfMemoryError(
                f"out of memory with blocks of {step} rows while a CUDA graph is captured: capture again{limit}"
            ) from error
        if step == 1:
            raise
        again = True
    if again:  # outside the except block no traceback keeps the first try's tiles alive
        for one in loop.sources:
            one.release()
        warnings.warn(f"out of memory with blocks of {step} rows: trying once more with half as many", stacklevel=2)
        loop.sweep(-(-step // 2))
    return loop.results()


def run_split(spec, make, device):
    """`run` for a vocabulary that is split over processes.

    Args:
        make: function that returns the Loop of this process.
    """
    call, loop = sweep_split(spec, make, device, stages.rows)
    for place in loop.trained:
        if loop.sources[place].d_hidden is not None:
            call.reduce(loop.sources[place].d_hidden)
    return loop.results()


def sweep_split(spec, make, device, operation):
    """(SplitCall, the loop that make() returned, after its sweep). All processes make the same exchanges.

    Args:
        operation: the row operation in stages.
    """
    call = SplitCall(spec.part, device)
    loop = call.agree(make, spec)
    loop.operation = partial(operation, part=call)
    call.attempt(lambda: loop.begin(loop.step))
    for start, stop in loop.blocks(loop.step):
        call.attempt(
            partial(loop.block, start, stop), exchanges(spec.terms, stop - start, operation is stages.contrast)
        )
    call.close()
    return call, loop


class Blocks:
    """Base of the loops. A subclass has the attributes sources, trained, rows and step, and the method block."""

    @property
    def hidden_size(self):
        """Mean absolute value of the hidden states of the first head, None without one."""
        hidden = next((source.hiddens[0] for source in self.sources if isinstance(source, ProjectedTiles)), None)
        return None if hidden is None or not hidden.numel() else hidden.abs().mean(dtype=torch.float64).item()

    def blocks(self, step):
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def begin(self, step):
        """Zero the gradients, and allocate the tiles of a block."""
        for place in self.trained:
            self.sources[place].reset()
        for one in self.sources:
            one.allocate(min(step, self.rows))

    def sweep(self, step):
        self.begin(step)
        for start, stop in self.blocks(step):
            self.block(start, stop)


class Loop(Blocks):
    """One call of `run`, with its arguments: `sweep` computes all blocks, `results` returns the result of `run`."""

    def __init__(self, spec, tensors, row_weight, wants, return_metrics, deferred):
        check_labels(spec)
        self.terms, labels, alphas = spec.terms, spec.labels, spec.alphas
        self.n, device = len(tensors[0][0]), tensors[0][0].device
        self.sources, self.memory = make_tile_sources(spec, tensors, any(weight for _, weight, _ in wants))
        if self.terms[0].objective.difference:
            main = self.sources[self.terms[0].student]
            for other in self.sources:
                if other is not main:
                    other.as_difference_to(main)
        self.index = index = active_rows(labels, self.terms[0].objective.ignore_index, self.sources)
        if index is not None:
            for one in self.sources:
                one.select(index)
            labels, row_weight, *alphas = (t if t is None else t[index] for t in (labels, row_weight, *alphas))
        self.captured = capturing(device)
        effective_weight = row_weight
        if self.captured and labels is not None:  # ignored rows were not removed
            active = labels != self.terms[0].objective.ignore_index
            effective_weight = active if row_weight is None else active * row_weight
        self.labels, self.row_weight, self.alphas = labels, row_weight, alphas
        self.rows = rows = self.n if index is None else len(index)
        students = [self.sources[term.student] for term in self.terms]
        wide = next((source.dtype for source in self.sources if source.dtype == torch.float64), students[0].dtype)
        self.operation = find(device, wide, spec.backend).rows
        dtype = widest(students)
        self.loss = torch.empty(len(self.terms), rows, dtype=dtype, device=device)
        shape = (len(self.terms), len(METRICS), rows)
        self.table = torch.empty(shape, dtype=dtype, device=device) if return_metrics else None
        self.trained = request_grads(self.sources, self.terms, wants)
        for place in self.trained if effective_weight is not None else ():
            self.sources[place].leave_out(effective_weight)
        self.step = rows_per_block(self.sources, rows, self.memory)
        if deferred:
            for place in self.trained:
                self.sources[place].request_grads(False, False, False)
            self.trained, self.step = [], rows_per_block(self.sources, rows, self.memory)

    def block(self, start, stop):
        rows_of = slice(start, stop)
        made = [source.tile(start, stop) for source in self.sources]
        grads = {place: self.sources[place].grad_buffer(start, stop, made[place]) for place in self.trained}
        for i, term in enumerate(self.terms):
            alpha = None if term.alpha is None else self.alphas[term.alpha]
            self.operation(
                term.objective,
                made[term.student],
                made[term.teacher],
                None if term.noisy is None else made[term.noisy],
                *(None if t is None else t[rows_of] for t in (alpha, self.labels, self.row_weight)),
                self.loss[i, rows_of],
                grads.get(term.student),
                None if self.table is None else self.table[i, :, rows_of],
            )
        for place, grad in grads.items():
            self.sources[place].backward(grad, start, stop)

    def results(self):
        loss, table, index = self.loss, self.table, self.index
        if index is not None:
            loss = loss.new_zeros(len(self.terms), self.n).index_copy_(1, index, loss)
            table = table if table is None else table.new_zeros(*table.shape[:2], self.n).index_copy_(2, index, table)
        places = range(len(self.sources))
        grads = [self.sources[place].grads() if place in self.trained else (None, None, None) for place in places]
        return loss, table, grads


def widest(sources):
    """dtype of results from several sources: float32, or float64."""
    return torch.float64 if any(source.dtype == torch.float64 for source in sources) else torch.float32


def contrast(spec, tensors):
    """Purified log-probabilities (N, vocab) of the single term's teacher, float32 or float64."""
    if spec.part is not None:
        return sweep_split(spec, lambda: ContrastLoop(spec, tensors), tensors[0][0].device, stages.contrast)[1].out
    loop = ContrastLoop(spec, tensors)
    loop.sweep(loop.step)
    return loop.out


class ContrastLoop(Blocks):
    """One call of `contrast`: `sweep` fills `out`."""

    trained = ()

    def __init__(self, spec, tensors):
        (self.term,), self.labels, alphas = spec.terms, spec.labels, spec.alphas
        check_labels(spec)
        self.rows, device = len(tensors[0][0]), tensors[0][0].device
        self.sources, memory = make_tile_sources(spec, tensors, False)
        dtype = widest(self.sources)
        self.alpha = None if self.term.alpha is None else alphas[self.term.alpha].to(dtype)
        self.out = torch.empty(self.rows, spec.vocab, dtype=dtype, device=device)
        self.operation = find(device, dtype, spec.backend).contrast
        self.step = rows_per_block(self.sources, self.rows, memory)

    def block(self, start, stop):
        self.operation(
            self.term.objective,
            self.sources[self.term.teacher].tile(start, stop),
            self.sources[self.term.noisy].tile(start, stop),
            *(None if t is None else t[start:stop] for t in (self.alpha, self.labels)),
            self.out[start:stop],
        )
