"""The row operation of every backend against the definitions in hkdfast/ops/reference.py, evaluated in float64."""

import pytest
import torch
from cases import CASES, COMMON_OFFSETS, Case, assert_as_close_as_torch, home, inputs, law, run_rows

from hkdfast import DIVERGENCES, backends
from hkdfast.ops import reference
from hkdfast.ops.dispatch import load
from hkdfast.ops.objective import METRICS, Objective

BACKENDS = [pytest.param(b, marks=pytest.mark.skipif(why != "ok", reason=why)) for b, why in backends().items()]
COMPILED = [b for b in BACKENDS if b.values[0] != "reference"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", COMPILED)
def test_matches_the_definition(backend, divergence, case):
    exact = run_rows(reference, CASES[case], divergence, exact=True)
    plain = run_rows(reference, CASES[case], divergence)
    got = run_rows(load(backend), CASES[case], divergence)
    for name, truth, torch_, ours in zip(("loss", "gradient"), exact, plain, got, strict=False):
        assert_as_close_as_torch(ours, torch_, truth, name)
    for name, truth, torch_, ours in zip(METRICS, exact[2], plain[2], got[2], strict=True):
        assert_as_close_as_torch(ours, torch_, truth, name)


@pytest.mark.parametrize("common", COMMON_OFFSETS)
@pytest.mark.parametrize("options", [{}, law(alpha=0.7)], ids=["plain", "law"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", COMPILED)
def test_a_large_common_offset_changes_nothing(backend, divergence, dtype, options, common):
    unit = {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]  # else all logits would be equal
    common = min(common, 3e4) if dtype == torch.float16 else common  # which ends at 65504
    spread = max(3.0, abs(common) * unit)
    case = Case((8, 1032), dtype, spread=spread, apart=spread / 3, common=common, labels=True, options=options)
    exact = run_rows(reference, case, divergence, exact=True, hard_weight=0.5)
    plain = run_rows(reference, case, divergence, hard_weight=0.5)
    got = run_rows(load(backend), case, divergence, hard_weight=0.5)
    for name, truth, torch_, ours in zip(("loss", "gradient"), exact, plain, got, strict=False):
        assert_as_close_as_torch(ours, torch_, truth, name)


@pytest.mark.parametrize("common", COMMON_OFFSETS)
@pytest.mark.parametrize("mode", ["extrapolate", "subtract"])
@pytest.mark.parametrize("backend", COMPILED)
def test_a_large_common_offset_changes_no_contrast(backend, mode, common):
    case = Case((8, 1032), spread=3.0, apart=1.0, common=common, options=law(mode=mode))
    module = load(backend)
    clean, noisy = (t.to(home(module)) for t in inputs(case)[1:3])
    out, plain, exact = (torch.empty_like(clean, dtype=d) for d in (torch.float32, torch.float32, torch.float64))
    module.contrast(Objective(**case.options), clean, noisy, None, None, out)
    reference.contrast(Objective(**case.options), clean, noisy, None, None, plain)
    reference.contrast(Objective(**case.options), clean.double(), noisy.double(), None, None, exact)
    assert_as_close_as_torch(out, plain, exact)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_sides_cost_nothing(backend, divergence):
    loss, grad, _ = run_rows(load(backend), CASES["equal"], divergence)
    assert loss.abs().max() < 1e-6 and (loss >= 0).all()
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_words_are_absent(backend, divergence):
    """-inf on both sides: the loss is that of the other words, and a masked word gets no gradient."""
    masked = CASES["both masked"]
    words = list(masked.masked[0])
    module = load(backend)
    loss, grad, _ = run_rows(module, masked, divergence)
    student, teacher = (t.to(home(module)) for t in inputs(masked)[:2])
    kept = [v for v in range(student.shape[1]) if v not in words]
    short, short_grad = student.new_empty(len(student)), student.new_empty(len(student), len(kept))
    objective = Objective(divergence=divergence, beta=0.3)
    module.rows(objective, student[:, kept], teacher[:, kept], None, None, None, None, short, short_grad, None)
    torch.testing.assert_close(loss, short.cpu())
    torch.testing.assert_close(grad[:, kept], short_grad.cpu())
    assert grad[:, words].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_divergence_is_inf_without_gradient(backend):
    """Reverse KL to a word that the teacher masks, forward KL to one that the student masks: never NaN."""
    sides = {"reverse_kl": ((), (2,), ()), "forward_kl": ((2,), (), ())}
    for divergence, masked in sides.items():
        loss, grad, metrics = run_rows(load(backend), Case((3, 50), masked=masked), divergence)
        assert loss.eq(float("inf")).all() and grad.eq(0).all() and not metrics.isnan().any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_zeros(backend, divergence):
    loss, grad, metrics = run_rows(load(backend), CASES["labels"], divergence)
    assert loss[1] == 0 and grad[1].eq(0).all() and metrics[:, 1].eq(0).all()
    assert loss[[0, 2, 3]].gt(0).all() and grad[[0, 2, 3]].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_label_counts_only_where_its_cross_entropy_is_asked_for(backend):
    masked = Case((3, 50), masked=((2,), (2,), ()))
    alone, _, _ = run_rows(load(backend), masked, "reverse_kl")
    student, teacher, *_ = inputs(masked)
    labels = torch.full((3,), 2, device=student.device)
    loss, grad = torch.empty_like(alone), torch.empty_like(student)
    for hard_weight, expected in ((0.0, alone), (0.5, torch.full_like(alone, float("inf")))):
        objective = Objective(divergence="reverse_kl", beta=0.3, hard_weight=hard_weight)
        load(backend).rows(objective, student, teacher, None, None, labels, None, loss, grad, None)
        assert torch.equal(loss, expected) and not grad.isnan().any()


@pytest.mark.parametrize("apart", [3.0, 0.3, 0.03])  # forward KL from 24 to 0.001 where logits spread by 6
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_near_convergence(backend, divergence, apart):
    """A relative error of 3e-3 at most, the rounding of the bf16 gradient included."""
    case = Case((4, 4000), torch.bfloat16, teacher_dtype=torch.float32, spread=6.0, apart=apart)
    (_, exact, _), (_, grad, _) = (
        run_rows(reference, case, divergence, exact=True),
        run_rows(load(backend), case, divergence),
    )
    assert ((grad - exact).norm() / exact.norm()).item() < 3e-3


@pytest.mark.parametrize("outside", ["clean", "drop"])
@pytest.mark.parametrize("plausibility", [0.0, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_contrast_matches_the_definition(backend, plausibility, outside):
    case = Case((3, 1031), torch.bfloat16, options=law(plausibility=plausibility, outside=outside))
    module = load(backend)
    clean, noisy = (t.to(home(module)) for t in inputs(case)[1:3])
    objective = Objective(temperature=0.7, **case.options)
    out, plain, exact = (torch.empty_like(clean, dtype=d) for d in (torch.float32, torch.float32, torch.float64))
    module.contrast(objective, clean, noisy, None, None, out)
    reference.contrast(objective, clean, noisy, None, None, plain)
    reference.contrast(objective, clean.double(), noisy.double(), None, None, exact)
    assert_as_close_as_torch(out, plain, exact)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones_like(out[:, 0]))
