"""One stage of the pyramid against its terms written out."""

import pytest
import torch
from eager import Speaker, assert_same, batch, coupled, logits_of

from hkdfast import UNLABELED, Edge, pyramid
from hkdfast.batch import answer_rows
from hkdfast.engine import tile_loop


def pair(heads=True):
    """A teacher and a student of other hidden sizes, the student's head padded by two words."""
    return Speaker(16, 31, 0, heads), Speaker(8, 33, 1, heads)


def truth(models, found, edges, hard, **options):
    return coupled([logits_of(m, found) for m in models], edges, answer_rows(found)[1], hard, vocab=31, **options)


TERMS = {  # the edges (learner, source, weight, ...) and hard weights that each mode stands for
    "concurrent": ([(1, 0, 0.7, "jensen_shannon", 0.3, True)], (0.4, 0.9)),
    "mutual": ([(1, 0, 0.7, "jensen_shannon", 0.3, True), (0, 1, 0.7, "jensen_shannon", 0.3, True)], (0.4, 0.9)),
    "frozen": ([(1, 0, 0.7, "jensen_shannon", 0.3, True)], (0.0, 0.9)),
}


@pytest.mark.parametrize("heads", [False, True], ids=["logits", "heads"])
@pytest.mark.parametrize("unlabeled", [(), (0, 3), range(5)], ids=["labeled", "mixed", "unlabeled"])
@pytest.mark.parametrize("mode", pyramid.MODES)
def test_a_stage_is_its_terms(mode, unlabeled, heads):
    models, found = pair(heads), batch(unlabeled=unlabeled)
    ours, _ = pyramid.loss(
        models, found, mode, divergence_weight=0.7, divergence="jensen_shannon", beta=0.3, hard_weight=(0.4, 0.9),
        temperature=2.0, unlabeled_weight=0.5, vocab="common",
    )  # fmt: skip
    assert models[0].grads == (mode != "frozen")
    exact = truth(models, found, *TERMS[mode], temperature=2.0, unlabeled_weight=0.5)
    assert_same(models, ours, exact)


def test_the_default_is_concurrent_forward_kl():
    models, found = pair(), batch()
    ours, _ = pyramid.loss(models, found, vocab="common")
    assert_same(models, ours, truth(models, found, [(1, 0, 1.0, "forward_kl", 0.5, True)], (1.0, 1.0)))


def test_gradients_into_both_sides():
    models, found = pair(), batch()
    ours, _ = pyramid.loss(models, found, divergence="reverse_kl", detach=False, vocab="common")
    assert_same(models, ours, truth(models, found, [(1, 0, 1.0, "reverse_kl", 0.5, False)], (1.0, 1.0)))


def test_one_denominator_for_all_rows():
    models, found = pair(), batch(unlabeled=(2,))
    edges = [(1, 0, 1.0, "forward_kl", 0.5, True)]
    ours, _ = pyramid.loss(models, found, vocab="common", num_items=torch.tensor(40))
    assert_same(models, ours, truth(models, found, edges, (1.0, 1.0), num_items=40))
    ours, _ = pyramid.loss(models, found, vocab="common", reduction="sum")
    assert_same(models, ours, truth(models, found, edges, (1.0, 1.0), num_items=1))


def test_without_labels_only_the_divergence_is_left():
    models, found = pair(), batch(labeled=False)
    ours, metrics = pyramid.loss(models, found, "frozen", hard_weight=0.0, vocab="common")
    assert_same(models[1:], ours, truth(models, found, [(1, 0, 1.0, "forward_kl", 0.5, True)], (0.0, 0.0)))
    assert "student_cross_entropy" not in metrics


def test_rows_with_and_without_labels_share_one_loop(monkeypatch):
    """The gradient of a head of 4 V H bytes is made once."""
    calls, plain = [], tile_loop.run
    monkeypatch.setattr(tile_loop, "run", lambda *args: calls.append(len(args[1][0][0])) or plain(*args))
    pyramid.loss(pair(heads=True), batch(unlabeled=(0, 3)), vocab="common")[0].backward()
    assert calls == [11]


