"""distill_loss as a whole: every option, from logits and from heads, against plain PyTorch in float64."""

import math
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from cases import assert_as_close_as_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import FAST, USABLE, as_leaves, exactly, leaves, loss, off, row_losses, with_gradients

from hkdfast import DIVERGENCES, UNLABELED, Head, backends, distill_loss, purify
from hkdfast.engine import tile_loop
from hkdfast.ops import reference
from hkdfast.ops.dispatch import load
from hkdfast.ops.objective import METRICS, Objective

ROWS, VOCAB = 6, 101
LABELS = torch.tensor([3, 100, -100, 0, 57, -100])
SETTINGS = {
    "plain": {},
    "hot": {"temperature": 20.0},
    "cold": {"temperature": 0.05},
    "t squared": {"temperature": 2.0, "t_squared": True},
    "beta": {"beta": 0.9},
    "labels": {"labels": LABELS},
    "hard": {"labels": LABELS, "hard_weight": 0.7, "temperature": 3.0, "t_squared": True},
    "weights": {"row_weight": torch.tensor([0.0, 2.0, 1.0, 0.5, 0.0, 3.0]), "labels": LABELS},
    "sum": {"reduction": "sum", "labels": LABELS},
    "num items": {"num_items": 17, "labels": LABELS},
    "fewer words": {"vocab": 77},
}


def logits_of(source):
    """The logits of a tensor or a Head."""
    if isinstance(source, torch.Tensor):
        return source
    logits = source.scale * torch.nn.functional.linear(source.hidden, source.weight, source.bias)
    return logits if source.softcap is None else source.softcap * torch.tanh(logits / source.softcap)


def draw(*shape, dtype=torch.float32, seed=0, spread=3.0):
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def pair(kind, dtype=torch.float32, size=1.0):
    """Student and teacher: logits, or heads with all that a head can have and hidden sizes of their own."""
    if kind == "logits":
        return tuple(draw(ROWS, VOCAB, dtype=dtype, seed=seed, spread=3 * size) for seed in (0, 1))
    student = (draw(*shape, dtype=dtype, spread=1.0) for shape in ((ROWS, 8), (VOCAB, 8), (VOCAB,)))
    teacher = (draw(*shape, dtype=dtype, seed=1, spread=1.0) for shape in ((ROWS, 5), (VOCAB, 5)))
    return Head(*student, 0.5 * size, 9.0 * size), Head(*teacher, scale=2 * size)


def check(student, teacher, *args, backend, **options):
    got = with_gradients(distill_loss, student, teacher, *args, backend=backend, **options)
    plain = with_gradients(loss, student, teacher, *args, **options)
    exact = exactly(student, teacher, *args, **options)
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        assert_as_close_as_torch(ours, theirs, truth, roundings=16)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", FAST)
def test_value_and_gradients(backend, kind, divergence, setting):
    check(*pair(kind, size=0.1 if setting == "cold" else 1.0), divergence, backend=backend, **SETTINGS[setting])


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", USABLE)
def test_value_and_gradients_with_every_option(backend, kind, divergence):
    options = SETTINGS["hard"] | SETTINGS["weights"] | SETTINGS["num items"] | SETTINGS["fewer words"] | {"beta": 0.3}
    check(*pair(kind), divergence, backend=backend, **options | {"labels": LABELS.where(LABELS < 77, 7)})


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", USABLE)
def test_a_row_without_a_label_has_no_cross_entropy(backend, kind, temperature):
    labels = LABELS.clone()
    labels[[0, 4]] = UNLABELED
    unknown = labels == UNLABELED
    parts = [dict(labels=labels.where(~unknown, -100), hard_weight=0.7), dict(labels=LABELS.where(unknown, -100))]
    options = dict(temperature=temperature, reduction="sum")

    def told(of, loss=()):
        found = [of(*loss, *pair(kind), "reverse_kl", **options, **part) for part in parts]
        return [sum(each) for each in zip(*found, strict=True)]

    got = with_gradients(
        distill_loss, *pair(kind), "reverse_kl", backend=backend, labels=labels, hard_weight=0.7, **options
    )
    for ours, theirs, exact in zip(got, told(with_gradients, [loss]), told(exactly), strict=True):
        assert_as_close_as_torch(ours, theirs, exact, roundings=16)
    mean, metrics = distill_loss(*pair(kind), labels=labels, hard_weight=0.7, return_metrics=True, backend=backend)
    rows = distill_loss(*pair(kind), labels=labels, hard_weight=0.7, reduction="none", backend=backend)
    torch.testing.assert_close(mean, rows.sum() / 4)  # rows that are not ignored
    assert metrics["cross_entropy"].eq(0).tolist() == [True, False, True, False, True, True]
    assert metrics["divergence"].eq(0).tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", FAST)
def test_half_precision(backend, kind, divergence, dtype):
    check(*pair(kind, dtype), divergence, backend=backend, **SETTINGS["hard"])


