"""Communication between the processes of a Split during one call of a loss. An error in one is raised in all."""

import zlib
from dataclasses import dataclass

import torch
from torch import distributed

from ..ops.stages import COUNTS, FAILED, stages
from ..split import Split

# what every process sends before the loop; the values in SAME must be equal on all processes
SAME = ("rows", "total", "options", "labels")
SENT = ("failed", "step", "first", "tokens", *SAME, "hidden")
HIDDEN_TOLERANCE = 1e-2  # relative, on the mean absolute hidden state: processes may round differently
NAMES = {
    "rows": "different numbers of rows",
    "total": "different totals in their Splits",
    "options": "different options or trained models",
    "labels": "different labels",
}


@dataclass(frozen=True, eq=False)
class Part:
    """This process's part of a vocabulary, for a LoopSpec."""

    split: Split
    held: int  # tokens that this process holds, including padding that is not compared
    compared: int  # tokens of the whole vocabulary that are compared

    @property
    def local(self) -> int:
        """Number of tokens that this process compares; it may be 0."""
        return min(max(self.compared - self.split.first, 0), self.held)


class SplitCall:
    """One call of the tile loop under a Split: the `part` of `ops.stages.rows`.

    A process that fails inside the loop continues to take part in the exchanges, with values that mark the failure.
    After the last exchange `close` raises on all processes.

    Args:
        part: Part.
        device: of the tensors that are exchanged.
    """

    def __init__(self, part, device):
        self.split, self.held, self.compared, self.device = part.split, part.held, part.compared, device
        self.first, self.group = self.split.first, self.split.group
        self.size, self.rank = distributed.get_world_size(self.group), distributed.get_rank(self.group)
        self.error, self.owed = None, []

    def exchange(self, x):
        """(R, ...): the tensors of all R processes, in rank order."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        distributed.all_gather(found, x.contiguous(), group=self.group)
        return torch.stack(found)

    def agree(self, make, spec):
        """The loop that make() returns, with the smallest `step` of all processes.

        Raises:
            the error of make(); on the other processes a RuntimeError that names this rank.
            ValueError: on all processes, if they do not call the same loss or their parts do not cover the vocabulary.
        """
        sent, loop = dict.fromkeys(SENT, 0.0), None
        try:
            loop = make()
            sent |= {"step": loop.step, "first": self.first, "tokens": self.held, "hidden": loop.hidden_size or 0.0}
            sent |= {"rows": loop.rows, "total": self.split.total, "options": digest(spec)}
            sent["labels"] = checksum(spec.labels)
        except Exception as error:
            self.error = error
            sent["failed"] = 1.0
        found = self.exchange(torch.tensor([sent[name] for name in SENT], dtype=torch.float64, device=self.device))
        by_name = dict(zip(SENT, found.T.tolist(), strict=True))
        self.raise_failed(by_name["failed"])
        for name in SAME:
            if len(set(by_name[name])) > 1:
                values = f": {whole(by_name[name])}" if name in ("rows", "total") else ""
                raise ValueError(f"the processes of the Split have {NAMES[name]}{values}")
        check_parts(by_name["first"], by_name["tokens"], self.split.total)
        sizes = by_name["hidden"]
        if max(sizes) - min(sizes) > HIDDEN_TOLERANCE * max(sizes):
            raise ValueError(
                f"the processes of the Split have different hidden states, with mean absolute values {sizes}: each "
                "process needs the hidden states of all rows"
            )
        loop.step = int(min(by_name["step"]))
        return loop

    def attempt(self, work, exchanges=()):
        """Run a part of the loop, unless an earlier part failed.

        Args:
            work: function without arguments.
            exchanges: shape (K, n) of each exchange in it, in their order.
        """
        self.owed = list(exchanges)
        try:
            if self.error is None:
                work()
        except Exception as error:  # the other processes wait for the remaining exchanges
            self.error = error
        for shape in self.owed:
            self.exchange(torch.full(shape, FAILED, dtype=torch.float64, device=self.device))
        self.owed = []

    def gather(self, numbers):
        """(R, K, n) float64 from the (K, n) of each process."""
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
            raise RuntimeError(f"rank {ranks} of the Split's group failed, see its error; this is rank {self.rank}")

    def reduce(self, x):
        """Sum a gradient of hidden states over the group, in place."""
        if self.split.reduce_hidden:
            distributed.all_reduce(x, group=self.group)


def exchanges(terms, rows, teacher_only=False):
    """Shape (K, rows) of each exchange of a block."""
    return [(COUNTS[stage], rows) for term in terms for stage in stages(term.objective, teacher_only)]


def whole(numbers):
    return ", ".join(str(int(x)) for x in numbers)


def digest(spec):
    """A checksum of all that must be equal on all processes, except the tensors."""
    return float(zlib.crc32(repr((spec.inputs, spec.terms, spec.part.compared, str(spec.compute))).encode()))


def checksum(labels):
    """A checksum of the labels in their order, exact in float64; -1 without labels."""
    if labels is None:
        return -1.0
    places = torch.arange(1, len(labels) + 1, device=labels.device)
    return float((labels * (places * 7919 % 104729)).sum() % (1 << 50))


def check_parts(firsts, sizes, total):
    """Refuse parts that do not cover 0..total without gap and overlap."""
    end = 0
    for first, size in sorted(zip(firsts, sizes, strict=True)):
        if first != end and size:
            what = "overlap" if first < end else "leave a gap"
            raise ValueError(
                f"the parts of the Split {what} at token {int(min(first, end))}: they begin at tokens {whole(firsts)} "
                f"and have {whole(sizes)} tokens"
            )
        end += size
    if end != total:
        raise ValueError(f"the parts of the Split have {int(end)} tokens in all, but its total is {total}")
