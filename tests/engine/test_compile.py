"""The operator under torch.compile, its fake implementation, and what the host waits for."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from truth import leaves, off, with_gradients

from hkdfast import Head, contrast, distill_loss, purify
from hkdfast.engine import tile_loop
from hkdfast.engine.operators import contrast_op, distill, pack_spec, unpack_spec
from hkdfast.ops.objective import ContrastSpec, Objective, Transform

N, H, HT, V = 6, 8, 5, 40
LABELS = torch.tensor([3, -100, 0, 39, -100, 7])


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(kind, dtype=torch.float32):
    if kind == "logits":
        return draw(N, V, dtype=dtype), draw(N, V, seed=1, dtype=dtype)
    student = [draw(*shape, dtype=dtype) for shape in ((N, H), (V, H), (V,))]
    return Head(*student, softcap=8.0), Head(draw(N, HT, seed=1, dtype=dtype), draw(V, HT, seed=2, dtype=dtype))


OPTIONS = {
    "plain": {},
    "labels": {"labels": LABELS, "hard_weight": 0.5, "temperature": 2.0, "row_weight": torch.linspace(0, 2, N)},
    "rows": {"reduction": "none", "row_weight": torch.linspace(0, 2, N)},
    "metrics": {"labels": LABELS, "num_items": torch.tensor(3)},
    "narrow": {"precision": "bfloat16", "divergence": "jensen_shannon"},
    "words": {"vocab": 30},
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def args(
    kind, dtype=torch.float32, purified=False, labeled=False, weighted=False, wants=True, metrics=True, deferred=False
):
    student, teacher = pair(kind, dtype)

    def parts(source):
        return (source.hidden, source.weight, source.bias) if isinstance(source, Head) else (source, None, None)

    branches = [student, teacher] + ([teacher, teacher] if purified else [])
    law = ContrastSpec("linear", 2.0) if purified else None
    objective = Objective(law=law, hard_weight=0.5 if labeled else 0.0, student=Transform(1.0, 8.0))
    noisy = tile_loop.Input((2, 3), (Transform(), Transform(1.0, 3.0)))
    inputs = tile_loop.Input((0,)), tile_loop.Input((1,)), *((noisy,) if purified else ())
    term = tile_loop.LossTerm(0, 1, 2 if purified else None, objective)
    spec = tile_loop.LoopSpec(inputs, (term,), None, [], V, None, "float32", None, None)
    text, numbers = pack_spec(spec)
    return (
        *(list(tensors) for tensors in zip(*(parts(one) for one in branches), strict=True)),
        LABELS if labeled else None,
        [],
        text,
        torch.tensor(numbers, dtype=torch.float64),
        torch.ones(N) if weighted else None,
        [wants, wants and kind == "heads", wants and kind == "heads"] + 3 * [False] * (len(inputs) - 1),
        metrics,
        deferred,
        V,
        None,
        "float32",
        None,
        None,
    )


@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labeled": True, "weighted": True},
        {"purified": True, "labeled": True},
        {"dtype": torch.float16, "metrics": False},
        {"dtype": torch.bfloat16, "labeled": True},
        {"dtype": torch.float64, "weighted": True},
        {"wants": False},
        {"deferred": True},
    ],
    ids=str,
)
def test_the_operator_passes_opcheck(options, kind):
    torch.library.opcheck(distill, args(kind, **options))


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_the_operator_of_decoding_passes_opcheck(kind):
    told = args(kind, purified=True, labeled=True)
    torch.library.opcheck(contrast_op, (*told[:7], *told[11:]))


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_decoding_compiles_as_one_graph(kind):
    """With a weight for each row, several draws and a temperature; the same numbers as eagerly, bit for bit."""
    student, teacher = pair(kind)
    clean, noisy = (student, [student, student]) if kind == "heads" else (student, [teacher, student])

    def decode(clean, noisy, alpha, temperature):
        return contrast(purify(clean, noisy, alpha, plausibility=0.1, outside="drop"), temperature=temperature)

    whole = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for alpha, temperature in ((torch.linspace(0, 2, N), 1.0), (torch.linspace(0, 1, N), 0.5)):
        assert torch.equal(whole(clean, noisy, alpha, temperature), decode(clean, noisy, alpha, temperature))


@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_compiles_as_one_graph(options, kind):
    """Forward inside, backward outside; the same numbers as eagerly, bit for bit."""
    chosen = OPTIONS[options]
    if kind == "logits" and "precision" in chosen:
        pytest.skip("tiles are of heads")
    student, teacher = pair(kind)
    if "vocab" in chosen:
        student, teacher = pair("logits")[0], draw(N, 30, seed=4)

    def step(student, teacher, **options):
        return distill_loss(student, teacher, **options)

    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    upstream = torch.linspace(-1, 2, N) if chosen.get("reduction") == "none" else torch.tensor(0.5)
    got = with_gradients(whole, student, teacher, upstream=upstream, **chosen)
    for ours, eager in zip(
        got, with_gradients(distill_loss, student, teacher, upstream=upstream, **chosen), strict=True
    ):
        assert off(ours, eager.double()) < 1e-6 and ours.dtype == eager.dtype


@pytest.mark.slow
def test_a_whole_training_step_compiles_with_inductor():
    """A model in front, a purified teacher of several draws, metrics, a frozen head: two steps as eagerly."""

    def train(compiled):
        torch.manual_seed(0)
        body, head, teacher = torch.nn.Linear(H, H), draw(V, H), draw(V, HT)
        optimizer = torch.optim.SGD(body.parameters(), lr=0.1)

        def forward(x, clean, noisy, labels):
            noisy = [Head(one, teacher) for one in noisy]
            purified = purify(Head(clean, teacher), noisy, 1.5, schedule="linear")
            return distill_loss(Head(body(x).tanh(), head), purified, "reverse_kl", labels=labels, return_metrics=True)

        forward = torch.compile(forward, fullgraph=True) if compiled else forward
        values = []
        for seed in range(2):
            noisy = [draw(N, HT, seed=seed + 20), draw(N, HT, seed=seed + 30)]
            value, metrics = forward(draw(N, H, seed=seed), draw(N, HT, seed=seed + 10), noisy, LABELS)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            values += [value.item(), metrics["contrast_weight"].sum().item()]
        return torch.tensor(values + body.weight.flatten().tolist())

    torch.testing.assert_close(train(True), train(False))


def test_compiled_under_autocast():
    student, teacher = pair("heads")

    def step(student, teacher):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return distill_loss(student, teacher)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        with_gradients(compiled, student, teacher), with_gradients(step, student, teacher), strict=True
    ):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_one_graph_for_every_number_of_rows(kind):
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda s, t: distill_loss(s, t), fullgraph=True, backend=counter)
    student, teacher = pair(kind)

    def cut(source, rows):
        return Head(source.hidden[:rows], source.weight, source.bias) if kind == "heads" else source[:rows]

    for rows in (6, 5, 4, 3):
        sides = [cut(student, rows), cut(teacher, rows)]
        for tensor in leaves(sides[0])[:1] + leaves(sides[1])[:1]:
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(step(*sides), distill_loss(*sides))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_no_graph_for_each_value_of_a_schedule():
    """Temperature, alpha, floor, hard_weight and num_items may change every step: one more graph each, then none."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(s, t, temperature, alpha, hard_weight, num_items, beta):
        teacher = purify(t, t.flip(0), alpha)
        options = dict(temperature=temperature, hard_weight=hard_weight, num_items=num_items, beta=beta)
        return distill_loss(s, teacher, "jensen_shannon", labels=LABELS, **options)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    student, teacher = pair("logits")
    start = [1.0, 1.5, 0.5, 7, 0.5]
    schedules = [(2.0, 3.0, 0.5), (0.25, 0.125, 2.5), (0.1, 0.2, 0.3), (11, 13, 17), (0.1, 0.2, 0.9)]
    counts = []
    for i, values in enumerate(schedules):
        for value in values:
            now = [*start[:i], value, *start[i + 1 :]]
            torch.testing.assert_close(compiled(student, teacher, *now), step(student, teacher, *now))
            counts.append(counter.frame_count)
    assert counts[-1] <= 1 + len(schedules)
    assert all(counts[i + 1] == counts[i + 2] for i in range(0, len(counts), 3))