# what the words mean


@pytest.mark.parametrize("backend", USABLE)
def test_beta_weighs_the_teacher(backend):
    """By hand for two words: beta is the teacher's share of the mixture, in all three divergences that mix."""
    p, q, beta = (0.9, 0.1), (0.2, 0.8), 0.25
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    by_hand = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_kl": kl(p, m),
        "skew_reverse_kl": kl(q, m),
        "total_variation": 0.7,
    }
    student, teacher = (torch.tensor([x]).log() for x in (q, p))
    for divergence, value in by_hand.items():
        got = distill_loss(student, teacher, divergence, beta=beta, backend=backend)
        assert got.item() == pytest.approx(value, rel=1e-6), divergence


def test_beta_at_its_ends_is_the_kl_that_the_docstring_says():
    student, teacher = pair("logits", torch.float64, size=0.2)
    ends = (("skew_kl", 0, "forward_kl"), ("skew_reverse_kl", 1, "reverse_kl"))
    for divergence, beta, limit in ends:
        torch.testing.assert_close(
            distill_loss(student, teacher, divergence, beta=beta), distill_loss(student, teacher, limit)
        )
    for beta, limit in ((1e-8, "forward_kl"), (1 - 1e-8, "reverse_kl")):
        value = distill_loss(student, teacher, "jensen_shannon", beta=beta) / min(beta, 1 - beta)
        torch.testing.assert_close(value, distill_loss(student, teacher, limit), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", USABLE)
def test_divergence_weight_scales_the_divergence_alone(backend, kind, divergence):
    options = dict(labels=LABELS, reduction="sum", backend=backend)
    soft = with_gradients(distill_loss, *pair(kind), divergence, **options)
    hard = with_gradients(distill_loss, *pair(kind), divergence, divergence_weight=0.0, hard_weight=1.0, **options)
    cross_entropy = torch.nn.functional.cross_entropy(logits_of(pair(kind)[0]), LABELS, reduction="sum")
    torch.testing.assert_close(hard[0], cross_entropy)
    both = with_gradients(distill_loss, *pair(kind), divergence, divergence_weight=0.3, hard_weight=0.7, **options)
    for x, y, z in zip(both, soft, hard, strict=True):
        torch.testing.assert_close(x, 0.3 * y + 0.7 * z, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", USABLE)
def test_a_divergence_of_weight_zero_does_not_count_even_if_infinite(backend):
    student, teacher = (x.clone() for x in pair("logits"))
    student[:, 9] = -math.inf  # forward KL is infinite
    options = dict(labels=LABELS, hard_weight=1.0, reduction="sum", backend=backend)
    loss, gradient = with_gradients(distill_loss, student, teacher, "forward_kl", divergence_weight=0.0, **options)
    x = student.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(x, LABELS, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, x.grad)
    options |= dict(divergence_weight=0.0, return_metrics=True, temperature=2.0)
    mixed, metrics = distill_loss(student, pair("logits")[1], "reverse_kl", **options)
    torch.testing.assert_close(mixed, expected.detach())
    options["divergence_weight"] = 1.0
    for name, rows in distill_loss(student, pair("logits")[1], "reverse_kl", **options)[1].items():
        torch.testing.assert_close(metrics[name], rows, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", USABLE)
def test_t_squared_scales_value_and_gradient_alike(backend, divergence):
    student, teacher = pair("logits")
    one = with_gradients(distill_loss, student, teacher, divergence, temperature=4.0, backend=backend)
    two = with_gradients(distill_loss, student, teacher, divergence, temperature=4.0, backend=backend, t_squared=True)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(16 * a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", USABLE)
def test_the_value_is_a_divergence_not_a_cross_entropy(backend, divergence):
    student, _ = pair("logits")
    assert 0 <= distill_loss(student, student, divergence, backend=backend).item() < 1e-6


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_labels_alone_mix_no_hard_loss_in(kind):
    student, teacher = pair(kind)
    labels = LABELS.clamp(min=0)
    for got, without in zip(
        with_gradients(distill_loss, student, teacher, labels=labels),
        with_gradients(distill_loss, student, teacher),
        strict=True,
    ):
        assert torch.equal(got, without)


@pytest.mark.parametrize("backend", USABLE)
def test_scale_and_softcap_of_both_heads_are_read(backend):
    """Each of the four changes the loss, and none is applied to the other side."""
    student, teacher = pair("heads")
    plain = Head(student.hidden, student.weight, student.bias), Head(teacher.hidden, teacher.weight)
    seen = {distill_loss(*plain, backend=backend).item()}
    for change in ({"scale": 0.5}, {"softcap": 4.0}):
        for side in (0, 1):
            sides = list(plain)
            sides[side] = Head(plain[side].hidden, plain[side].weight, plain[side].bias, **change)
            got = distill_loss(*sides, backend=backend).item()
            assert got == pytest.approx(loss(*sides).item(), rel=1e-5)
            seen.add(got)
    assert len(seen) == 5


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_the_teacher_is_a_constant(kind):
    student, teacher, noisy = (as_leaves(source) for source in (*pair(kind), pair(kind)[1]))
    for reduction in ("mean", "none"):
        for one in (teacher, purify(teacher, [noisy, noisy], torch.ones(ROWS))):
            distill_loss(student, one, reduction=reduction).sum().backward()
    assert all(t.grad is not None for t in leaves(student))
    assert all(t.grad is None for t in (*leaves(teacher), *leaves(noisy)))


def test_a_tied_weight_gets_the_students_gradient_alone():
    student, teacher = pair("heads")
    weight = student.weight.clone().requires_grad_()
    distill_loss(Head(student.hidden, weight), Head(student.hidden.flip(0), weight)).backward()
    alone = weight.detach().clone().requires_grad_()
    distill_loss(Head(student.hidden, alone), Head(student.hidden.flip(0), weight.detach())).backward()
    assert torch.equal(weight.grad, alone.grad)


@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", USABLE)
def test_metrics(backend, kind):
    student, teacher = pair(kind)
    value, got = distill_loss(student, teacher, labels=LABELS, return_metrics=True, temperature=2.0, backend=backend)
    kept = LABELS != -100
    assert list(got) == list(METRICS) and all(row.shape == (ROWS,) and not row.requires_grad for row in got.values())
    assert all(row[~kept].eq(0).all() for row in got.values())
    torch.testing.assert_close(got["divergence"], row_losses(student, teacher, labels=LABELS, temperature=2.0))
    torch.testing.assert_close(value, got["divergence"].sum() / kept.sum())
    hard = row_losses(student, student, labels=LABELS, hard_weight=1.0)
    torch.testing.assert_close(got["cross_entropy"], hard)
    from truth import logits

    log_q, log_p = ((logits(one) / 2).log_softmax(-1) for one in (student, teacher))
    for name, log in (("student_entropy", log_q), ("teacher_entropy", log_p)):
        torch.testing.assert_close(got[name][kept], torch.special.entr(log.exp()).sum(-1)[kept])
    assert torch.equal(got["agreement"][kept], (log_p.argmax(-1) == log_q.argmax(-1)).float()[kept])
    torch.testing.assert_close(got["confidence"][kept], log_p.amax(-1).exp()[kept])


@pytest.mark.parametrize("backend", USABLE)
def test_a_shift_of_the_logits_changes_nothing(backend):
    student, teacher = (draw(4, 64, seed=seed).round(decimals=1) for seed in (0, 1))
    truth = exactly(student, teacher)
    for shift in (-512.0, 4096.0):  # the rounding of the shifted numbers, 2e-4 at 4096, is the input's own
        for a, b in ((shift, 0.0), (0.0, shift)):
            got = with_gradients(distill_loss, student + a, teacher + b, backend=backend)
            again = exactly(student + a, teacher + b)
            assert all(off(ours, exact) < 1e-5 for ours, exact in zip(got, again, strict=True))
            assert off(got[0], truth[0]) < 1e-3


# rows, reductions, denominators


def test_the_mean_counts_the_rows_not_ignored_and_weights_leave_it_alone():
    student, teacher = pair("logits")
    rows = row_losses(student, teacher, labels=LABELS)
    torch.testing.assert_close(distill_loss(student, teacher, labels=LABELS), rows.sum() / 4)
    torch.testing.assert_close(distill_loss(student, teacher), row_losses(student, teacher).mean())
    twice = torch.full((ROWS,), 2.0)
    torch.testing.assert_close(distill_loss(student, teacher, labels=LABELS, row_weight=twice), 2 * rows.sum() / 4)


@pytest.mark.parametrize(
    "num_items", [5, 5.0, torch.tensor(5), torch.tensor(5.0), torch.tensor([5], dtype=torch.bfloat16)]
)
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_num_items_of_any_type(kind, num_items):
    student, teacher = pair(kind)
    got = with_gradients(distill_loss, student, teacher, num_items=num_items)
    assert got[0].shape == ()
    for ours, exact in zip(got, exactly(student, teacher, num_items=5), strict=True):
        assert off(ours, exact) < 1e-5


@pytest.mark.parametrize("num_items", [0, 0.0, torch.tensor(0)])
def test_no_items_divide_nothing_by_zero(num_items):
    student, teacher = pair("logits")
    got = distill_loss(student, teacher, num_items=num_items)
    torch.testing.assert_close(got, distill_loss(student, teacher, reduction="sum"))


def test_num_items_below_one_are_meant():
    """As where weights sum to less than one."""
    student, teacher = pair("logits")
    whole = distill_loss(student, teacher, reduction="sum")
    for num_items in (0.25, torch.tensor(0.25)):
        torch.testing.assert_close(distill_loss(student, teacher, num_items=num_items), 4 * whole)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", FAST)
def test_a_batch_without_a_counted_row_is_a_differentiable_zero(backend, kind, reduction):
    student, teacher = pair(kind)
    for options in (
        {"labels": torch.full((ROWS,), -100), "hard_weight": 1.0},
        {"row_weight": torch.zeros(ROWS)},
    ):
        value, *grads = with_gradients(
            distill_loss, student, teacher, reduction=reduction, backend=backend, return_metrics=False, **options
        )
        assert value.eq(0).all() and all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_no_rows_at_all(kind):
    student, teacher = pair(kind)
    if kind == "logits":
        none = student[:0], teacher[:0]
    else:
        none = Head(student.hidden[:0], student.weight), Head(teacher.hidden[:0], teacher.weight)
    value, *grads = with_gradients(distill_loss, *none)
    assert value == 0 and all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("backend", FAST)
def test_rows_with_any_upstream_gradient(backend, kind):
    """reduction="none": negative and zero factors too, times the rows' weights."""
    student, teacher = pair(kind)
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0, -0.1, 3.0])
    options = dict(reduction="none", upstream=upstream, labels=LABELS, row_weight=torch.linspace(0, 2, ROWS))
    got = with_gradients(distill_loss, student, teacher, backend=backend, **options)
    for ours, exact in zip(got, exactly(student, teacher, **options), strict=True):
        assert off(ours, exact) < 2e-6


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_rows_summed_by_the_caller(kind):
    """The upstream gradient of a sum is one number expanded: no dense vector in memory."""
    student, teacher = pair(kind)

    def summed(*args):
        return 3 * distill_loss(*args, reduction="none").sum()

    for ours, exact in zip(
        with_gradients(summed, student, teacher), exactly(student, teacher, reduction="sum"), strict=True
    ):
        assert off(ours, 3 * exact) < 2e-6


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_halves_of_a_batch_accumulate_to_the_whole(kind):
    student, teacher = (as_leaves(source, torch.float64) for source in pair(kind))
    labels, options = LABELS, {"num_items": 4, "hard_weight": 0.5}
    whole = with_gradients(distill_loss, student, teacher, labels=labels, **options)[1:]
    for part in (slice(0, 2), slice(2, ROWS)):

        def cut(source, part=part):
            if isinstance(source, Head):
                return Head(source.hidden[part], source.weight, source.bias, source.scale, source.softcap)
            return source[part]

        distill_loss(cut(student), cut(teacher), labels=labels[part], **options).backward()
    for tensor, exact in zip(leaves(student), whole, strict=True):
        torch.testing.assert_close(tensor.grad, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_weights_of_any_float_dtype(kind, dtype):
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 0.25, 4.0])
    for got, same in zip(
        with_gradients(distill_loss, *pair(kind), row_weight=weight.to(dtype)),
        with_gradients(distill_loss, *pair(kind), row_weight=weight),
        strict=True,
    ):
        torch.testing.assert_close(got, same)


def test_leading_dimensions_of_any_number():
    student, teacher = pair("logits")
    labels = LABELS.clamp(min=0)
    whole = distill_loss(student, teacher, labels=labels, reduction="none")
    shaped = distill_loss(
        student.view(2, 3, VOCAB),
        teacher.view(2, 3, VOCAB),
        labels=labels.view(2, 3),
        reduction="none",
        return_metrics=True,
    )
    assert torch.equal(shaped[0].flatten(), whole) and shaped[1]["divergence"].shape == (2, 3)
    one = distill_loss(student[0], teacher[0], labels=labels[0], reduction="none")
    assert one.shape == () and torch.equal(one, whole[0])
    hidden, head = pair("heads")
    nested = Head(hidden.hidden.view(2, 3, -1), hidden.weight)
    assert distill_loss(nested, student.view(2, 3, VOCAB), reduction="none").shape == (2, 3)


# backward, again and scaled


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_repeated_backward_adds_the_same_gradient_each_time(kind, reduction):
    """Even where the caller changes a gradient in place in between, as clipping and unscaling do."""
    source, teacher = pair(kind)
    (_, *once) = with_gradients(distill_loss, source, teacher)
    student = as_leaves(source)
    value = distill_loss(student, teacher, reduction=reduction)
    value = value.mean() if reduction == "none" else value
    for last in (False, False, True):
        value.backward(retain_graph=not last)
        for tensor, grad in zip(leaves(student), once, strict=True):
            assert off(tensor.grad, grad) < 1e-6
            tensor.grad.zero_()
    student = as_leaves(source)
    value = distill_loss(student, teacher)
    value.backward(retain_graph=True)
    value.backward()
    assert all(torch.equal(tensor.grad, 2 * grad) for tensor, grad in zip(leaves(student), once, strict=True))


@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_output(kind, dtype):
    student, teacher = pair(kind, dtype)
    plain = with_gradients(distill_loss, student, teacher)[1:]
    scaled = with_gradients(distill_loss, student, teacher, upstream=torch.tensor(-4.0))[1:]
    for one, four in zip(plain, scaled, strict=True):
        exact = -4 * one.double()
        most = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
        assert ((four.double() - exact).abs() <= most).all()


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_fp16_gradients_survive_under_a_loss_scale(kind):
    """A word's gradient of 1e-9 is nothing in fp16, and 7e-5 once the loss scaler's factor is in it."""
    student, teacher = draw(16, 4000, spread=2.0), draw(16, 4000, spread=2.0, seed=1)
    if kind == "heads":
        student, teacher = Head(draw(16, 8, spread=1.0), draw(4000, 8, spread=1.0)), teacher
    student, teacher = as_leaves(student, torch.float16), teacher.half()
    scale = torch.tensor(65536.0)
    got = with_gradients(distill_loss, student, teacher, upstream=scale, num_items=4096)[1:]
    exact = exactly(student, teacher, upstream=scale.double(), num_items=4096)[1:]
    for ours, truth in zip(got, exact, strict=True):
        assert ours.isfinite().all() and off(ours, truth) < 1e-3
        assert ours.eq(0).double().mean() < truth.half().eq(0).double().mean() + 0.002


def test_no_gradient_no_work():
    student, teacher = pair("logits")
    student.requires_grad_()
    with torch.no_grad():
        assert not distill_loss(student, teacher).requires_grad
    with torch.inference_mode():
        distill_loss(student, teacher)
    assert not distill_loss(student.detach(), teacher).requires_grad


# numbers at the edge


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_negative(dtype, backend, divergence):
    student = draw(64, 1000, dtype=dtype)
    for apart in (0.0, 1e-6, 1e-4, 1e-3, 1e-2):
        teacher = (student.float() + apart * draw(64, 1000, seed=1)).to(dtype)
        assert distill_loss(student, teacher, divergence, reduction="none", backend=backend).ge(0).all()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", FAST)
def test_masked_words_at_every_temperature(backend, divergence, temperature):
    """-inf in the logits of both: as if the words were not there, and finite."""
    student, teacher = pair("logits")
    gone = [0, 50, VOCAB - 1]
    kept = [v for v in range(VOCAB) if v not in gone]
    student[:, gone] = teacher[:, gone] = -math.inf
    options = {"temperature": temperature, "backend": backend}
    value, grad = with_gradients(distill_loss, student, teacher, divergence, **options)
    less, less_grad = with_gradients(distill_loss, student[:, kept], teacher[:, kept], divergence, **options)
    torch.testing.assert_close(value, less)
    assert (grad[:, kept] - less_grad).abs().max() < 1e-5 * max(1, less_grad.abs().max())
    assert grad[:, gone].eq(0).all()


@pytest.mark.parametrize("backend", USABLE)
def test_a_row_of_weight_zero_does_not_count_even_if_infinite(backend):
    student, teacher = pair("logits")
    teacher[0, 5] = -math.inf
    weight = torch.ones(ROWS).index_fill(0, torch.tensor([0]), 0.0)
    value, grad = with_gradients(distill_loss, student, teacher, "reverse_kl", row_weight=weight, backend=backend)
    assert value.isfinite() and grad.isfinite().all() and grad[0].eq(0).all()
    rows = distill_loss(student, teacher, "reverse_kl", row_weight=weight, reduction="none", backend=backend)
    assert rows[0] == 0 and rows[1:].gt(0).all()


@pytest.mark.parametrize("backend", USABLE)
def test_a_floor_makes_reverse_kl_to_a_masked_teacher_finite(backend):
    student, teacher = pair("logits")
    teacher[:, 5] = -math.inf
    assert distill_loss(student, teacher, "reverse_kl", backend=backend).isinf()
    got = with_gradients(distill_loss, student, teacher, "reverse_kl", teacher_floor=-30.0, backend=backend)
    for ours, exact in zip(got, exactly(student, teacher, "reverse_kl", teacher_floor=-30.0), strict=True):
        assert off(ours, exact) < 2e-6


@pytest.mark.parametrize("shape", ["wider teacher", "wider student"])
@pytest.mark.parametrize("vocab", ["common", 60])
@pytest.mark.parametrize("backend", FAST)
def test_padded_vocabularies_compare_the_common_words(backend, vocab, shape):
    """Zero-padded logits, as padded heads give them, count as absent: identical models are at distance 0."""
    student = draw(ROWS, 64)
    padded = torch.cat([student, torch.zeros(ROWS, 16)], 1)
    sides = (student, padded) if shape == "wider teacher" else (padded, student)
    value, grad = with_gradients(distill_loss, *sides, vocab=vocab, backend=backend)
    assert value < 1e-6 and grad.abs().max() < 1e-6
    other = draw(ROWS, sides[1].shape[1], seed=3)
    value, grad = with_gradients(distill_loss, sides[0], other, vocab=vocab, backend=backend)
    words = 64 if vocab == "common" else vocab
    assert value.item() == pytest.approx(loss(sides[0], other, vocab=words).item(), rel=1e-5)
    assert grad[:, words:].eq(0).all() and grad.shape == sides[0].shape


def test_padded_heads_get_exactly_zero_gradient_beyond_the_common_words():
    student = Head(draw(ROWS, 8), draw(80, 8), draw(80))
    _, _, weight, bias = with_gradients(distill_loss, student, draw(ROWS, 64), vocab="common")
    assert weight[64:].eq(0).all() and bias[64:].eq(0).all() and weight[:64].ne(0).all()


@pytest.mark.parametrize("backend", USABLE)
def test_tensors_of_any_stride(backend):
    """Transposed, expanded and strided logits, labels and weights give what dense copies give."""
    student, teacher = draw(VOCAB, 4).T, draw(1, VOCAB).expand(4, VOCAB)
    labels = torch.tensor([1, 9, 2, 9, -100, 9, 100, 9])[::2]
    weight = torch.tensor([0.5]).expand(4)
    strided = dict(labels=labels, row_weight=weight, hard_weight=0.5)
    dense = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in strided.items()}
    for got, same in zip(
        with_gradients(distill_loss, student, teacher, backend=backend, **strided),
        with_gradients(distill_loss, student.contiguous(), teacher.contiguous(), backend=backend, **dense),
        strict=True,
    ):
        assert torch.equal(got, same)


