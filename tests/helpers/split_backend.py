"""The row operation in stages as a backend: threads take the parts of a vocabulary, as processes do."""

import threading

import torch

from hkdfast.ops import stages


class Part:
    """A thread's part, for `ops.stages`."""

    def __init__(self, backend, rank, first, words):
        self.backend, self.rank, self.first, self.compared = backend, rank, first, words

    def gather(self, numbers):
        backend = self.backend
        backend.numbers[self.rank] = numbers
        backend.barrier.wait()
        found = torch.stack(backend.numbers)
        backend.barrier.wait()
        if self.rank == 0:
            backend.exchanged.append(tuple(numbers.shape))
        return found


class SplitBackend:
    """Backend of `ends` parts: fractions of the vocabulary at which they end; two equal ones leave a part empty."""

    def __init__(self, *ends):
        self.ends = (*ends, 1.0)
        self.exchanged = []  # shape of what a thread gives in each exchange

    def run(self, operation, vocab):
        """operation(part, slice of its tokens) in all threads."""
        ends = [0, *(round(end * vocab) for end in self.ends)]
        self.numbers, self.barrier = [None] * len(self.ends), threading.Barrier(len(self.ends), timeout=60)
        errors = []

        def work(rank):
            try:
                operation(Part(self, rank, ends[rank], vocab), slice(ends[rank], ends[rank + 1]))
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.ends))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error

    def rows(self, objective, student, teacher, noisy, alpha, labels, row_weight, loss, grad, metrics):
        losses, tables = (
            [loss.clone() for _ in self.ends],
            [None if metrics is None else metrics.clone() for _ in self.ends],
        )

        def operation(part, tokens):
            tiles = (None if t is None else t[:, tokens] for t in (student, teacher, noisy))
            own = None if grad is None else grad[:, tokens]
            out = losses[part.rank], own, tables[part.rank]
            stages.rows(objective, *tiles, alpha, labels, row_weight, *out, part)

        self.run(operation, student.shape[1])
        for other, table in zip(losses, tables, strict=True):
            assert torch.equal(other.nan_to_num(7), losses[0].nan_to_num(7))  # the same bits everywhere
            assert metrics is None or torch.equal(table.nan_to_num(7), tables[0].nan_to_num(7))
        loss.copy_(losses[0])
        if metrics is not None:
            metrics.copy_(tables[0])

    def contrast(self, objective, clean, noisy, alpha, labels, out):
        def operation(part, tokens):
            stages.contrast(objective, clean[:, tokens], noisy[:, tokens], alpha, labels, out[:, tokens], part)

        self.run(operation, clean.shape[1])
