"""What the losses are given at the edge: lazy, foreign and meta tensors, second derivatives, options of wrong kinds."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from truth import FAST, USABLE, as_leaves, leaves, off, with_gradients

from hkdfast import Edge, Head, backends, contrast, coupled_loss, distill_loss, purify
from hkdfast.ops.dispatch import find, load

ROWS, VOCAB, WIDTH = 5, 60, 8
LABELS = torch.tensor([3, -100, 0, 59, 7])


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def of(kind, seed=0):
    return (
        Head(draw(ROWS, WIDTH, seed=seed), draw(VOCAB, WIDTH, seed=seed + 1)) if kind == "heads" else draw(ROWS, VOCAB)
    )


LOGITS, OTHER = draw(ROWS, VOCAB), draw(ROWS, VOCAB, seed=1)


# tensors whose numbers are not at their address


@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", USABLE)
def test_lazily_negated_tensors(backend, kind):
    """Every tensor of a call as a view that negates: the same numbers, the same gradients."""

    def lazily(source):
        if isinstance(source, Head):
            return Head(lazily(source.hidden), lazily(source.weight))
        return torch._neg_view(source.neg())

    student, teacher = of(kind), of(kind, 2)
    weight, alpha = draw(ROWS).abs(), draw(ROWS, seed=1).abs()

    def loss(student, turn):
        options = dict(labels=LABELS, hard_weight=0.5, row_weight=turn(weight), backend=backend)
        if turn is lazily:
            options["labels"] = torch._neg_view(LABELS.neg())
        return distill_loss(
            turn(student), purify(turn(teacher), turn(draw(ROWS, VOCAB, seed=9)), turn(alpha)), **options
        )

    results = []
    for turn in (lambda x: x, lazily):
        leaf = as_leaves(student)
        value = loss(leaf, turn)
        value.backward()
        results.append([value, *(t.grad for t in leaves(leaf))])
    for plain, lazy in zip(*results, strict=True):
        torch.testing.assert_close(lazy, plain)
    lazy = contrast(purify(torch._neg_view(LOGITS.neg()), OTHER, 1.0), backend=backend)
    torch.testing.assert_close(lazy, contrast(purify(LOGITS, OTHER, 1.0), backend=backend))


@pytest.mark.parametrize("backend", FAST)
def test_zeros_without_memory(backend):
    zeros = torch._efficientzerotensor((ROWS, VOCAB))
    assert zeros._is_zerotensor()
    for got, same in zip(
        with_gradients(distill_loss, LOGITS, zeros, backend=backend),
        with_gradients(distill_loss, LOGITS, torch.zeros(ROWS, VOCAB), backend=backend),
        strict=True,
    ):
        assert torch.equal(got, same)
    head = Head(draw(ROWS, WIDTH), torch._efficientzerotensor((VOCAB, WIDTH)))
    got = distill_loss(LOGITS, head, backend=backend)
    assert torch.equal(got, distill_loss(LOGITS, torch.zeros(ROWS, VOCAB), backend=backend))
    distill_loss(LOGITS, OTHER, row_weight=torch._efficientzerotensor((ROWS,)), backend=backend)


def nested():
    return torch.nested.nested_tensor([draw(2, VOCAB), draw(3, VOCAB)], layout=torch.jagged)


def freed():
    x = draw(ROWS, VOCAB)
    x.untyped_storage().resize_(0)
    return x


def quantized():
    return torch.quantize_per_tensor(LOGITS, 0.1, 0, torch.qint8)


FOREIGN = {
    "is a sparse tensor: pass .to_dense": LOGITS.to_sparse,
    "is a mkldnn tensor: pass .to_dense": LOGITS.to_mkldnn,
    "is a quantized tensor: pass .dequantize": quantized,
    "is a nested tensor: pass padded": nested,
    "has no memory: its storage was freed": freed,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("message", FOREIGN)
def test_tensors_that_are_not_dense(message):
    for name, call in {
        "student": lambda x: distill_loss(x, LOGITS),
        "teacher": lambda x: distill_loss(LOGITS, x),
        "noisy": lambda x: purify(LOGITS, x),
        "hidden": lambda x: Head(x, draw(VOCAB, VOCAB)),
        "weight": lambda x: Head(LOGITS, x),
        r"heads\[1\]": lambda x: coupled_loss([LOGITS, x], [[None, 1], [1, None]]),
        "labels": lambda x: distill_loss(LOGITS, LOGITS, labels=x),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} .*{message}"):
            call(FOREIGN[message]())


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_transforms_of_torch_func_are_refused(kind):
    weight = draw(VOCAB, WIDTH)

    def loss(x):
        return distill_loss(Head(x, weight) if kind == "heads" else x, OTHER)

    x = draw(ROWS, WIDTH) if kind == "heads" else LOGITS
    for transform in (torch.func.grad, torch.func.vmap, torch.func.hessian):
        with pytest.raises(ValueError, match="is inside a transform of torch.func"):
            transform(loss)(x[None] if transform is torch.func.vmap else x)


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_meta_tensors_are_as_fake_ones(kind):
    """Shapes and dtypes of everything, and no work."""

    def shapes(device):
        student, teacher = of(kind), of(kind, 2)
        student, teacher = (
            Head(*(t.detach().to(device).requires_grad_() for t in leaves(one)))
            if kind == "heads"
            else one.to(device).requires_grad_()
            for one in (student, teacher)
        )
        labels, noisy = torch.zeros(ROWS, dtype=torch.int64, device=device), draw(ROWS, VOCAB).to(device)
        found = []
        for reduction in ("mean", "none"):
            loss, metrics = distill_loss(
                student,
                purify(teacher, noisy, 1.0),
                labels=labels,
                hard_weight=1.0,
                reduction=reduction,
                return_metrics=True,
            )
            loss.sum().backward()
            found += [loss, *metrics.values(), *(t.grad for t in leaves(student))]
        found.append(coupled_loss([student, teacher], [[None, 1], [1, None]], labels=labels, hard_weight=0.5))
        found.append(contrast(purify(teacher, noisy, 1.0)))
        return [(t.shape, t.dtype, t.device.type) for t in found]

    real = shapes("cpu")
    assert [(*one, "meta") for *one, _ in real] == shapes("meta")
    with FakeTensorMode():
        assert shapes("cpu") == real


# second derivatives, and gradients that nobody gets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", USABLE)
def test_second_derivatives_are_refused(backend, kind, reduction):
    student = as_leaves(of(kind))
    leaf = leaves(student)[0]

    def loss(student=student):
        return distill_loss(student, OTHER, reduction=reduction, backend=backend).sum()

    with pytest.raises(RuntimeError, match="no second derivatives: create_graph=True"):
        torch.autograd.grad(loss(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives: create_graph=True"):
        loss().square().backward(create_graph=True)
    if kind == "logits":
        for derivative in (torch.autograd.functional.hessian, torch.autograd.functional.jacobian):
            how = {} if derivative is torch.autograd.functional.hessian else {"create_graph": True}
            with pytest.raises(RuntimeError, match="no second derivatives: create_graph=True"):
                derivative(loss, LOGITS, **how)
    (first,) = torch.autograd.grad(loss(), leaf)
    assert first.ne(0).any()


@pytest.mark.parametrize("donated", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_of_a_compiled_loss(reduction, donated):
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: distill_loss(s, OTHER, reduction=reduction).sum(), backend="aot_eager")
    student = as_leaves(LOGITS)
    with torch._functorch.config.patch(donated_buffer=donated), pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(compiled(student), student, create_graph=True)
        (compiled(student) + grad.square().sum()).backward()


def one(value=1.0, *shape):
    return torch.full(shape, value, requires_grad=True)


GETS_NONE = {
    "temperature": lambda t: distill_loss(LOGITS, OTHER, temperature=t(2.0)),
    "beta": lambda t: distill_loss(LOGITS, OTHER, "jensen_shannon", beta=t(0.5)),
    "hard_weight": lambda t: distill_loss(LOGITS, OTHER, hard_weight=t(0.5), labels=LABELS),
    "teacher_floor": lambda t: distill_loss(LOGITS, OTHER, teacher_floor=t(-30.0)),
    "num_items": lambda t: distill_loss(LOGITS, OTHER, num_items=t(3.0)),
    "row_weight": lambda t: distill_loss(LOGITS, OTHER, row_weight=t(1.0, ROWS)),
    "alpha": lambda t: purify(LOGITS, OTHER, t(1.0)),
    "alpha of rows": lambda t: purify(LOGITS, OTHER, t(1.0, ROWS)),
    "threshold": lambda t: purify(LOGITS, OTHER, threshold=t(0.5)),
    "plausibility": lambda t: purify(LOGITS, OTHER, plausibility=t(0.5)),
    "scale": lambda t: Head(LOGITS, draw(9, VOCAB), scale=t(2.0)),
    "softcap": lambda t: Head(LOGITS, draw(9, VOCAB), softcap=t(2.0)),
    "weight of an edge": lambda t: Edge(t(1.0)),
    r"coupling\[0\]\[1\]": lambda t: coupled_loss([LOGITS, OTHER], [[None, t(1.0)], [None, None]]),
    "temperature of contrast": lambda t: contrast(purify(LOGITS, OTHER), temperature=t(2.0)),
}


@pytest.mark.parametrize("name", GETS_NONE)
def test_an_option_gets_no_gradient(name):
    with pytest.raises(
        ValueError, match=f"^{name.removesuffix(' of contrast').removesuffix(' of rows')} gets no gradient"
    ):
        GETS_NONE[name](one)
    with torch.no_grad():  # where nobody waits for one
        GETS_NONE[name](one)
    GETS_NONE[name](lambda *args: one(*args).detach())


# what is known at the call


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("compiled", [False, True])
def test_memory_that_is_too_small_is_known_at_the_call(compiled, reduction):
    """Enough for the tiles of a row, not for their gradient's own."""
    torch._dynamo.reset()
    student = as_leaves(Head(draw(ROWS, WIDTH), draw(VOCAB, WIDTH)))
    other = as_leaves(Head(draw(ROWS, WIDTH, seed=3), draw(VOCAB, WIDTH, seed=4)))
    table = [[None, 1.0], [1.0, None]]

    def call(memory):
        return coupled_loss([student, other], table, reduction=reduction, tile_memory=memory)

    with torch.no_grad():
        least = next(memory for memory in range(100, 10_000, 4) if enough(call, memory))
    call = torch.compile(call, backend="aot_eager") if compiled else call
    with pytest.raises(ValueError, match=f"memory of {least} bytes is too small: one row of tiles takes"):
        call(least)
    for memory in range(least, 20_000, 4):
        if enough(call, memory):
            break
    call(memory).sum().backward()
    assert student.hidden.grad.isfinite().all()