@pytest.mark.parametrize("backend", FAST)
def test_offsets_beyond_2_31_elements(backend):
    """Rows 2**30 elements and more apart, in 4.3 GB of address space of which a few pages are touched."""
    stride, vocab = 2**30 + 4, 1000
    torch.utils.deterministic.fill_uninitialized_memory = False  # would touch them all
    try:
        spaces = [torch.empty(2 * stride + vocab, dtype=torch.bfloat16) for _ in range(2)]
    except RuntimeError as error:
        pytest.skip(f"no address space for it here: {error}")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    far, grad = (space.as_strided((3, vocab), (stride, 1)) for space in spaces)
    student, teacher = draw(3, vocab, dtype=torch.bfloat16), draw(3, vocab, seed=1)
    far.copy_(student)
    value, near = torch.empty(3), torch.empty(3, vocab, dtype=torch.bfloat16)
    again = torch.empty(3)
    rows = load(backend).rows
    rows(Objective(), student, teacher, None, None, None, None, value, near, None)
    rows(Objective(), far, teacher, None, None, None, None, again, grad, None)
    assert torch.equal(value, again) and torch.equal(near, grad)


def test_float64_runs_on_the_reference_and_stays_float64():
    for kind in ("logits", "heads"):
        student, teacher = pair(kind, torch.float64)
        got = with_gradients(distill_loss, student, teacher)
        for ours, exact in zip(got, exactly(student, teacher), strict=True):
            assert ours.dtype == torch.float64 and (off(ours, exact) < 1e-13)
    student, teacher = pair("logits")
    derive_seed = distill_loss(student, teacher.double())  # a float64 teacher alone asks for the reference too
    torch.testing.assert_close(derive_seed, distill_loss(student, teacher))
    for name in set(USABLE) - {"reference"}:
        with pytest.raises(ValueError, match=f"backend '{name}' takes .*float32.*, not torch.float64"):
            distill_loss(student.double(), teacher.double(), backend=name)