class NoWait(TorchDispatchMode):
    """Fails where a device would have to answer before the host could go on."""

    WAITS = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.masked_select.default,
    }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.WAITS, f"{function} makes the host wait"
        if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask makes the host wait"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("student, teacher", itertools.product(["logits", "heads"], repeat=2))
def test_the_host_waits_for_nothing(student, teacher, reduction, monkeypatch):
    """Forward, backward, metrics, weights, num_items as a tensor, with the shortcuts that the CPU alone takes off."""
    import sys

    for module in ("checks", "tile_loop", "autograd", "options"):
        monkeypatch.setattr(sys.modules[f"hkdfast.engine.{module}"], "host_readable", lambda tensor: False)
    student, teacher = pair(student)[0], pair(teacher)[1]
    labels = LABELS if not isinstance(student, Head) and not isinstance(teacher, Head) else None
    options = dict(
        reduction=reduction, row_weight=torch.ones(N), return_metrics=True, backend="reference", labels=labels
    )
    if reduction == "mean":
        options["num_items"] = torch.tensor(4)
    with NoWait():
        with_gradients(lambda s, t: distill_loss(s, t, **options)[0], student, teacher)
        contrast(purify(teacher, [teacher, teacher], torch.ones(N)), backend="reference")
    with pytest.raises(AssertionError, match="makes the host wait"), NoWait():
        torch.ones(1).item()


