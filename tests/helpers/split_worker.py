"""What the processes of tests/engine/test_split.py do: the losses under a Split against those of one process."""

import os

import torch
from torch import distributed

from hkdfast import DIVERGENCES, Edge, Head, Split, coupled_loss, distill_loss, purify
from hkdfast import contrast as contrast_of
from hkdfast.engine import split_call

VOCAB, WIDTH, TEACHER, ROWS = 515, 16, 24, 21
CUTS = {2: (0, 300, 515), 3: (0, 171, 178, 515), 4: (0, 200, 200, 401, 515)}  # uneven, and one part is empty


def begin():
    """(rank, slice of this process's tokens)."""
    distributed.init_process_group("gloo")
    rank, cuts = distributed.get_rank(), CUTS[distributed.get_world_size()]
    return rank, slice(cuts[rank], cuts[rank + 1])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LABELS = torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(7))
LABELS[::5], LABELS[3] = -100, -101
WEIGHT = torch.linspace(0.2, 2, ROWS)
ALPHA = torch.linspace(0, 2, ROWS)
LAW = dict(alpha=1.5)
CASES = {
    "plain": {},
    "temperature": dict(temperature=3.0, t_squared=True),
    "labels": dict(labels=True, hard_weight=0.7, temperature=2.0),
    "labels alone": dict(labels=True, hard_weight=1.0, divergence_weight=0.0),
    "row weights": dict(labels=True, row_weight=WEIGHT, hard_weight=0.3),
    "scale and softcap": dict(scale=0.5, softcap=9.0),
    "floor": dict(teacher_floor=-6.0),
    "constant": dict(law=LAW),
    "linear": dict(law=LAW | dict(schedule="linear")),
    "entropy": dict(law=LAW | dict(schedule="linear", confidence="entropy")),
    "target": dict(law=LAW | dict(schedule="linear", confidence="target"), labels=True, no_unlabeled=True),
    "gate, plausible": dict(law=dict(alpha=1.0, schedule="gate", plausibility=0.05)),
    "rows, plausible": dict(law=dict(alpha=ALPHA, plausibility=0.01)),
    "dropped": dict(law=dict(alpha=1.0, plausibility=0.05, outside="drop"), teacher_floor=-20.0),
    "subtract": dict(law=dict(alpha=0.5, mode="subtract")),
    "whole teacher": dict(whole=True),
    "padded": dict(vocab=400),
    "blocks": dict(tile_memory=40_000, labels=True, hard_weight=0.5),
}


def problem(case, tokens, dtype, logits):
    """(student, teacher, options, leaves that get a gradient) of a case over these tokens."""
    options = dict(case)
    law, whole = options.pop("law", None), options.pop("whole", False)
    scale = {name: options.pop(name) for name in ("scale", "softcap") if name in options}
    if options.pop("labels", False):
        options["labels"] = LABELS.clone()
        if options.pop("no_unlabeled", False):
            options["labels"][3] = 5
    seen = slice(None) if whole else tokens

    def teacher_of(seed):
        return Head(draw(ROWS, TEACHER, seed=seed, dtype=dtype), 0.4 * draw(VOCAB, TEACHER, seed=4, dtype=dtype)[seen])

    if logits:
        student = (3 * draw(ROWS, VOCAB, seed=1, dtype=dtype))[:, tokens].clone().requires_grad_()
        leaves = {"logits": student}
        whole_logits = 3 * draw(ROWS, VOCAB, seed=2, dtype=dtype)
        teacher, noisy = whole_logits[:, seen], (whole_logits + draw(ROWS, VOCAB, seed=3, dtype=dtype))[:, seen]
    else:
        leaves = {
            "hidden": draw(ROWS, WIDTH, seed=5, dtype=dtype).requires_grad_(),
            "weight": (0.5 * draw(VOCAB, WIDTH, seed=6, dtype=dtype))[tokens].clone().requires_grad_(),
            "bias": draw(VOCAB, seed=8, dtype=dtype)[tokens].clone().requires_grad_(),
        }
        student, teacher, noisy = Head(*leaves.values(), **scale), teacher_of(2), teacher_of(3)
    if law is not None:
        teacher = purify(teacher, noisy, **law)
    return student, teacher, options, leaves


def close(one, other, what, dtype):
    slack = 1e-11 if dtype == torch.float64 else 2e-5
    most = max(other.abs().max().item(), 1e-9) if other.numel() else 1.0
    error = (one - other).abs().max().item() if other.numel() else 0.0
    assert error <= slack * most, f"{what}: {error:.3g} of {most:.3g}"