def test_the_same_bits_from_run_to_run():
    student, teacher = pair("heads")
    first, second = (with_gradients(distill_loss, student, teacher) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 300),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), min_size=2, max_size=2),
    heads=st.lists(st.booleans(), min_size=2, max_size=2),
    divergence=st.sampled_from(list(DIVERGENCES)),
    temperature=st.sampled_from([0.1, 1.0, 5.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weighted=st.booleans(),
    ignored=st.sets(st.integers(0, 4)),
    hard_weight=st.sampled_from([0.0, 0.5]),
    beta=st.floats(0.01, 0.99),
    backend=st.sampled_from(FAST),
    seed=st.integers(0, 2**16),
)
def test_anything_goes(
    rows, vocab, dtypes, heads, divergence, temperature, reduction, weighted, ignored, hard_weight, beta, backend, seed
):
    def source(dtype, head, seed):
        if not head:
            return draw(rows, vocab, dtype=dtype, seed=seed)
        return Head(draw(rows, 7, dtype=dtype, seed=seed), draw(vocab, 7, dtype=dtype, seed=seed + 2, spread=1.0))

    student, teacher = (
        source(dtype, head, seed + i) for i, (dtype, head) in enumerate(zip(dtypes, heads, strict=True))
    )
    labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    labels[[i for i in ignored if i < rows]] = -100
    options = dict(beta=beta, temperature=temperature, reduction=reduction, labels=labels, hard_weight=hard_weight)
    if weighted:
        options["row_weight"] = torch.linspace(0, 2, rows)
    got = with_gradients(distill_loss, student, teacher, divergence, backend=backend, **options)
    exact = exactly(student, teacher, divergence, **options)
    for ours, truth, like in zip(got, exact, [ours for ours in got[:1]] + leaves(student), strict=True):
        assert ours.shape == truth.shape and ours.dtype == like.dtype
        most = truth.abs().max().item() if truth.numel() else 0.0
        # the gradient is rounded to its own dtype; ten roundings of float32 inside, more where 1 / T makes it steep
        allowed = torch.finfo(ours.dtype).eps + 2e-5 / min(temperature, 1)
        assert torch.allclose(ours.double(), truth, rtol=0, atol=allowed * most + 1e-7)


# the house


def test_out_of_memory_halves_the_blocks_once(monkeypatch):
    student, teacher = pair("heads")
    before = with_gradients(distill_loss, student, teacher)
    module = load(next(name for name in FAST))
    plain, blocks = module.rows, []

    def short(objective, z, *rest):
        blocks.append(len(z))
        if len(blocks) == 1:
            raise torch.OutOfMemoryError("no room")
        return plain(objective, z, *rest)

    monkeypatch.setattr(module, "rows", short)
    with pytest.warns(UserWarning, match="out of memory with blocks of 6 rows: trying once more with half"):
        again = with_gradients(distill_loss, student, teacher, backend=FAST[0])
    assert blocks == [6, 3, 3]
    assert all(off(ours, exact.double()) < 1e-6 for ours, exact in zip(again, before, strict=True))
    monkeypatch.setattr(module, "rows", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distill_loss(student, teacher, backend=FAST[0])


@pytest.fixture
def captured(monkeypatch):
    """As if a CUDA graph were captured on the CPU: whoever waits for a value or asks for free memory fails."""
    monkeypatch.setattr("hkdfast.engine.tile_loop.capturing", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self: pytest.fail("the host waits for the rows"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("free memory is read"))


def test_under_capture_ignored_rows_are_computed_and_count_nothing(captured):
    student, teacher = pair("heads")
    labels = torch.zeros(len(student.hidden), dtype=torch.int64)
    labels[[1, 3]] = -100
    student.hidden.data[3] = teacher.hidden.data[3] = float("nan")
    kept = [i for i in range(len(labels)) if labels[i] == 0]
    for row_weight in (None, torch.linspace(0.5, 2, len(labels))):
        got = with_gradients(
            distill_loss, student, teacher, labels=labels, hard_weight=0.5, row_weight=row_weight, backend=FAST[0]
        )
        fewer = [replace(one, hidden=one.hidden[kept]) for one in (student, teacher)]
        weights = None if row_weight is None else row_weight[kept]
        expected = with_gradients(
            distill_loss, *fewer, labels=labels[kept], hard_weight=0.5, row_weight=weights, backend=FAST[0]
        )
        assert got[1][[1, 3]].eq(0).all()
        got[1] = got[1][kept]
        for ours, alone in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, alone)


def test_the_budget_under_capture_is_the_default(captured):
    heads = [torch.empty(1), None]
    for trained, name in ((True, "cuda, trained head"), (False, "cuda")):
        budget = tile_loop.tile_budget(None, torch.device("cuda", 0), heads, False, trained)
        assert budget == tile_loop.DEFAULT_BUDGET[name]


def test_out_of_memory_under_capture_is_no_second_try(captured, monkeypatch):
    student, teacher = pair("heads")
    monkeypatch.setattr(load(FAST[0]), "rows", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError, match="while a CUDA graph is captured.*a smaller tile_memory than"):
        distill_loss(student, teacher, backend=FAST[0])


def test_a_new_divergence_needs_its_definitions_alone(monkeypatch):
    """Written in the reference, it runs through losses, heads and laws there; nothing else lists divergences."""

    def hellinger(log_p, log_q, beta):
        return ((log_p / 2).exp() - (log_q / 2).exp()).square() / 2

    monkeypatch.setitem(reference.DIVERGENCES, "hellinger", hellinger)
    for kind in ("logits", "heads"):
        check(*pair(kind), "hellinger", backend="reference")


def test_import_brings_neither_triton_nor_transformers():
    lines = "import sys, hkdfast; print([m for m in ('triton', 'transformers', 'peft', 'trl') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_backends_says_why_one_is_missing():
    report = backends()
    assert report["reference"] == "ok"
    report.pop("cuda-rows", None)  # where that backend is usable: how long a row it takes
    assert all(why == "ok" or "Error: " in why for why in report.values())


STUDENT, TEACHER = pair("logits")
BAD = {
    "unknown divergence 'kl', expected one of forward_kl": {"divergence": "kl"},
    "unknown reduction 'batchmean', expected one of mean, sum, none": {"reduction": "batchmean"},
    "unknown precision 'float16', expected one of float32": {"precision": "float16"},
    "unknown backend 'cuda9', expected one of": {"backend": "cuda9"},
    "temperature must be positive and finite, got 0": {"temperature": 0},
    "temperature must be positive and finite, got inf": {"temperature": math.inf},
    "temperature must be positive and finite, got nan": {"temperature": math.nan},
    'jensen_shannon takes 0 < beta < 1, got 1: .* TRL and Liger .* divergence="reverse_kl"': {
        "divergence": "jensen_shannon",
        "beta": 1,
    },
    'jensen_shannon takes 0 < beta < 1, got 0.0: .* divergence="forward_kl"': {
        "divergence": "jensen_shannon",
        "beta": 0.0,
    },
    "divergence_weight must be finite and not negative, got -1": {"divergence_weight": -1},
    "jensen_shannon takes 0 < beta < 1, got 1": {"divergence": "jensen_shannon", "beta": 1},
    "jensen_shannon takes 0 < beta < 1, got nan": {"divergence": "jensen_shannon", "beta": math.nan},
    "skew_kl takes 0 <= beta < 1, got 1.0": {"divergence": "skew_kl", "beta": 1.0},
    "skew_reverse_kl takes 0 < beta <= 1, got 0": {"divergence": "skew_reverse_kl", "beta": 0},
    "hard_weight must be finite and not negative, got -1": {"hard_weight": -1, "labels": LABELS},
    "hard_weight 0.5 needs labels": {"hard_weight": 0.5},
    "teacher_floor must be a log-probability, finite and not above 0, got 1": {"teacher_floor": 1},
    "num_items must be finite and not negative, got -3": {"num_items": -3},
    "num_items must be finite and not negative, got nan": {"num_items": math.nan},
    r"num_items must be finite and not negative, got a tensor \(2,\) of torch.int64": {
        "num_items": torch.tensor([1, 2])
    },
    "num_items is the denominator of reduction=\"mean\", which is 'sum' here": {"num_items": 3, "reduction": "sum"},
    "tile_memory must be a positive number of bytes, got 0": {"tile_memory": 0},
    r"labels \(5,\) must be one number per row, \(6,\)": {"labels": LABELS[:5]},
    "labels must be a tensor .*, got list": {"labels": [1, 2]},
    "labels must be int64, got torch.int32": {"labels": LABELS.int()},
    r"label 101 is neither in 0..100 nor ignore_index -100 nor UNLABELED -101": {
        "labels": LABELS + 1,
        "ignore_index": -100,
    },
    "label -1 is neither": {"labels": torch.full((ROWS,), -1)},
    "label -101 is neither in 0..100 nor ignore_index -100$": {
        "teacher": purify(TEACHER, STUDENT, schedule="linear", confidence="target"),
        "labels": torch.full((ROWS,), UNLABELED),
    },
    "label 90 is neither in 0..59 nor ignore_index": {"labels": torch.full((ROWS,), 90), "vocab": 60},
    r"weight \(1,\) must be one number per row, \(6,\)": {"row_weight": torch.ones(1)},
    "weight must be a tensor .*, got 0.5": {"row_weight": 0.5},
    "weight must be floating point, got torch.int64": {"row_weight": torch.ones(ROWS, dtype=torch.int64)},
    "every row_weight must be finite and not negative, got -1": {"row_weight": -torch.ones(ROWS)},
    "every row_weight must be finite and not negative, got nan": {"row_weight": torch.full((ROWS,), math.nan)},
    "vocab must be None, \"common\" or a whole number of tokens, at least 1, got 'least'": {"vocab": "least"},
    "vocab must be .* from 1 to 101, got 102": {"vocab": 102},
    "vocab must be .*, got True": {"vocab": True},
    "vocabularies of 101 and 90 tokens differ": {"teacher": TEACHER[:, :90]},
    "vocabularies of 101 and 0 tokens": {"teacher": TEACHER[:, :0]},
    r"student \(6, 101\) and teacher \(5, 101\) differ in their rows": {"teacher": TEACHER[:5]},
    "teacher must be a tensor of logits or a Head, got dict": {"teacher": {"logits": TEACHER}},
    "teacher must be floating point, got torch.int64": {"teacher": TEACHER.long()},
    "student must be a tensor of logits or a Head, got Purified": {"student": purify(TEACHER, STUDENT)},
    "student must be logits .*, got a number": {"student": torch.tensor(1.0)},
    "student is on cpu but teacher is on meta": {"teacher": TEACHER.to("meta")},
    "labels is on meta but the logits are on cpu": {"labels": LABELS.to("meta")},
    'precision="difference" needs heads on all sides, got Tensor': {"precision": "difference"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_work(message, monkeypatch):
    for name in USABLE:
        monkeypatch.setattr(load(name), "rows", None)  # would raise a TypeError
    with pytest.raises(ValueError, match=message):
        distill_loss(**{"student": STUDENT, "teacher": TEACHER} | BAD[message])
