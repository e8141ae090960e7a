"""What the processes of a Split tell each other in one call of a loss: none waits for ever, none is wrong alone."""

import zlib
from dataclasses import dataclass

import torch
from torch import distributed

from ..ops.stages import COUNTS, FAILED, stages
from ..split import Split

# what every process tells before the loop; those in SAME have to be the same everywhere
SAME = ("rows", "total", "options", "labels")
TOLD = ("failed", "step", "first", "words", *SAME, "hidden")
HIDDEN_TOLERANCE = 1e-2  # of the mean size of the hidden states: processes may round differently
NAMES = {
    "rows": "other numbers of rows",
    "total": "other totals in their Splits",
    "options": "other options or models that learn",
    "labels": "other labels",
}


@dataclass(frozen=True, eq=False)
class Part:
    """This process's part of a vocabulary, for a LoopSpec."""

    split: Split
    held: int  # tokens that this process holds, padding beyond the compared ones included
    words: int  # tokens of the whole vocabulary that are compared

    @property
    def local(self) -> int:
        """Tokens that this process compares, which may be none."""
        return min(max(self.words - self.split.first, 0), self.held)


class SplitCall:
    """One call of the tile loop under a Split: the `part` of `ops.stages.rows`.

    A process that fails within the loop goes on exchanging, with numbers that say so, until all have made the same
    exchanges; then `close` raises everywhere.

    Args:
        part: Part.
        device: of the tensors that are exchanged.
    """

    def __init__(self, part, device):
        self.split, self.held, self.words, self.device = part.split, part.held, part.words, device
        self.first, self.group = self.split.first, self.split.group
        self.size, self.rank = distributed.get_world_size(self.group), distributed.get_rank(self.group)
        self.error, self.owed = None, []

    def exchange(self, x):
        """(R, ...) of what each process gives, in rank order."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        distributed.all_gather(found, x.contiguous(), group=self.group)
        return torch.stack(found)

    def agree(self, make, spec):
        """The loop that make() makes, with the smallest `step` of all processes.

        Raises:
            what make raised; on the other processes a RuntimeError that names this one.
            ValueError: on all, processes that do not call the same loss, or parts that do not make the vocabulary.
        """
        told, loop = dict.fromkeys(TOLD, 0.0), None
        try:
            loop = make()
            told |= {"step": loop.step, "first": self.first, "words": self.held, "hidden": loop.hidden_size or 0.0}
            told |= {"rows": loop.rows, "total": self.split.total, "options": digest(spec)}
            told["labels"] = checksum(spec.labels)
        except Exception as error:
            self.error = error
            told["failed"] = 1.0
        found = self.exchange(torch.tensor([told[name] for name in TOLD], dtype=torch.float64, device=self.device))
        by_name = dict(zip(TOLD, found.T.tolist(), strict=True))
        self.raise_failed(by_name["failed"])
        for name in SAME:
            if len(set(by_name[name])) > 1:
                values = f": {whole(by_name[name])}" if name in ("rows", "total") else ""
                raise ValueError(f"the processes of the Split have {NAMES[name]}{values}")
        check_parts(by_name["first"], by_name["words"], self.split.total)
        sizes = by_name["hidden"]
        if max(sizes) - min(sizes) > HIDDEN_TOLERANCE * max(sizes):
            raise ValueError(
                f"the processes of the Split have other hidden states, of the mean sizes {sizes}: each needs all rows"
            )
        loop.step = int(min(by_name["step"]))
        return loop

    def attempt(self, work, exchanges=()):
        """Do a part of the loop, unless an earlier one failed.

        Args:
            exchanges: (K, n) of each exchange that all processes make in it, in their order.
        """
        self.owed = list(exchanges)
        try:
            if self.error is None:
                work()
        except Exception as error:  # whatever it is, the others wait for the exchanges that are owed
            self.error = error
        for shape in self.owed:
            self.exchange(torch.full(shape, FAILED, dtype=torch.float64, device=self.device))
        self.owed = []

    def gather(self, numbers):
        """(R, K, n) of all processes' (K, n) float64."""
        self.owed.pop(0)
        return self.exchange(numbers)

    def close(self):
        """Raise on every process if one has failed."""
        found = self.exchange(torch.tensor([float(self.error is not None)], device=self.device))
        self.raise_failed(found[:, 0].tolist())

    def raise_failed(self, failed):
        if self.error is not None:
            raise self.error
        if any(failed):
            ranks = ", ".join(str(rank) for rank, one in enumerate(failed) if one)
            raise RuntimeError(f"rank {ranks} of the Split's group failed, see its own error; this is rank {self.rank}")

    def reduce(self, x):
        """Sum a gradient of hidden states over the group, in place."""
        if self.split.reduce_hidden:
            distributed.all_reduce(x, group=self.group)


def exchanges(terms, rows, teacher_only=False):
    """(K, rows) of each exchange of a block."""
    return [(COUNTS[stage], rows) for term in terms for stage in stages(term.objective, teacher_only)]


def whole(numbers):
    return ", ".join(str(int(x)) for x in numbers)


def digest(spec):
    """A number of everything that has to be the same beside the tensors."""
    return float(zlib.crc32(repr((spec.inputs, spec.terms, spec.part.words, str(spec.compute))).encode()))


def checksum(labels):
    """A number of the labels and their order, exact in float64; -1 without labels."""
    if labels is None:
        return -1.0
    places = torch.arange(1, len(labels) + 1, device=labels.device)
    return float((labels * (places * 7919 % 104729)).sum() % (1 << 50))


def check_parts(firsts, sizes, total):
    """The parts cover 0..total without gap or overlap."""
    end = 0
    for first, size in sorted(zip(firsts, sizes, strict=True)):
        if first != end and size:
            what = "overlap" if first < end else "leave a gap"
            raise ValueError(
                f"the parts of the Split {what} at token {int(min(first, end))}: they begin at {whole(firsts)} and "
                f"have {whole(sizes)} tokens"
            )
        end += size
    if end != total:
        raise ValueError(f"the parts of the Split have {int(end)} tokens together, its total is {total}")