def enough(call, memory):
    try:
        call(memory)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("teacher", ["logits", "heads"])
@pytest.mark.parametrize("backend", FAST)
def test_teachers_and_frozen_heads_of_inference_mode(backend, teacher, reduction):
    """A teacher's logits or hidden states, and the weight under a student's hidden states, purified and coupled too."""

    def made(mode):
        with mode:
            given, noisy, weight = of(teacher, 4), of(teacher, 6), draw(VOCAB, WIDTH, seed=8)
            labels, rows = LABELS.clone(), torch.linspace(0.5, 2, ROWS)
        return given, noisy, weight, labels, rows

    results = []
    for mode in (torch.inference_mode(), torch.no_grad()):
        given, noisy, weight, labels, rows = made(mode)
        assert weight.is_inference() == isinstance(mode, torch.inference_mode)
        grads = []
        options = dict(reduction=reduction, labels=labels, hard_weight=0.5, row_weight=rows, backend=backend)
        for one in (given, purify(given, noisy, 0.5), purify(given, [noisy, noisy], rows)):
            hidden = draw(ROWS, WIDTH).requires_grad_()
            distill_loss(Head(hidden, weight), one, **options).sum().backward()
            logits = draw(ROWS, VOCAB).requires_grad_()
            distill_loss(logits, one, **options).sum().backward()
            grads += [hidden.grad, logits.grad]
        hidden, other = draw(ROWS, WIDTH).requires_grad_(), draw(ROWS, WIDTH, seed=5).requires_grad_()
        heads = [Head(hidden, weight), Head(other, draw(VOCAB, WIDTH)), given]
        table = [[None, Edge(1.0, detach=False), 1.0], [1.0, None, None], [None] * 3]
        coupled_loss(heads, table, **options | {"hard_weight": [0.5, 0.5, 0.0]}).sum().backward()
        results.append([*grads, hidden.grad, other.grad])
    for inferred, plain in zip(*results, strict=True):
        assert torch.equal(inferred, plain)


