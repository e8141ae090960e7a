"""purify as a teacher and contrast for decoding: what the words mean, against float64 and a plain VCD."""

import math
import re

import pytest
import torch
from truth import FAST, USABLE, exactly, off, with_gradients

from hkdfast import DIVERGENCES, Head, contrast, distill_loss, purify

N, V = 5, 120


def draw(*shape, seed=0, spread=3.0, dtype=torch.float32):
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def branches(dtype=torch.float32, spread=2.0):
    student, clean, other = (draw(N, V, seed=seed, spread=spread) for seed in range(3))
    return [x.to(dtype) for x in (student, clean, clean + 0.5 * other)]


def vcd(clean, noisy, alpha, beta):
    """Contrastive decoding as VCD publishes it, on raw logits: log-probabilities, -inf outside the plausible words."""
    z = (1 + alpha) * clean - alpha * noisy
    cutoff = math.log(beta) + clean.amax(-1, keepdim=True) if beta else -math.inf
    return z.masked_fill(clean < cutoff, -math.inf).log_softmax(-1)


LAWS = {
    "constant": {"alpha": 1.5},
    "linear": {"alpha": 4.0, "schedule": "linear"},
    "gate": {"alpha": 2.0, "schedule": "gate", "threshold": 0.3},
    "entropy": {"alpha": 3.0, "schedule": "linear", "confidence": "entropy"},
    "target": {"alpha": 3.0, "schedule": "gate", "confidence": "target", "threshold": 0.05},
    "per row": {"alpha": torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0])},
    "subtract": {"alpha": 0.6, "mode": "subtract"},
    "plausible": {"alpha": 1.0, "plausibility": 0.1},
    "dropped": {"alpha": 1.0, "plausibility": 0.1, "outside": "drop"},
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", FAST)
def test_every_law_in_the_loss(backend, divergence, law):
    student, clean, noisy = branches()
    labels = torch.arange(N) * 7
    floor = {"teacher_floor": -30.0} if law == "dropped" else {}
    options = dict(labels=labels, temperature=2.0, **floor)
    teacher = purify(clean, noisy, **LAWS[law])
    got = with_gradients(distill_loss, student, teacher, divergence, backend=backend, **options)
    for ours, exact in zip(got, exactly(student, teacher, divergence, **options), strict=True):
        assert off(ours, exact) < 5e-6


