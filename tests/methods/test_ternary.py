"""The three-party losses against their terms written out."""

import pytest
import torch
from eager import Speaker, assert_same, batch, coupled, logits_of

from hkdfast import ternary
from hkdfast.batch import answer_rows


def trio(form="two_teachers", heads=True):
    made = Speaker(16, 31, 0, heads), Speaker(12, 34, 2, heads), Speaker(8, 33, 1, heads)
    return made if form != "one_pair" else (made[0], made[2])


def terms(form, trained):
    """(weight option, edges, hard weights) of each form."""
    skew = ("skew_kl", 0.2, True)
    if form == "two_teachers":
        edges = [(2, 0, 0.7, *skew), (2, 1, 0.2, *skew)]
        between = [(0, 1, 0.3, *skew), (1, 0, 0.3, *skew)] if trained else []
        return (0.7, 0.2), edges + between, (0.4, 0.5, 0.6) if trained else (0.0, 0.0, 0.6)
    if form == "mutual":
        weights = (0.7, 0.2, 0.4)
        pairs = [(i, j, weights[j], *skew) for i in range(3) for j in range(3) if i != j]
        return weights, pairs, (0.4, 0.5, 0.6)
    edges = [(1, 0, 0.7, "forward_kl", 0.2, True), (1, 0, 0.2, "reverse_kl", 0.2, True)]
    return (0.7, 0.2), edges, (0.4, 0.6) if trained else (0.0, 0.6)


@pytest.mark.parametrize("heads", [False, True], ids=["logits", "heads"])
@pytest.mark.parametrize("unlabeled", [(), (0, 3), range(5)], ids=["labeled", "mixed", "unlabeled"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("form", ternary.FORMS)
def test_a_refinement_is_its_terms(form, trained, unlabeled, heads):
    models, found = trio(form, heads), batch(unlabeled=unlabeled)
    weight, edges, hard = terms(form, trained)
    given = (0.4, 0.6) if form == "one_pair" else (0.4, 0.5, 0.6)
    ours, _ = ternary.loss(
        models, found, form, divergence_weight=weight, divergence="skew_kl", beta=0.2, hard_weight=given,
        teachers="trained" if trained else "frozen",
        teacher_coupling=0.3 if trained and form == "two_teachers" else 0.0,
        temperature=1.5, unlabeled_weight=2.0, vocab="common",
    )  # fmt: skip
    assert all(model.grads == (trained or form == "mutual") for model in models[:-1]) and models[-1].grads
    logits = [logits_of(model, found) for model in models]
    exact = coupled(logits, edges, answer_rows(found)[1], hard, vocab=31, temperature=1.5, unlabeled_weight=2.0)
    assert_same(models, ours, exact)


def test_the_default_is_two_frozen_teachers():
    models, found = trio(), batch()
    ours, _ = ternary.loss(models, found, vocab="common")
    edges = [(2, 0, 1.0, "forward_kl", 0.5, True), (2, 1, 1.0, "forward_kl", 0.5, True)]
    exact = coupled([logits_of(m, found) for m in models], edges, answer_rows(found)[1], (0.0, 0.0, 1.0), vocab=31)
    assert_same(models, ours, exact)


def test_mutual_gradients_into_both_sides():
    models, found = trio(), batch()
    ours, _ = ternary.loss(models, found, "mutual", divergence="jensen_shannon", detach=False, vocab="common")
    edges = [(i, j, 1.0, "jensen_shannon", 0.5, False) for i in range(3) for j in range(3) if i != j]
    exact = coupled([logits_of(m, found) for m in models], edges, answer_rows(found)[1], (1.0, 1.0, 1.0), vocab=31)
    assert_same(models, ours, exact)


def test_a_term_of_weight_zero_is_left_out():
    models, found = trio("one_pair"), batch()
    ours, metrics = ternary.loss(models, found, "one_pair", divergence_weight=(1.0, 0.0), vocab="common")
    exact = coupled(
        [logits_of(m, found) for m in models], [(1, 0, 1.0, "forward_kl", 0.5, True)], answer_rows(found)[1],
        (0.0, 1.0), vocab=31,
    )  # fmt: skip
    assert_same(models, ours, exact)
    assert "student_divergence" in metrics


def test_metrics_tell_which_source():
    found = batch()
    names = ternary.loss(trio(), found, vocab="common")[1].keys()
    assert {"student_cross_entropy", "student_divergence_teacher1", "student_divergence_teacher2"} <= names
    names = ternary.loss(trio("one_pair"), found, "one_pair", vocab="common")[1].keys()
    assert {"student_divergence_forward_kl", "student_divergence_reverse_kl"} <= names
    found = ternary.loss(trio(), found, "mutual", vocab="common")[1]
    assert {f"model{i}_divergence_model{j}" for i in (1, 2, 3) for j in (1, 2, 3) if i != j} <= found.keys()
    assert all(torch.isfinite(rows).all() for rows in found.values())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(form="triple"), "unknown form 'triple', expected one of two_teachers, mutual, one_pair"),
        (dict(teachers="dead"), "unknown teachers 'dead', expected one of frozen, trained"),
        (
            dict(divergence_weight=(1.0, -1.0)),
            "divergence_weight must be finite and not negative, got -1.0 for teacher2",
        ),
        (dict(divergence_weight=(1.0, 1.0, 1.0)), r"divergence_weight must be one number or 2 \(teacher1, teacher2\)"),
        (
            dict(form="mutual", divergence_weight=(1.0, 1.0)),
            r"divergence_weight must be one number or 3 \(model1, model2, model3\)",
        ),
        (dict(hard_weight=-1.0), "hard_weight must be finite and not negative, got -1.0 for teacher1"),
        (dict(teacher_coupling=1.0), "teacher_coupling=1.0 is for two trained teachers"),
        (dict(teacher_coupling=1.0, form="mutual"), "teacher_coupling=1.0 is for two trained teachers"),
        (dict(detach=False), "teachers='trained'"),
    ],
)
def test_wrong_options_are_told_before_a_model_runs(options, message):
    def never(batch):
        raise AssertionError("a model ran")

    with pytest.raises(ValueError, match=message):
        ternary.loss((never,) * 3, batch(), **options)


def test_wrong_numbers_of_models_are_told():
    with pytest.raises(ValueError, match=r"couples 3 models \(teacher1, teacher2, student\), got 2"):
        ternary.loss(trio("one_pair"), batch())
    with pytest.raises(ValueError, match=r"couples 2 models \(teacher, student\), got 3"):
        ternary.loss(trio(), batch(), "one_pair")