# what a backend's "ok" means


def run(lines, **environment):
    import os

    known = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "HKDFAST"))}
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, env={**known, **environment}, check=True
    )
    return done.stdout.strip()


CALL = """
import torch, hkdfast
print(hkdfast.backends()["triton"])
x = torch.randn(2, 9, requires_grad=True)
try:
    hkdfast.distill_loss(x, torch.randn(2, 9), backend="triton").backward()
    print("ran")
except ImportError as error:
    print("ImportError:", error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ok_means_that_a_call_would_run():
    pytest.importorskip("triton")
    said, happened = run(CALL).splitlines()
    assert said == happened
    assert happened.startswith("ImportError: the triton backend does not run here: Triton needs a GPU")
    assert run(CALL, TRITON_INTERPRET="1").splitlines() == ["ok", "ran"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_line_says_so_too():
    pytest.importorskip("triton")
    lines = "from hkdfast.cli import main; raise SystemExit(main(['doctor']))"
    assert "triton           ImportError: the triton backend does not run here" in run(lines)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_a_backend_takes_tensors_of_its_devices_alone(backend, monkeypatch):
    monkeypatch.setattr(sys.modules["hkdfast.ops.dispatch"], "load", lambda name: object())
    for device in {"cpu", "cuda"} - {"cpu" if backend == "cpu" else "cuda"}:
        with pytest.raises(ValueError, match=f"the {backend} backend takes tensors on .*, not on {device}"):
            find(torch.device(device), torch.float32, backend)


# messages

COUPLE = [[None, 1.0], [1.0, None]]
BAD = {
    "ignore_index must be a whole number of 64 bits, got None": lambda: distill_loss(LOGITS, OTHER, ignore_index=None),
    "ignore_index must be .*, got -100.0": lambda: distill_loss(LOGITS, OTHER, ignore_index=-100.0),
    "temperature must be positive and finite, got '2.0'": lambda: distill_loss(LOGITS, OTHER, temperature="2.0"),
    "temperature must be positive and finite, got True": lambda: distill_loss(LOGITS, OTHER, temperature=True),
    "temperature must be positive and finite, got None": lambda: distill_loss(LOGITS, OTHER, temperature=None),
    r"temperature must be .*, got a tensor \(5,\) of": lambda: distill_loss(LOGITS, OTHER, temperature=torch.ones(5)),
    r"temperature must be .*, got ndarray \(2,\)": lambda: distill_loss(LOGITS, OTHER, temperature=np.ones(2)),
    "beta must be a number, got '0.5'": lambda: distill_loss(LOGITS, OTHER, "skew_kl", beta="0.5"),
    "hard_weight must be finite and not negative, got '1'": lambda: distill_loss(LOGITS, OTHER, hard_weight="1"),
    "hard_weight must be .*, got True": lambda: distill_loss(LOGITS, OTHER, hard_weight=True, labels=LABELS),
    "hard_weight must be .*, got inf": lambda: distill_loss(LOGITS, OTHER, hard_weight=math.inf, labels=LABELS),
    "teacher_floor must be a log-probability, .*, got '-30'": lambda: distill_loss(LOGITS, OTHER, teacher_floor="-30"),
    "teacher_floor must be .*, got nan": lambda: distill_loss(LOGITS, OTHER, teacher_floor=math.nan),
    "num_items must be finite and not negative, got '3'": lambda: distill_loss(LOGITS, OTHER, num_items="3"),
    "num_items must be .*, got True": lambda: distill_loss(LOGITS, OTHER, num_items=True),
    "num_items must be .*, got -3": lambda: distill_loss(LOGITS, OTHER, num_items=torch.tensor(-3)),
    "num_items must be .*, got nan": lambda: distill_loss(LOGITS, OTHER, num_items=torch.tensor(math.nan)),
    "num_items must be .*, got inf": lambda: distill_loss(LOGITS, OTHER, num_items=torch.tensor(math.inf)),
    "tile_memory must be a positive number of bytes, got '1GB'": lambda: distill_loss(LOGITS, OTHER, tile_memory="1GB"),
    "tile_memory must be .*, got nan": lambda: distill_loss(LOGITS, OTHER, tile_memory=math.nan),
    "t_squared must be True or False, got 'no'": lambda: distill_loss(LOGITS, OTHER, t_squared="no"),
    "return_metrics must be True or False, got 1": lambda: distill_loss(LOGITS, OTHER, return_metrics=1),
    r"unknown reduction list of 1, expected one of mean": lambda: distill_loss(LOGITS, OTHER, reduction=["mean"]),
    "unknown divergence None, expected one of forward_kl": lambda: distill_loss(LOGITS, OTHER, None),
    r"unknown divergence a tensor \(5, 60\) of": lambda: distill_loss(LOGITS, OTHER, LOGITS),
    "unknown backend list, expected one of cpu": lambda: distill_loss(LOGITS, OTHER, backend=["cpu"]),
    "vocab must be .*, got '60'": lambda: distill_loss(LOGITS, OTHER, vocab="60"),
    r"vocab must be .*, got a tensor \(\)": lambda: distill_loss(LOGITS, OTHER, vocab=torch.tensor(3)),
    "student must be one of float16, bfloat16, float32, float64, got torch.float8_e4m3fn": lambda: distill_loss(
        LOGITS.to(torch.float8_e4m3fn), OTHER
    ),
    "weight must be one of float16, .*, got torch.float8_e5m2": lambda: Head(
        LOGITS, draw(9, VOCAB).to(torch.float8_e5m2)
    ),
    "teacher must be floating point, got torch.int64": lambda: distill_loss(LOGITS, OTHER.long()),
    "teacher must be floating point, got torch.complex64": lambda: distill_loss(LOGITS, torch.complex(OTHER, OTHER)),
    r"teacher must be a tensor of logits or a Head, got list of 2": lambda: distill_loss(LOGITS, [[1.0], [2.0]]),
    r"student must be .* or a Head, got ndarray \(5, 60\): pass torch.from_numpy": lambda: distill_loss(
        LOGITS.numpy(), OTHER
    ),
    r"weight must be a floating point tensor, got Linear: pass its .weight": lambda: Head(
        draw(ROWS, WIDTH), torch.nn.Linear(WIDTH, VOCAB)
    ),
    r"hidden must be a floating point tensor, got ndarray \(5, 60\): pass torch.from_numpy": lambda: Head(
        LOGITS.numpy(), OTHER
    ),
    "hidden is on cpu but weight is on meta": lambda: Head(LOGITS, OTHER.to("meta")),
    "scale must be positive and finite, got '2'": lambda: Head(LOGITS, OTHER, scale="2"),
    "softcap must be positive and finite, got True": lambda: Head(LOGITS, OTHER, softcap=True),
    r"labels must be a tensor \(5,\), one number per row, got ndarray \(5,\)": lambda: distill_loss(
        LOGITS, OTHER, labels=LABELS.numpy()
    ),
    "labels must be int64, got torch.float32": lambda: distill_loss(LOGITS, OTHER, labels=LABELS.float()),
    "labels must be int64, got torch.bool": lambda: distill_loss(LOGITS, OTHER, labels=LABELS > 0),
    "label 60 is neither in 0..59": lambda: distill_loss(LOGITS, OTHER, labels=LABELS + 1, ignore_index=-99),
    "row_weight must be one of float16, .* got torch.float8": lambda: distill_loss(
        LOGITS, OTHER, row_weight=torch.ones(ROWS).to(torch.float8_e4m3fn)
    ),
    "coupled_loss takes a list of heads, got a tensor": lambda: coupled_loss(LOGITS, COUPLE),
    r"coupling must be a list of 2 lists of 2 entries, got a tensor \(2, 2\)": lambda: coupled_loss(
        [LOGITS, OTHER], torch.ones(2, 2)
    ),
    r"coupling\[0\]\[1\] must be finite and not negative, got '1'": lambda: coupled_loss(
        [LOGITS, OTHER], [[None, "1"], [None, None]]
    ),
    r"hard_weight\[1\] must be .*, got '1'": lambda: coupled_loss([LOGITS, OTHER], COUPLE, hard_weight=[0.0, "1"]),
    "weight of an edge must be finite and not negative, got nan": lambda: Edge(math.nan),
    "detach must be True or False, got 'no'": lambda: Edge(detach="no"),
    "alpha must be finite and not negative, got '1'": lambda: purify(LOGITS, OTHER, "1"),
    "threshold must be between 0 and 1, got '0.5'": lambda: purify(LOGITS, OTHER, threshold="0.5"),
    "plausibility must be between 0 and 1, got True": lambda: purify(LOGITS, OTHER, plausibility=True),
    "unknown schedule 1.0, expected one of constant": lambda: purify(LOGITS, OTHER, schedule=1.0),
    "contrast takes the result of purify, got a tensor": lambda: contrast(LOGITS),
    "temperature must be positive and finite, got nan": lambda: contrast(purify(LOGITS, OTHER), temperature=math.nan),
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_argument_is_named_with_what_it_may_be(message, monkeypatch):
    for name in USABLE:
        monkeypatch.setattr(load(name), "rows", None)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        BAD[message]()
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


def test_an_output_of_a_model_is_named():
    class Output(dict):
        logits = LOGITS

    with pytest.raises(ValueError, match="teacher must be .* or a Head, got Output of 1: pass its .logits"):
        distill_loss(LOGITS, Output(logits=LOGITS))


def test_numbers_of_numpy_and_tensors_of_one_are_numbers():
    expected = distill_loss(LOGITS, OTHER, temperature=2.0, num_items=3, labels=LABELS, hard_weight=0.5)
    for number in (np.float32, np.float64, torch.tensor):
        got = distill_loss(
            LOGITS, OTHER, temperature=number(2.0), num_items=number(3.0), labels=LABELS, hard_weight=number(0.5)
        )
        assert off(got, expected.double()) < 1e-6
    again = distill_loss(LOGITS, OTHER, labels=LABELS, ignore_index=np.int64(-100))
    assert torch.equal(again, distill_loss(LOGITS, OTHER, labels=LABELS))


@pytest.mark.slow
@pytest.mark.parametrize("backend", FAST)
def test_labels_out_of_range_read_no_memory(backend):
    """Compiled too, where the check waits for the run."""
    for label in (VOCAB, 2**40, -7, -(2**62)):
        labels = torch.full((ROWS,), label)
        for call in (distill_loss, torch.compile(distill_loss, backend="aot_eager")):
            torch._dynamo.reset()
            for source in (LOGITS, of("heads")):
                with pytest.raises(ValueError, match=f"label {label} is neither in 0..59 nor ignore_index -100"):
                    call(source, OTHER, labels=labels, hard_weight=1.0, backend=backend)


def test_backends_are_named():
    assert set(backends()) >= {"cpu", "cuda", "triton", "reference"}