@pytest.mark.parametrize("backend", USABLE)
def test_the_contrast_is_by_hand_what_the_docstring_says(backend):
    clean, noisy, a = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.3, 0.3, 0.4]]), 0.5
    for mode, gain in (("extrapolate", 1 + a), ("subtract", 1.0)):
        by_hand = clean.double() ** gain / noisy.double() ** a
        teacher = purify(clean.log(), noisy.log(), a, mode=mode)
        got = contrast(teacher, backend=backend).exp().double()
        torch.testing.assert_close(got, by_hand / by_hand.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", USABLE)
def test_weights_follow_the_confidence_of_the_clean_branch(backend):
    student, clean, noisy = branches()
    p, labels = clean.double().softmax(-1), torch.arange(N) * 7
    confidences = {
        "max_prob": p.amax(-1),
        "entropy": 1 + (p * p.log()).sum(-1) / math.log(V),
        "target": p.gather(-1, labels[:, None]).squeeze(-1),
    }
    for confidence, sure in confidences.items():
        threshold = sure.median().item() + 1e-6
        laws = {
            "constant": torch.full_like(sure, 2.0),
            "linear": 2 * (1 - sure),
            "gate": 2 * (sure < threshold).double(),
        }
        for weight, expected in laws.items():
            teacher = purify(clean, noisy, 2.0, schedule=weight, confidence=confidence, threshold=threshold)
            _, metrics = distill_loss(student, teacher, labels=labels, return_metrics=True, backend=backend)
            torch.testing.assert_close(metrics["contrast_weight"].double(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(metrics["confidence"].double(), sure, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", USABLE)
def test_alpha_zero_is_the_plain_teacher(backend):
    student, clean, noisy = branches()
    plain = with_gradients(distill_loss, student, clean, backend=backend)
    for law in ({"alpha": 0.0}, {"alpha": torch.zeros(N)}, {"alpha": 3.0, "schedule": "gate", "threshold": 0.0}):
        got = with_gradients(distill_loss, student, purify(clean, noisy, **law), backend=backend)
        for ours, theirs in zip(got, plain, strict=True):
            assert off(ours, theirs.double()) < 2e-6


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("backend", FAST)
def test_a_shift_of_any_branch_changes_nothing(backend, law):
    """Multiples of 1/8 stay exact under a shift by 64."""
    student, clean, noisy = (x.mul(8).round().div(8) for x in branches())
    labels, options = torch.arange(N), {"teacher_floor": -30.0, "backend": backend}
    plain = with_gradients(distill_loss, student, purify(clean, noisy, **LAWS[law]), labels=labels, **options)
    for a, b in ((64.0, 0.0), (0.0, 64.0), (-32.0, 64.0)):
        teacher = purify(clean + a, noisy + b, **LAWS[law])
        for ours, theirs in zip(
            with_gradients(distill_loss, student, teacher, labels=labels, **options), plain, strict=True
        ):
            assert off(ours, theirs.double()) < 2e-6


def test_alpha_of_each_row_is_its_own():
    student, clean, noisy = branches()
    alpha = LAWS["per row"]["alpha"]
    rows = distill_loss(student, purify(clean, noisy, alpha), reduction="none")
    for row, a in zip(range(N), alpha, strict=True):
        one = distill_loss(student[row : row + 1], purify(clean[row : row + 1], noisy[row : row + 1], a))
        torch.testing.assert_close(rows[row], one)
    grid = [x.view(1, N, V) for x in (student, clean, noisy)]
    shaped = distill_loss(grid[0], purify(grid[1], grid[2], alpha.half().view(1, N)), reduction="none")
    assert torch.equal(shaped[0], rows)


@pytest.mark.parametrize("backend", FAST)
def test_several_draws_are_averaged_as_logits(backend):
    """Of logits, of heads of one weight (whose hidden states are averaged), and under a softcap (whose are not)."""
    student, clean, _ = branches()
    weight, hiddens = draw(V, 16, spread=0.7), [draw(N, 16, seed=seed, spread=1.0) for seed in range(4)]
    for draws in (
        [hidden @ weight.T for hidden in hiddens],
        [Head(hidden, weight, scale=1.5) for hidden in hiddens],
        [Head(hidden, weight, scale=1.5, softcap=3.0) for hidden in hiddens],
        [hiddens[0] @ weight.T, Head(hiddens[1], weight, scale=0.5)],
    ):
        got = with_gradients(distill_loss, student, purify(clean, draws, 1.5), backend=backend)
        for ours, exact in zip(got, exactly(student, purify(clean, draws, 1.5)), strict=True):
            assert off(ours, exact) < 5e-6
    one = distill_loss(student, purify(clean, draws[:1], 1.5), backend=backend)
    assert torch.equal(one, distill_loss(student, purify(clean, draws[0], 1.5), backend=backend))


@pytest.mark.parametrize("backend", USABLE)
def test_outside_the_plausible_set_clean_keeps_the_clean_log_probability(backend):
    _, clean, noisy = branches()
    log_clean = clean.double().log_softmax(-1)
    inside = log_clean >= math.log(0.1) + log_clean.amax(-1, keepdim=True)
    got = contrast(purify(clean, noisy, 2.0, plausibility=0.1), backend=backend).double()
    torch.testing.assert_close(got[~inside], log_clean[~inside], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        got.exp().where(inside, 0).sum(-1), log_clean.exp().where(inside, 0).sum(-1), rtol=1e-6, atol=1e-6
    )
    assert (got - log_clean)[inside].abs().max() > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", [None, *USABLE])
def test_contrast_is_vcd(backend, dtype, beta):
    _, clean, noisy = branches(dtype)
    if dtype == torch.float64 and backend not in (None, "reference"):
        pytest.skip("float64 runs on the reference")
    got = contrast(purify(clean, noisy, 1.0, plausibility=beta, outside="drop"), backend=backend)
    exact = vcd(clean.double(), noisy.double(), 1.0, beta)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(got.isinf(), exact.isinf()) and got.argmax(-1).equal(exact.argmax(-1))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=2e-6)
    assert not got.requires_grad


@pytest.mark.parametrize("wide", [0, 1])
def test_contrast_is_as_wide_as_its_widest_branch(wide):
    _, clean, noisy = branches(torch.float32)
    two = [clean, noisy]
    two[wide] = two[wide].double()
    got = contrast(purify(*two, 1.0))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, vcd(clean.double(), noisy.double(), 1.0, 0.0))
    compiled = torch.compile(lambda a, b: contrast(purify(a, b, 1.0)), fullgraph=True, backend="aot_eager")
    assert compiled(*two).dtype == torch.float64


@pytest.mark.parametrize("backend", USABLE)
def test_of_one_word_every_measure_is_sure(backend):
    clean, noisy = draw(4, 1, seed=1), draw(4, 1, seed=2)
    for measure in ("max_prob", "entropy", "target"):
        teacher = purify(clean, noisy, 1.0, schedule="linear", confidence=measure)
        labels = torch.zeros(4, dtype=torch.int64)
        loss, metrics = distill_loss(clean + 1, teacher, labels=labels, return_metrics=True, backend=backend)
        assert loss == 0 and metrics["confidence"].tolist() == [1.0] * 4
        assert contrast(teacher, labels=labels, backend=backend).tolist() == [[0.0]] * 4


@pytest.mark.parametrize("backend", FAST)
def test_contrast_of_heads_in_blocks_with_labels_and_words(backend):
    clean, noisy = (Head(draw(6, 8, seed=s, spread=1.0), draw(V, 8, seed=s + 5), scale=0.5) for s in (0, 1))
    rows = [one.hidden.double() @ one.weight.double().T * 0.5 for one in (clean, noisy)]
    words, t = 100, 0.7
    exact = vcd(*(x[:, :words].log_softmax(-1) for x in rows), 2.0, 0.0)
    exact = (2.0 * 0 + exact / t).log_softmax(-1)
    shaped = [Head(one.hidden.view(2, 3, 8), one.weight, scale=0.5) for one in (clean, noisy)]
    got = contrast(purify(*shaped, 2.0), temperature=t, vocab=words, tile_memory=2500, backend=backend)
    assert got.shape == (2, 3, words)
    torch.testing.assert_close(got.view(6, words).double(), exact, rtol=1e-5, atol=1e-5)
    teacher = purify(*shaped, 2.0, schedule="linear", confidence="target")
    labels = torch.zeros(2, 3, dtype=torch.int64)
    sure = rows[0].softmax(-1)[:, 0]
    expected = torch.stack([vcd(a, b, 2 * (1 - c), 0.0) for a, b, c in zip(*rows, sure, strict=True)])
    torch.testing.assert_close(
        contrast(teacher, labels=labels, backend=backend).view(6, V).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_the_plausible_words_of_a_masked_branch():
    """-inf in the clean branch stays -inf; a word that the disturbed branch alone masks keeps its clean weight."""
    _, clean, noisy = branches()
    clean[:, 3], noisy[:, 3:5] = -math.inf, -math.inf
    got = contrast(purify(clean, noisy, 1.0))
    assert got[:, 3].eq(-math.inf).all() and got[:, 4].isfinite().all()
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(N))


@pytest.mark.parametrize("divergence, beta", [("reverse_kl", 0.5), ("skew_reverse_kl", 1.0)])
def test_dropped_words_and_a_divergence_that_is_infinite_there_need_a_floor(divergence, beta):
    student, clean, noisy = branches()
    teacher = purify(clean, noisy, plausibility=0.1, outside="drop")
    with pytest.raises(ValueError, match="reverse_kl to a teacher that drops tokens is infinite: set teacher_floor"):
        distill_loss(student, teacher, divergence, beta=beta)
    assert distill_loss(student, teacher, divergence, beta=beta, teacher_floor=-30).isfinite()
    assert distill_loss(student, teacher, "skew_reverse_kl", beta=0.5).isfinite()
    assert distill_loss(student, purify(clean, noisy, plausibility=0.1), divergence, beta=beta).isfinite()


CLEAN, NOISY = branches()[1:]
BAD = {
    "unknown schedule 'cosine', expected one of constant, linear, gate": {"schedule": "cosine"},
    "unknown confidence 'margin', expected one of max_prob, entropy, target": {"confidence": "margin"},
    "unknown mode 'add', expected one of extrapolate, subtract": {"mode": "add"},
    "unknown outside 'keep', expected one of clean, drop": {"outside": "keep"},
    "alpha must be finite and not negative, got -1": {"alpha": -1},
    "alpha must be finite and not negative, got nan": {"alpha": math.nan},
    "threshold must be between 0 and 1, got 2": {"threshold": 2},
    "plausibility must be between 0 and 1, got nan": {"plausibility": math.nan},
    "noisy is an empty list": {"noisy": []},
    "noisy must be a tensor of logits or a Head, got None": {"noisy": None},
    "clean must be a tensor of logits or a Head, got Purified": {"clean": purify(CLEAN, NOISY)},
    "noisy must be floating point, got torch.int64": {"noisy": [NOISY, NOISY.long()]},
    "clean (5, 120) and noisy (4, 120) differ in their rows": {"noisy": NOISY[:4]},
    "clean is on cpu but noisy is on meta": {"noisy": NOISY.to("meta")},
    "alpha (4,) must be one number per row, (5,)": {"alpha": torch.ones(4)},
    "every alpha must be finite and not negative, got -1": {"alpha": -torch.ones(N)},
    "schedule must be \"constant\", got 'gate'": {"alpha": torch.ones(N), "schedule": "gate"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_of_purify(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        purify(**{"clean": CLEAN, "noisy": NOISY} | BAD[message])


BAD_CONTRAST = {
    "contrast takes the result of purify, got a tensor": (CLEAN, {}),
    "temperature must be positive and finite, got -1": (purify(CLEAN, NOISY), {"temperature": -1}),
    'precision="difference" needs a student': (purify(CLEAN, NOISY), {"precision": "difference"}),
    "tile_memory must be a positive number of bytes, got -1": (purify(CLEAN, NOISY), {"tile_memory": -1}),
    "vocabularies of 120 and 100 tokens differ": (purify(CLEAN, NOISY[:, :100]), {}),
    'confidence "target" needs labels': (purify(CLEAN, NOISY, schedule="gate", confidence="target"), {}),
    "labels (4,) must be one number per row, (5,)": (purify(CLEAN, NOISY), {"labels": torch.zeros(4).long()}),
    "label 120 is neither in 0..119 nor ignore_index": (purify(CLEAN, NOISY), {"labels": torch.full((N,), 120)}),
}


@pytest.mark.parametrize("message", BAD_CONTRAST)
def test_bad_input_of_contrast(message):
    purified, options = BAD_CONTRAST[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        contrast(purified, **options)


def test_a_target_without_labels_is_refused_by_the_loss():
    with pytest.raises(ValueError, match='confidence "target" needs labels'):
        distill_loss(CLEAN, purify(CLEAN, NOISY, schedule="linear", confidence="target"))