def test_fake_tensors_give_fake_results():
    with FakeTensorMode():
        hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
        labels = torch.zeros(4, dtype=torch.int64)
        loss, metrics = distill_loss(
            Head(hidden, weight), torch.randn(4, 11), labels=labels, hard_weight=1.0, return_metrics=True
        )
        loss.backward()
        assert loss.shape == () and metrics["divergence"].shape == (4,) and weight.grad.shape == (11, 8)
        assert contrast(purify(torch.randn(4, 11), torch.randn(4, 11), 1.0)).shape == (4, 11)


def test_tensors_of_tensors_are_refused():
    """Their own address is null, and a kernel would read from it."""
    logits, labels = torch.randn(3, 9), torch.zeros(3, dtype=torch.int64)
    for name, call in {
        "student": lambda: distill_loss(TwoTensor(logits, logits), logits),
        "teacher": lambda: distill_loss(logits, TwoTensor(logits, logits)),
        "weight": lambda: distill_loss(Head(logits, TwoTensor(logits, logits)), logits[:, :3]),
        "labels": lambda: distill_loss(logits, logits, labels=TwoTensor(labels, labels), hard_weight=1.0),
        "noisy": lambda: contrast(purify(logits, TwoTensor(logits, logits), 1.0)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} is a TwoTensor, whose data is in other tensors: pass"):
            call()


def test_a_packed_spec_is_unpacked_as_it_was():
    law = ContrastSpec("gate", 0.1, "entropy", 1e-300, "subtract", 1 / 3, "drop")
    objective = Objective(
        "skew_kl", 0.1, 1 / 3, 4.0, 0.7, -1, -30.5, True, True, Transform(0.1), Transform(2.0, 5.5), Transform(), law
    )
    inputs = tile_loop.Input((0,)), tile_loop.Input((1,)), tile_loop.Input((2, 3), (Transform(0.3, 7.0), Transform()))
    terms = tile_loop.LossTerm(0, 1, 2, objective, 0), tile_loop.LossTerm(1, 0, None, Objective(), counted=False)
    spec = tile_loop.LoopSpec(inputs, terms, None, [], V, None, "float32", None, None)
    assert unpack_spec(*pack_spec(spec)) == (inputs, terms)
