"""SEED's steps on a toy model in plain torch."""

import pytest
import torch
from torch.nn.functional import log_softmax, one_hot

from hkdfast import UNLABELED, Head, diffuse, purify
from hkdfast.batch import answer_rows, noised
from hkdfast.seed import distill, identify, isolate

VOCAB, WIDTH = 23, 8


class Toy(torch.nn.Module):
    """Sees the mean of an image and the tokens so far; logits or heads at the answer rows."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.look = torch.nn.Linear(4, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, batch):
        words = one_hot(batch["input_ids"] % WIDTH, WIDTH).float().cumsum(1)
        seen = self.look(batch["pixel_values"].flatten(1))
        hidden = torch.tanh(words + seen[:, None])[answer_rows(batch)[0]]
        return Head(hidden, self.head.weight) if self.heads else self.head(hidden)


def make(heads, seed):
    torch.manual_seed(seed)
    return Toy(heads)


def batch(size=5, labels=False):
    draw = torch.Generator().manual_seed(0)
    found = {
        "input_ids": torch.randint(1, VOCAB, (size, 6), generator=draw),
        "pixel_values": torch.randn(size, 1, 2, 2, generator=draw),
    }
    if labels:
        found["labels"] = found["input_ids"].clone()
        found["labels"][:, :3] = -100
        found["labels"][0] = -100
    return found


def logits_of(model, batch):
    out = model(batch)
    return (out.hidden @ out.weight.T if isinstance(out, Head) else out).detach().double()


def test_answer_rows_are_the_positions_before_the_labels():
    labels = torch.tensor([[7, -100, 3, 4], [-100, -100, -100, 5]])
    rows, targets = answer_rows({"input_ids": labels, "labels": labels})
    assert rows.tolist() == [[False, True, True, False], [False, False, True, False]]
    assert targets.tolist() == [3, 4, 5]
    shifted = torch.tensor([[-100, 3, 4, -100], [-100, -100, 5, -100]])
    again, same = answer_rows({"input_ids": labels, "labels": labels, "shift_labels": shifted})
    assert torch.equal(again, rows) and torch.equal(same, targets)


@pytest.mark.parametrize(
    "mask, last",
    [([[1, 1, 1, 1], [1, 1, 0, 0]], [3, 1]), ([[1, 1, 1, 1], [0, 0, 1, 1]], [3, 3]), (None, [3, 3])],
    ids=["right", "left", "none"],
)
def test_without_labels_the_last_token_answers(mask, last):
    found = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    if mask is not None:
        found["attention_mask"] = torch.tensor(mask)
    rows, targets = answer_rows(found)
    assert rows.nonzero().tolist() == [[0, last[0]], [1, last[1]]]
    assert targets is None


def test_packed_prompts_answer_where_the_positions_restart():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    rows, _ = answer_rows({"input_ids": torch.ones_like(positions), "position_ids": positions})
    assert rows.tolist() == [[False, False, True, False, True, True]]


def test_an_empty_prompt_has_no_answer():
    found = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[0, 0, 0], [1, 1, 0]])}
    assert answer_rows(found)[0].nonzero().tolist() == [[1, 1]]


def test_noise_follows_the_example_not_the_batch():
    whole = batch(6)
    halves = [{name: x[i : i + 3] for name, x in whole.items()} for i in (0, 3)]
    together = noised(whole, seed=7)["pixel_values"]
    apart = torch.cat([noised(half, seed=7, first=3 * i)["pixel_values"] for i, half in enumerate(halves)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, noised(whole, seed=7, draw=1)["pixel_values"])
    assert not torch.equal(together, noised(whole, seed=8)["pixel_values"])
    noise = together - 0.863 * whole["pixel_values"]  # what VCD's schedule leaves of the image at step 500
    assert len(noise.flatten().unique()) == noise.numel()  # no two examples share their noise


def test_noise_is_that_of_diffuse():
    found = batch(1)
    torch.manual_seed(3)
    expected = diffuse(found["pixel_values"], sigma=1.2)
    torch.manual_seed(3)
    assert torch.equal(noised(found, sigma=1.2)["pixel_values"], expected)


def test_a_batch_without_images_is_refused():
    with pytest.raises(ValueError, match="pixel_values.*input_ids"):
        noised({"input_ids": torch.ones(1, 2, dtype=torch.long)})


def test_a_row_to_be_distilled_without_a_label_is_distilled():
    found = batch(labels=True)
    found["distill_only"] = torch.zeros_like(found["labels"]).bool()
    found["distill_only"][0, -1] = True
    rows, targets = answer_rows(found)
    assert rows[0].tolist() == [False] * 5 + [True] and targets.tolist().count(UNLABELED) == 1 == (targets[0] < 0)
    loss, metrics = distill(make(True, 2), found, make(True, 1)(found), hard_weight=0.5)
    assert metrics["divergence"].gt(0).all() and metrics["cross_entropy"].eq(0).tolist() == (targets < 0).tolist()
    torch.testing.assert_close(loss, (metrics["divergence"] + 0.5 * metrics["cross_entropy"]).mean())


@pytest.mark.parametrize("heads", [False, True], ids=["logits", "heads"])
@pytest.mark.parametrize("measure", ["max_prob", "entropy", "target"])
def test_identify(heads, measure):
    model, found = make(heads, 1), batch(labels=True)
    _, sure = identify(model, found, confidence=measure)
    p = logits_of(model, found).softmax(-1)
    expected = {
        "max_prob": p.amax(-1),
        "entropy": 1 + (p * p.log()).sum(-1) / torch.tensor(VOCAB).log(),
        "target": p.gather(-1, answer_rows(found)[1][:, None])[:, 0],
    }[measure]
    assert torch.allclose(sure.double(), expected, atol=1e-6)


def test_identify_says_what_it_takes():
    with pytest.raises(ValueError, match="needs labels"):
        identify(make(False, 1), batch(), confidence="target")
    some = batch(labels=True)
    none = torch.zeros_like(some["labels"]).bool()
    _, plain = identify(make(False, 1), some, confidence="target")
    _, sure = identify(make(False, 1), some | {"distill_only": none}, confidence="target")
    assert torch.equal(sure, plain)
    with pytest.raises(ValueError, match="of every answer row"):
        identify(make(False, 1), some | {"distill_only": ~none}, confidence="target")
    with pytest.raises(ValueError, match="max_prob, entropy, target"):
        identify(make(False, 1), batch(), confidence="trust")


@pytest.mark.parametrize("heads", [False, True], ids=["logits", "heads"])
@pytest.mark.parametrize("labels", [False, True], ids=["prompts", "labels"])
def test_the_steps_together_are_the_definition(heads, labels):
    """Reverse KL to the softmax of (1 + a) clean - a mean(noisy), all of it written out in float64."""
    teacher, student, found = make(heads, 1), make(heads, 2), batch(labels=labels)
    clean, _ = identify(teacher, found)
    noisy = isolate(teacher, found, step=700, draws=3, seed=5)
    loss, metrics = distill(student, found, purify(clean, noisy, alpha=1.5), hard_weight=0.5 if labels else 0.0)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())

    disturbed = [logits_of(teacher, noised(found, 700, seed=5, draw=draw)) for draw in range(3)]
    purified = 2.5 * logits_of(teacher, found) - 1.5 * torch.stack(disturbed).mean(0)
    twin = make(heads, 2).double()
    exact = {name: x.double() if x.is_floating_point() else x for name, x in found.items()}
    words = one_hot(exact["input_ids"] % WIDTH, WIDTH).double().cumsum(1)
    rows, targets = answer_rows(found)
    hidden = torch.tanh(words + twin.look(exact["pixel_values"].flatten(1))[:, None])[rows]
    log_q, log_p = log_softmax(twin.head(hidden), -1), log_softmax(purified, -1)
    per_row = (log_q.exp() * (log_q - log_p)).sum(-1)
    if labels:
        per_row = per_row + 0.5 * -log_q.gather(-1, targets[:, None])[:, 0]
    per_row.mean().backward()
    assert torch.allclose(loss.double(), per_row.mean(), rtol=1e-5)
    assert metrics["divergence"].shape == (len(targets) if labels else 5,)
    for ours, truth in zip(student.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad.double(), truth.grad, atol=1e-6)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_without_contrast():
    model, found = make(True, 1), batch()
    clean, _ = identify(model, found)
    loss, metrics = distill(model, found, purify(clean, isolate(model, found, seed=0), alpha=0.0))
    assert loss.item() < 1e-6 and metrics["agreement"].eq(1).all()


def test_draws_must_be_positive():
    with pytest.raises(ValueError, match="draws"):
        isolate(make(False, 1), batch(), draws=0)