def one_case(name, case, divergence, dtype, logits, tokens):
    split = Split(None, tokens.start, VOCAB)
    what = f"{name}, {divergence}, {dtype}, {'logits' if logits else 'heads'}"
    student, teacher, options, whole = problem(case, slice(0, VOCAB), dtype, logits)
    expected, metrics = distill_loss(student, teacher, divergence, return_metrics=True, **options)
    expected.backward()
    student, teacher, options, leaves = problem(case, tokens, dtype, logits)
    loss, found = distill_loss(student, teacher, divergence, return_metrics=True, split=split, **options)
    loss.backward()
    same_bits(loss, what)
    close(loss.detach(), expected.detach(), f"loss of {what}", dtype)
    for key, truth in metrics.items():
        close(found[key].double(), truth.double(), f"{key} of {what}", dtype)
    for key, leaf in leaves.items():
        truth = whole[key].grad
        truth = truth if key == "hidden" else truth[:, tokens] if key == "logits" else truth[tokens]
        close(leaf.grad, truth, f"gradient of {key} of {what}", dtype)


def same_bits(x, what):
    found = [torch.empty_like(x.detach()) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, x.detach())
    assert all(torch.equal(one, found[0]) for one in found), what


def losses():
    """All cases, divergences and dtypes, of heads and of logits."""
    _, tokens = begin()
    for name, case in CASES.items():
        for divergence in DIVERGENCES:
            for dtype in (torch.float64, torch.float32):
                one_case(name, case, divergence, dtype, False, tokens)
                if not {"scale", "law"} & set(case) and name != "blocks":
                    one_case(name, case, divergence, dtype, True, tokens)


def coupled():
    """Three models that teach each other, the last of them whole and frozen."""
    _, tokens = begin()

    def problem(tokens):
        hiddens = [draw(ROWS, WIDTH, seed=seed).requires_grad_() for seed in range(3)]
        weights = [(0.5 * draw(VOCAB, WIDTH, seed=10 + seed))[tokens].clone().requires_grad_() for seed in range(2)]
        last = Head(hiddens[2].detach(), 0.5 * draw(VOCAB, WIDTH, seed=12))
        return [*(Head(*pair) for pair in zip(hiddens, weights, strict=False)), last], hiddens[:2], weights

    coupling = [
        [None, Edge(0.5, "reverse_kl", detach=False), 1.0],
        [Edge(0.7, "jensen_shannon"), None, 1.0],
        [None] * 3,
    ]
    found = []
    for part, split in ((slice(0, VOCAB), None), (tokens, Split(None, tokens.start, VOCAB))):
        heads, hiddens, weights = problem(part)
        loss = coupled_loss(heads, coupling, labels=LABELS, hard_weight=[1.0, 0.5, 0.0], split=split)
        loss.backward()
        found.append((loss.detach(), [h.grad for h in hiddens], [w.grad for w in weights]))
    (loss, hidden, weight), (ours, our_hidden, our_weight) = found
    close(ours, loss, "coupled loss", torch.float64)
    for one, other in zip(our_hidden, hidden, strict=True):
        close(one, other, "hidden of coupled", torch.float64)
    for one, other in zip(our_weight, weight, strict=True):
        close(one, other[tokens], "weight of coupled", torch.float64)


def difference():
    """Tiles of the difference of student and teacher, which share one head."""
    _, tokens = begin()
    found = []
    for part, split in ((slice(0, VOCAB), None), (tokens, Split(None, tokens.start, VOCAB))):
        weight = (0.5 * draw(VOCAB, WIDTH, dtype=torch.bfloat16))[part].contiguous()
        hidden = draw(ROWS, WIDTH, seed=1, dtype=torch.bfloat16).requires_grad_()
        teacher = Head(hidden.detach() + 0.1 * draw(ROWS, WIDTH, seed=2, dtype=torch.bfloat16), weight)
        loss = distill_loss(Head(hidden, weight), teacher, "reverse_kl", precision="difference", split=split)
        loss.backward()
        found.append((loss.detach(), hidden.grad.float()))
    assert (found[0][0] - found[1][0]).abs() <= 1e-2 * found[0][0]
    assert (found[0][1] - found[1][1]).norm() <= 2e-2 * found[0][1].norm()


def decoding():
    """contrast() gives the log-probabilities of each process's tokens."""
    _, tokens = begin()
    clean, noisy = 3 * draw(ROWS, VOCAB), 3 * draw(ROWS, VOCAB, seed=1)
    for options in ({}, dict(plausibility=0.05), dict(plausibility=0.05, outside="drop")):
        whole = contrast_of(purify(clean, noisy, 1.5, **options), temperature=0.7)
        split = Split(None, tokens.start, VOCAB)
        part = purify(clean[:, tokens], noisy[:, tokens], 1.5, **options)
        torch.testing.assert_close(contrast_of(part, temperature=0.7, split=split), whole[:, tokens])


