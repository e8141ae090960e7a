"""What is not a number stays none: a NaN loss has a NaN gradient in its row, and no other row notices."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import home, law
from truth import FAST, USABLE, as_leaves, leaves

from hkdfast import DIVERGENCES, Edge, Head, coupled_loss, distill_loss, purify
from hkdfast.engine.autograd import apply_row_weight
from hkdfast.ops.dispatch import load
from hkdfast.ops.objective import METRICS, Objective, Transform

ROWS, VOCAB = 6, 45
SPOILED, IGNORED, WEIGHTLESS = 1, 2, 3  # rows; all of them hold what is not a number
LIVE = [0, 4, 5]
OPTIONS = {
    "plain": {},
    "hot": {"temperature": 3.0, "hard_weight": 0.7},
    "teacher_floor": {"teacher_floor": -30.0},
    "softcap": {"student": Transform(0.5, 8.0), "teacher": Transform(1.0, 6.0)},
    "difference": {"difference": True},
    "accumulate": {"accumulate": True},
    "accumulate with a floor": {"accumulate": True, "teacher_floor": -30.0},
    "law": law(alpha=0.7),
    "rows": law(schedule="per_row"),
    "linear": law(schedule="linear", confidence="entropy"),
    "closed gate": law(schedule="gate", threshold=0.0),
    "set": law(schedule="linear", plausibility=0.1),
    "drop": {**law(plausibility=0.1, outside="drop"), "teacher_floor": -30.0},
    "accumulated law": {"accumulate": True, **law(alpha=0.7)},
}
VALUES = {"nan": math.nan, "-nan": -math.nan, "inf": math.inf}


def draw(*shape, seed=0, spread=3.0, dtype=torch.float32):
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def run(module, objective, tiles, row_weight, kept=None, in_place=False, measured=True):
    """(loss, gradient, metrics) of tiles (student, teacher, noisy), the gradient added to ones if it is added."""
    device = home(module)
    student, teacher, noisy = (t if t is None else t.to(device, copy=True) for t in tiles)
    labels = torch.arange(ROWS, device=device)
    labels[IGNORED] = -100
    loss, metrics = torch.empty(ROWS, device=device), torch.zeros(len(METRICS), ROWS, device=device)
    grad = student if in_place else torch.ones(student.shape, dtype=kept or student.dtype, device=device)
    by_rows = objective.law is not None and objective.law.schedule == "per_row"
    alpha = torch.ones(ROWS, device=device) if by_rows else None
    outputs = loss, grad, metrics if measured else None
    module.rows(objective, student, teacher, noisy, alpha, labels, row_weight.to(device), *outputs)
    return loss.cpu(), grad.cpu(), metrics.cpu()


def weights():
    weight = torch.linspace(0.5, 2, ROWS)
    weight[WEIGHTLESS] = 0
    return weight


def spoil(tile, value, where):
    """In three rows, at their first, some middle or last word, or everywhere."""
    tile[SPOILED : WEIGHTLESS + 1, {"first": 0, "middle": 21, "last": -1, "all": slice(None)}[where]] = value


def assert_spoiled(module, objective, tiles, cases, **how):
    """cases: (side, value, where) of what is put into the tiles."""
    before = 1.0 if objective.accumulate else 0.0
    clean = run(module, objective, tiles, weights(), **how)
    assert all(t.isfinite().all() for t in clean[:2])
    for side, value, where in cases:
        given = [t if t is None else t.clone() for t in tiles]
        spoil(given[side], VALUES[value], where)
        loss, grad, metrics = run(module, objective, given, weights(), **how)
        assert loss[SPOILED].isnan() and grad[SPOILED].isnan().all(), (side, value, where)
        assert loss[IGNORED] == 0 and metrics[:, IGNORED].eq(0).all()
        assert grad[[IGNORED, WEIGHTLESS]].eq(before).all()
        for now, then in zip((loss, grad), clean, strict=False):
            assert torch.equal(now[LIVE], then[LIVE])


WHERE = ("first", "middle", "last", "all")
EACH = list(product(VALUES, WHERE))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", USABLE)
def test_a_row_that_holds_a_nan(backend, divergence, options):
    """Each side in turn; a softcap makes a number of an infinite logit, and that stays one."""
    objective = Objective(divergence, beta=0.3, **OPTIONS[options])
    count = 3 if objective.law else 2
    tiles = [*(draw(ROWS, VOCAB, seed=seed) for seed in range(count)), None][:3]
    cases = [(side, *each) for side in range(count) for each in EACH if options != "softcap" or each[0] != "inf"]
    if backend == "triton":  # whose interpreter takes its time
        turn = 5 * list(OPTIONS).index(options) + 7 * list(DIVERGENCES).index(divergence)
        cases = [cases[turn % len(cases)]]
    assert_spoiled(load(backend), objective, tiles, cases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", FAST)
def test_16_bits_and_the_gradient_in_the_students_place(backend, divergence, dtype):
    tiles = [draw(ROWS, VOCAB, seed=0, dtype=dtype), draw(ROWS, VOCAB, seed=1, dtype=dtype), None]
    cases = [(side, value, "middle") for side in (0, 1) for value in VALUES]
    for in_place in (False, True):
        assert_spoiled(load(backend), Objective(divergence, beta=0.3), tiles, cases, in_place=in_place)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("backend", USABLE)
def test_a_weight_that_is_no_number(backend, divergence, weight):
    """Where the host can see weights they are refused; a device shows what it was given."""
    tiles = [draw(ROWS, VOCAB), draw(ROWS, VOCAB, seed=1), None]
    given = weights()
    given[SPOILED] = weight
    for accumulate in (False, True):
        loss, grad, _ = run(load(backend), Objective(divergence, beta=0.3, accumulate=accumulate), tiles, given)
        assert loss.isfinite().all() and grad[SPOILED].isnan().all()
        assert grad[[0, 2, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("backend", USABLE)
def test_a_divergence_that_is_truly_infinite_has_no_gradient(backend):
    """A NaN elsewhere in such a row makes it a NaN again, and a row without a word at all has no distribution."""
    for divergence, side in (("reverse_kl", 1), ("forward_kl", 0)):
        tiles = [draw(ROWS, VOCAB), draw(ROWS, VOCAB, seed=1), None]
        tiles[side][[0, 4], 7] = -math.inf
        tiles[0][4, 9] = math.nan
        tiles[side][5] = -math.inf
        loss, grad, _ = run(load(backend), Objective(divergence), tiles, torch.ones(ROWS))
        assert loss[0] == math.inf and grad[0].eq(0).all()
        assert loss[[4, 5]].isnan().all() and grad[[4, 5]].isnan().all()


@pytest.mark.parametrize("backend", USABLE)
def test_a_mask_is_still_no_nan(backend):
    """Words masked on both sides, in the row of a NaN as in others."""
    tiles = [draw(ROWS, VOCAB), draw(ROWS, VOCAB, seed=1), None]
    for tile in tiles[:2]:
        tile[:, 5] = -math.inf
    tiles[1][SPOILED, 9] = math.nan
    loss, grad, _ = run(load(backend), Objective("jensen_shannon"), tiles, torch.ones(ROWS))
    assert loss[SPOILED].isnan() and grad[SPOILED].isnan().all()
    assert loss[LIVE].isfinite().all() and grad[LIVE].isfinite().all() and grad[LIVE, 5].eq(0).all()


@pytest.mark.parametrize("law_", [dict(), dict(plausibility=0.1), dict(plausibility=0.1, outside="drop")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("backend", USABLE)
def test_decoding(backend, side, law_):
    module = load(backend)
    tiles = [draw(ROWS, VOCAB, seed=seed) for seed in range(2)]
    tiles[side][SPOILED, 3] = math.nan
    out = torch.empty(ROWS, VOCAB, device=home(module))
    objective = Objective(**law(**law_))
    module.contrast(objective, *(tile.to(home(module)) for tile in tiles), None, None, out)
    others = [i for i in range(ROWS) if i != SPOILED]
    assert out[SPOILED].isnan().any() and not out[others].isnan().any()


# the losses


def head(seed, width=8):
    return Head(draw(ROWS, width, seed=seed, spread=1.0), draw(VOCAB, width, seed=seed + 10, spread=1.0), draw(VOCAB))


def of(kind, seed):
    return head(seed) if kind == "heads" else draw(ROWS, VOCAB, seed=seed)


def rows_of(source):
    return source.hidden if isinstance(source, Head) else source


def gradients(student, teacher, **options):
    student = as_leaves(student)
    loss = distill_loss(student, teacher, **options)
    (loss.nansum() if loss.dim() else loss).backward()
    return loss.detach(), [leaf.grad for leaf in leaves(student)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kinds", [("logits", "logits"), ("heads", "logits"), ("logits", "heads"), ("heads", "heads")])
@pytest.mark.parametrize("spoiled", ["student", "teacher", "noisy"])
@pytest.mark.parametrize("backend", FAST)
def test_a_loss_of_a_row_that_holds_a_nan(backend, spoiled, kinds, reduction):
    student, teacher, noisy = (of(kind, seed) for seed, kind in enumerate((*kinds, kinds[1])))
    rows_of({"student": student, "teacher": teacher, "noisy": noisy}[spoiled])[SPOILED, 2] = math.nan
    value, (first, *weight) = gradients(
        student, purify(teacher, noisy, 0.5), divergence="reverse_kl", reduction=reduction, backend=backend
    )
    others = [i for i in range(ROWS) if i != SPOILED]
    if reduction == "none":  # whose sum leaves the row out
        assert value[SPOILED].isnan() and value[others].isfinite().all()
        assert first[SPOILED].eq(0).all() and all(t.isfinite().all() for t in (first, *weight))
        return
    assert value.isnan() and first[SPOILED].isnan().all() and first[others].isfinite().all()
    assert all(t.isnan().any() for t in weight)
    if weight:
        assert weight[0].isnan().all() and weight[1].isnan().all()


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("backend", FAST)
def test_a_head_that_holds_a_nan(backend, side, part):
    student, teacher = head(0), head(1)
    getattr(student if side == "student" else teacher, part)[3] = math.nan
    value, grads = gradients(student, teacher, backend=backend)
    assert value.isnan() and all(grad.isnan().all() for grad in grads)


@pytest.mark.parametrize("how", ["row_weight", "labels", "upstream"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", USABLE)
def test_a_row_left_out_may_hold_anything(backend, kind, how):
    """By its weight, its label or the caller, as where padding holds NaN: gradients as if it were an ordinary row."""
    student, teacher = of(kind, 0), of(kind, 1)
    options = dict(backend=backend, reduction="sum")
    if how == "row_weight":
        options["row_weight"] = torch.ones(ROWS).index_fill(0, torch.tensor([SPOILED]), 0.0)
    elif how == "labels":
        options["labels"] = torch.arange(ROWS).index_fill(0, torch.tensor([SPOILED]), -100)
    else:
        options["reduction"] = "none"

    def run(student):
        student = as_leaves(student)
        loss = distill_loss(student, teacher, **options)
        (loss[[0, 2, 3, 4, 5]].sum() if how == "upstream" else loss).backward()
        return [leaf.grad for leaf in leaves(student)]

    expected = run(student)
    rows_of(student)[SPOILED], rows_of(teacher)[SPOILED] = math.nan, math.inf
    for got, exact in zip(run(student), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
    assert run(student)[0][SPOILED].eq(0).all()


@pytest.mark.parametrize("keep", [False, True])
def test_a_row_left_out_by_the_caller_of_a_graph_that_is_kept(keep):
    student, teacher = draw(ROWS, VOCAB).requires_grad_(), draw(ROWS, VOCAB, seed=1)
    teacher[SPOILED] = math.nan
    loss = distill_loss(student, teacher, reduction="none")
    loss[[0, 2]].sum().backward(retain_graph=keep)
    assert student.grad[[0, 2]].ne(0).any() and student.grad[[1, 3, 4, 5]].eq(0).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_narrow_tiles_and_fp16_keep_a_nan(precision):
    student, teacher = head(0), head(1)
    for dtype in (torch.bfloat16, torch.float16):
        one, other = (
            replace(h, hidden=h.hidden.to(dtype), weight=h.weight.to(dtype), bias=None) for h in (student, teacher)
        )
        other.hidden[SPOILED] = math.nan
        value, (d_hidden, d_weight) = gradients(one, other, precision=precision)
        assert value.isnan() and d_hidden[SPOILED].isnan().all() and d_weight.isnan().all()


@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", FAST)
def test_models_that_teach_each_other(backend, kind):
    """The NaN of one reaches all that learn from it, in its row; who learns from others alone stays clean."""
    sides = [as_leaves(of(kind, seed)) for seed in range(3)]
    with torch.no_grad():
        rows_of(sides[2])[SPOILED, 0] = math.nan
    table = [[None, Edge(1.0, "jensen_shannon"), None], [Edge(0.5), None, Edge(0.5, "reverse_kl")], [1.0, None, None]]
    coupled_loss(sides, table, backend=backend, reduction="sum").backward()
    first, second, third = (rows_of(side).grad for side in sides)
    assert first.isfinite().all() and second[SPOILED].isnan().all() and third[SPOILED].isnan().all()
    others = [i for i in range(ROWS) if i != SPOILED]
    assert second[others].isfinite().all() and third[others].isfinite().all()


def test_what_a_compiled_loss_cannot_look_at():
    """Weights and denominators that are no numbers are refused where the host sees them; else the loss is NaN."""
    student, teacher = draw(ROWS, VOCAB).requires_grad_(), draw(ROWS, VOCAB, seed=1)
    compiled = torch.compile(distill_loss, backend="aot_eager")
    weight = torch.ones(ROWS).index_fill(0, torch.tensor([SPOILED]), math.nan)
    loss = compiled(student, teacher, row_weight=weight)
    loss.backward()
    assert loss.isnan() and student.grad[SPOILED].isnan().all() and student.grad[LIVE].isfinite().all()
    for number in (-1.0, math.nan, math.inf):
        torch._dynamo.reset()
        student.grad = None
        loss = torch.compile(distill_loss, backend="aot_eager")(student, teacher, num_items=torch.tensor(number))
        loss.backward()
        assert loss.isnan() and student.grad.isnan().all()
        with pytest.raises(ValueError, match="num_items must be finite and not negative, got"):
            distill_loss(student, teacher, num_items=torch.tensor(number))


def test_weighted_leaves_out_what_has_no_weight():
    loss = torch.tensor([math.nan, math.inf, math.nan, 1.0])
    got = apply_row_weight(loss, torch.tensor([0.0, 0.0, 1.0, 2.0]))
    assert got[:2].eq(0).all() and got[2].isnan() and got[3] == 2
