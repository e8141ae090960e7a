"""The row operation of a split vocabulary against the reference on the whole one, evaluated in float64."""

import math

import pytest
import torch
from cases import CASES, COMMON_OFFSETS, Case, assert_as_close_as_torch, inputs, law, run_rows
from split_backend import SplitBackend

from hkdfast import DIVERGENCES
from hkdfast.ops import reference, stages
from hkdfast.ops.objective import METRICS, Objective

PARTS = {"two": (0.55,), "three, one empty": (0.3, 0.3), "four": (0.01, 0.5, 0.9), "one": ()}


def compared(case, divergence, ends, **options):
    exact = run_rows(reference, case, divergence, exact=True, **options)
    plain = run_rows(reference, case, divergence, **options)
    got = run_rows(SplitBackend(*ends), case, divergence, **options)
    for name, truth, torch_, ours in zip(("loss", "gradient"), exact, plain, got, strict=False):
        assert_as_close_as_torch(ours, torch_, truth, name)
    for name, truth, torch_, ours in zip(METRICS, exact[2], plain[2], got[2], strict=True):
        assert_as_close_as_torch(ours, torch_, truth, name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_the_definition(divergence, case):
    for ends in PARTS.values():
        compared(CASES[case], divergence, ends)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64_to_rounding(divergence):
    for options in ({}, law(schedule="linear"), law(plausibility=0.1), {"hard_weight": 0.5, "teacher_floor": -9.0}):
        case = Case((5, 515), labels=True, ignored=(1,), unlabeled=(2,), options={"temperature": 2.0, **options})
        truth = run_rows(reference, case, divergence, exact=True)
        got = run_rows(SplitBackend(0.6, 0.7), case, divergence, exact=True)
        for one, other in zip(got, truth, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("common", COMMON_OFFSETS)
@pytest.mark.parametrize("options", [{}, law(alpha=0.7)], ids=["plain", "law"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_large_common_offset_changes_nothing(divergence, options, common):
    compared(Case((8, 1032), spread=3.0, apart=1.0, common=common, options=options), divergence, (0.4,))


@pytest.mark.parametrize("apart", [3.0, 0.3, 0.03])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_near_convergence(divergence, apart):
    case = Case((4, 4000), torch.bfloat16, teacher_dtype=torch.float32, spread=6.0, apart=apart)
    _, exact, _ = run_rows(reference, case, divergence, exact=True)
    _, grad, _ = run_rows(SplitBackend(0.3, 0.6), case, divergence)
    assert ((grad - exact).norm() / exact.norm()).item() < 3e-3


def special(rows, vocab=40):
    """(student, teacher) with a masked, infinite or NaN token in row 1, in the part of each."""
    for place in (3, 35):
        for side in range(2):
            for value in (math.nan, math.inf, -math.inf):
                tiles = [torch.randn(rows, vocab, generator=torch.Generator().manual_seed(s)) for s in range(2)]
                tiles[side][1, place] = value
                yield tiles


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_is_not_finite_is_as_in_the_reference(divergence):
    objective = Objective(divergence=divergence, beta=0.3)
    for student, teacher in special(3):
        found = []
        for module in (reference, SplitBackend(0.5)):
            loss, grad, metrics = torch.empty(3), torch.empty(3, 40), torch.empty(len(METRICS), 3)
            module.rows(objective, student, teacher, None, None, None, None, loss, grad, metrics)
            found.append((loss, grad))
        torch.testing.assert_close(found[1][0], found[0][0], equal_nan=True)
        torch.testing.assert_close(found[1][1], found[0][1], equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outside", ["clean", "drop"])
@pytest.mark.parametrize("plausibility", [0.0, 0.1])
def test_contrast_matches_the_definition(plausibility, outside):
    case = Case((3, 1031), torch.bfloat16, options=law(plausibility=plausibility, outside=outside))
    clean, noisy = inputs(case)[1:3]
    objective = Objective(temperature=0.7, **case.options)
    out, plain, exact = (torch.empty(clean.shape, dtype=d) for d in (torch.float32, torch.float32, torch.float64))
    SplitBackend(0.2, 0.8).contrast(objective, clean, noisy, None, None, out)
    for truth, sides in ((plain, (clean, noisy)), (exact, (clean.double(), noisy.double()))):
        reference.contrast(objective, *sides, None, None, truth)
    assert_as_close_as_torch(out, plain, exact)


def test_chunks_of_rows_change_nothing(monkeypatch):
    whole = run_rows(SplitBackend(0.5), CASES["labels"], "jensen_shannon")
    monkeypatch.setattr(stages, "WORKSPACE", 1)
    for one, other in zip(run_rows(SplitBackend(0.5), CASES["labels"], "jensen_shannon"), whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("divergence", "options", "expected"),
    [
        ("forward_kl", {}, ["softmax"]),
        ("reverse_kl", {}, ["softmax"]),
        ("forward_kl", {"teacher_floor": -9.0}, ["softmax", "terms"]),
        ("total_variation", {}, ["softmax", "terms"]),
        ("jensen_shannon", law(plausibility=0.1), ["branches", "set", "softmax", "terms"]),
        (
            "reverse_kl",
            law(plausibility=0.1, outside="drop") | {"teacher_floor": -9.0},
            ["branches", "softmax", "terms"],
        ),
        ("reverse_kl", law(), ["branches", "softmax"]),
    ],
)
def test_exchanges_are_few_and_small(divergence, options, expected):
    backend = SplitBackend(0.5)
    run_rows(backend, Case((4, 100), options=options), divergence)
    assert backend.exchanged == [(stages.COUNTS[stage], 4) for stage in expected]
    assert max(stages.COUNTS.values()) <= 12