def own_split():
    """A Head that knows its part needs no option, and `reduce_hidden=False` leaves the sum to the caller."""
    _, tokens = begin()
    grads = []
    for reduce in (True, False):
        split = Split(distributed.group.WORLD, tokens.start, VOCAB, reduce_hidden=reduce)
        hidden = draw(ROWS, WIDTH).requires_grad_()
        student = Head(hidden, draw(VOCAB, WIDTH, seed=1)[tokens], split=split)
        distill_loss(student, Head(draw(ROWS, TEACHER, seed=2), draw(VOCAB, TEACHER, seed=3))).backward()
        grads.append(hidden.grad)
    distributed.all_reduce(grads[1])
    torch.testing.assert_close(*grads)


def bytes_exchanged():
    """What moves is a few numbers a row and block, and one gradient of hidden states a call."""
    _, tokens = begin()
    gathered, reduced = [], []
    plain, plain_reduce = split_call.SplitCall.exchange, distributed.all_reduce
    split_call.SplitCall.exchange = lambda self, x: gathered.append(x.nbytes) or plain(self, x)
    split_call.distributed.all_reduce = lambda x, **how: reduced.append(x.nbytes) or plain_reduce(x, **how)
    for divergence, numbers in (("forward_kl", 11), ("total_variation", 14)):
        gathered.clear(), reduced.clear()
        student, teacher, _, _ = problem({}, tokens, torch.float32, False)
        distill_loss(student, teacher, divergence, split=Split(None, tokens.start, VOCAB))
        begin_and_end = 8 * len(split_call.SENT) + 4
        assert sum(gathered) == 8 * numbers * ROWS + begin_and_end, gathered
        assert reduced == [4 * ROWS * WIDTH]


# what goes wrong


def call(tokens, **options):
    student, teacher, _, _ = problem({}, tokens, torch.float32, False)
    how = {"split": Split(None, tokens.start, VOCAB)} | options
    return distill_loss(options.pop("student", student), options.pop("teacher", teacher), **how)


def expect(kind, message, work):
    try:
        work()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}: {message}")


def refusals():
    """Each process gets the same error, and the next call works."""
    rank, tokens = begin()
    student, teacher, _, _ = problem({}, tokens, torch.float32, False)

    def loss(one=student, other=teacher, first=tokens.start, total=VOCAB, **options):
        return lambda: distill_loss(one, other, split=Split(None, first, total), **options)

    fewer = Head(student.hidden[: ROWS - rank], student.weight, student.bias)
    less = Head(teacher.hidden[: ROWS - rank], teacher.weight)
    expect(ValueError, "different numbers of rows", loss(fewer, less))
    expect(ValueError, "different totals", loss(total=VOCAB + rank))
    expect(ValueError, "leave a gap", loss(first=tokens.start + (rank == 1), total=VOCAB + 1))
    expect(ValueError, "overlap", loss(first=max(tokens.start - (rank == 1), 0)))
    expect(ValueError, f"have {VOCAB} tokens in all, but its total is {VOCAB + 5}", loss(total=VOCAB + 5))
    expect(ValueError, "different options", loss(temperature=1.0 + rank))
    expect(ValueError, "different labels", loss(labels=LABELS.roll(rank), hard_weight=1.0))
    moved = Head(student.hidden * (1 + rank), student.weight, student.bias)
    expect(ValueError, "different hidden states", loss(moved))
    expect(ValueError, "ends beyond the Split's total", loss(total=tokens.stop - 1))
    whole = problem({}, slice(0, VOCAB), torch.float32, False)[0]
    expect(ValueError, "reduction", loss(reduction="none"))
    expect(ValueError, "does not support a Split", loss(backend="cpu"))
    expect(ValueError, "ends beyond", loss(whole, first=1))
    small = Head(teacher.hidden, teacher.weight[:5])
    expect(ValueError, "teacher has 5 tokens, expected the", loss(other=small))
    if rank == 0:  # a process that fails alone takes the others with it
        expect(ValueError, "too small", loss(tile_memory=16))
    else:
        expect(RuntimeError, "rank 0 of the Split's group failed", loss())
    assert loss()().isfinite()


def out_of_memory():
    """In the middle of the loop: an error on every rank, and the group lives."""
    rank, tokens = begin()
    from hkdfast.engine import tile_loop

    plain, calls = tile_loop.ProjectedTiles.backward, []

    def failing(self, *given):
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise torch.OutOfMemoryError("no memory for the second block")
        return plain(self, *given)

    tile_loop.ProjectedTiles.backward = failing
    kind, message = (torch.OutOfMemoryError, "second block") if rank == 1 else (RuntimeError, "rank 1 of the Split")
    expect(kind, message, lambda: call(tokens, tile_memory=20_000))
    tile_loop.ProjectedTiles.backward = plain
    assert call(tokens).isfinite()


def dies():
    """A process that is gone: the others get an error."""
    rank, tokens = begin()
    if rank == 1:
        os._exit(7)
    try:
        call(tokens)
    except RuntimeError as error:
        print(f"an error of rank {rank}: {str(error).splitlines()[0]}", flush=True)
        os._exit(8)
    raise AssertionError("no error")