def test_metrics_are_named_by_role_and_told_per_row():
    models, found = pair(), batch(unlabeled=(0, 3))
    _, metrics = pyramid.loss(models, found, "mutual", vocab="common")
    labels = answer_rows(found)[1]
    for model, role in zip(models, ("teacher", "student"), strict=True):
        log_q = logits_of(model, found)[:, :31].double().log_softmax(-1)
        known = labels != UNLABELED
        found_entropy = metrics[f"{role}_cross_entropy"].double().sort().values
        expected = -log_q[known].gather(-1, labels[known, None])[:, 0]
        assert torch.allclose(found_entropy, expected.sort().values, rtol=1e-4)
        entropy = -(log_q.exp() * log_q).sum(-1)
        assert torch.allclose(metrics[f"{role}_entropy"].double().sort().values, entropy.sort().values, rtol=1e-4)
        assert metrics[f"{role}_divergence"].shape == metrics[f"{role}_agreement"].shape == labels.shape
    assert not any(rows.requires_grad for rows in metrics.values())


def test_the_table():
    edge = Edge(2.0, "reverse_kl", 0.5, True)
    assert pyramid.coupling(divergence_weight=2.0, divergence="reverse_kl") == (
        [[None, None], [edge, None]],
        [1.0, 1.0],
    )
    table, hard = pyramid.coupling("mutual", divergence_weight=(0.0, 2.0), divergence="reverse_kl", hard_weight=0.5)
    assert table == [[None, None], [edge, None]] and hard == [0.5, 0.5]
    assert pyramid.coupling("frozen", hard_weight=(3.0, 0.5))[1] == [0.0, 0.5]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mode="online"), "unknown mode 'online', expected one of concurrent, mutual, frozen"),
        (dict(divergence_weight=-1.0), "divergence_weight must be finite and not negative, got -1.0 for student"),
        (dict(divergence_weight=float("nan")), "divergence_weight must be finite"),
        (dict(divergence_weight=(1.0, 2.0)), r"divergence_weight must be one number or 1 \(student\)"),
        (dict(hard_weight=(1.0, -2.0)), "hard_weight must be finite and not negative, got -2.0 for student"),
        (dict(hard_weight=(1.0,)), r"hard_weight must be one number or 2 \(teacher, student\)"),
        (dict(divergence="kl"), "unknown divergence 'kl', expected one of forward_kl"),
        (dict(mode="frozen", detach=False), "detach=False"),
        (dict(unlabeled_weight=-1.0), "unlabeled_weight must be finite and not negative"),
        (dict(reduction="none"), "unknown reduction 'none', expected one of mean, sum"),
    ],
)
def test_wrong_options_are_told_before_a_model_runs(options, message):
    def never(batch):
        raise AssertionError("a model ran")

    with pytest.raises(ValueError, match=message):
        pyramid.loss((never, never), batch(), **options)


def test_wrong_numbers_of_models_and_missing_labels_are_told():
    models = pair()
    for chain in (models[:1], (*models, models[0])):
        with pytest.raises(ValueError, match=f"teacher and student, got {len(chain)}"):
            pyramid.loss(chain, batch())
    with pytest.raises(ValueError, match="needs labels in the batch, which has input_ids"):
        pyramid.loss(models, batch(labeled=False))
    with pytest.raises(ValueError, match="every weight of the coupling is 0"):
        pyramid.loss(models, batch(unlabeled=(1,)), divergence_weight=0.0, vocab="common")


def test_a_student_approaches_its_teacher():
    """Forty steps on one batch, half of it without labels."""
    teacher, student = pair()
    with torch.no_grad():
        teacher.head.weight.mul_(8)
    found = batch(unlabeled=(3, 4))
    optimizer, history = torch.optim.Adam(student.parameters(), lr=0.05), []
    for _ in range(40):
        loss, metrics = pyramid.loss((teacher, student), found, "frozen", hard_weight=0.0, vocab="common")
        history.append(metrics["student_divergence"].mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[-1] < 0.2 * history[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
