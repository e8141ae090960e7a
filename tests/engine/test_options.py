"""The option list: DistillLoss, options by the names of version 0.1, and Head.from_linear."""

import dataclasses
import inspect
import pickle
from typing import get_type_hints

import pytest
import torch
from truth import with_gradients

import hkdfast
from hkdfast import DistillLoss, Head, contrast, coupled_loss, distill_loss, purify, pyramid, ternary
from hkdfast.batch import answer_rows
from hkdfast.engine.options import LossKeywords, LossOptions
from hkdfast.losses import BATCH_OPTIONS, MODULE_OPTIONS


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER, LABELS = draw(5, 17), draw(5, 17, seed=1), torch.tensor([3, -100, 16, 0, 8])


@pytest.mark.parametrize(
    "divergence, options, batch",
    [
        ("forward_kl", {}, {}),
        ("reverse_kl", {"temperature": 2.0, "t_squared": True}, {"row_weight": torch.linspace(0, 2, 5)}),
        ("jensen_shannon", {"beta": 0.3, "hard_weight": 0.5}, {"labels": LABELS, "num_items": 7}),
        ("skew_kl", {"beta": 0, "reduction": "none", "vocab": 11}, {}),
        ("total_variation", {"hard_weight": 2.0, "ignore_index": 3, "reduction": "sum"}, {"labels": LABELS.abs() % 17}),
    ],
)
@pytest.mark.parametrize("heads", [False, True])
def test_the_module_is_the_function(divergence, options, batch, heads):
    student = Head(draw(5, 6), draw(17, 6, seed=2)) if heads else STUDENT
    module = DistillLoss(divergence, **options)
    value, *grads = with_gradients(lambda s, t: module(s, t, **batch), student, TEACHER)
    every = options | batch
    expected, *others = with_gradients(lambda s, t: distill_loss(s, t, divergence, **every), student, TEACHER)
    assert torch.equal(value, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True) if a is not None) and grads[0].any()


def test_the_module_returns_metrics_and_is_shown_pickled_and_compiled():
    module = DistillLoss("reverse_kl", temperature=2.0, return_metrics=True)
    loss, metrics = module(STUDENT, TEACHER)
    assert metrics.keys() == distill_loss(STUDENT, TEACHER, return_metrics=True)[1].keys()
    assert repr(module) == "DistillLoss('reverse_kl', temperature=2.0, return_metrics=True)"
    assert torch.equal(pickle.loads(pickle.dumps(module))(STUDENT, TEACHER)[0], loss)
    assert not list(module.parameters())
    compiled = torch.compile(DistillLoss("skew_kl", beta=0, temperature=2.0), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(STUDENT, TEACHER), distill_loss(STUDENT, TEACHER, temperature=2.0))


@pytest.mark.parametrize(
    "error, match, options",
    [
        (ValueError, "unknown divergence 'kl', expected one of forward_kl", {"divergence": "kl"}),
        (ValueError, "skew_kl takes 0 <= beta < 1, got 1", {"divergence": "skew_kl", "beta": 1}),
        (ValueError, "hard_weight must be finite and not negative, got -1", {"hard_weight": -1}),
        (ValueError, "temperature must be positive and finite, got 0", {"temperature": 0}),
        (ValueError, "unknown precision 'half', expected one of float32", {"precision": "half"}),
        (ValueError, "vocab must be None, .*, got 0", {"vocab": 0}),
        (ValueError, "unknown backend 'gpu'", {"backend": "gpu"}),
        (TypeError, "labels changes with the batch: pass it to the call", {"labels": LABELS}),
        (TypeError, "no option 'tiles': it is called precision now", {"tiles": "float32"}),
        (
            TypeError,
            "no option 'temprature': expected some of beta, divergence_weight, hard_weight, temperature",
            {"temprature": 1.0},
        ),
    ],
)
def test_the_module_checks_its_options_when_it_is_made(error, match, options):
    with pytest.raises(error, match=match):
        DistillLoss(**options)


def test_every_option_of_the_losses_is_in_the_one_list():
    options = {field.name: field.default for field in dataclasses.fields(LossOptions)}
    for loss in (distill_loss, coupled_loss):
        parameters = inspect.signature(loss).parameters
        assert {name: parameters[name].default for name in options} == options
    others = {"student", "teacher", "divergence", *BATCH_OPTIONS}
    assert set(inspect.signature(distill_loss).parameters) - others == set(MODULE_OPTIONS)


def test_the_keywords_for_type_checkers_are_the_fields_of_the_one_list():
    fields = {field.name: field.type for field in dataclasses.fields(LossOptions)}
    assert get_type_hints(LossKeywords) | {"return_metrics": bool} == fields


OLD = {
    "it is called row_weight now": lambda: distill_loss(STUDENT, TEACHER, weight=torch.ones(5)),
    "it is called precision now": lambda: distill_loss(STUDENT, TEACHER, tiles="float32"),
    "it is called tile_memory now": lambda: coupled_loss([STUDENT], [[None]], memory=2**20),
    "it is called return_metrics now": lambda: coupled_loss([STUDENT], [[None]], metrics=True),
    "it is called teacher_floor now": lambda: distill_loss(STUDENT, TEACHER, floor=-30),
    r"purify\(\) has no option 'weight': it is called schedule now": lambda: purify(STUDENT, TEACHER, weight="linear"),
    r"contrast\(\) has no option 'tiles'": lambda: contrast(purify(STUDENT, TEACHER), tiles="float32"),
    "it is called divergence_weight now": lambda: pyramid.loss([None, None], {}, weight=1.0),
    r"coupling\(\) has no option 'weight'": lambda: ternary.coupling(weight=1.0),
    "it is called teacher_coupling now": lambda: ternary.loss([None] * 3, {}, between=1.0),
    "it is called unlabeled_weight now": lambda: ternary.loss([None] * 3, {}, unlabelled_weight=1.0),
}


@pytest.mark.parametrize("match", OLD)
def test_an_option_by_its_old_name_is_refused_by_the_new_one(match):
    with pytest.raises(TypeError, match=match):
        OLD[match]()


@pytest.mark.parametrize(
    "config, old, new",
    [
        ("SeedConfig", "weight", "alpha_schedule"),
        ("SeedConfig", "floor", "teacher_floor"),
        ("PyramidConfig", "frozen", "freeze"),
        ("PyramidConfig", "unlabelled_weight", "unlabeled_weight"),
        ("TernaryConfig", "between", "teacher_coupling"),
        ("TernaryConfig", "source_weights", "teacher_weights"),
    ],
)
def test_a_config_refuses_old_names(config, old, new, tmp_path):
    pytest.importorskip("transformers")
    made = getattr(hkdfast, config)
    assert new in {field.name for field in dataclasses.fields(made)}
    with pytest.raises(TypeError, match=rf"{config}\(\) has no option '{old}': it is called {new} now"):
        made(output_dir=tmp_path, **{old: 1.0})


@pytest.mark.parametrize("key", "distil_only distll_only distillonly Distill_only distill-only idstill_only".split())
def test_a_key_of_a_batch_that_is_nearly_ours_is_refused(key):
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "labels": torch.tensor([[-100, 2, -100]])}
    with pytest.raises(ValueError, match=f"no key 'distill_only' but one like it, '{key}'"):
        answer_rows({**batch, key: torch.tensor([[False, False, True]])})


def test_other_keys_of_a_batch_are_left_alone():
    ids = torch.ones(1, 3, dtype=torch.int64)
    others = "pixel_values pixel_attention_mask token_type_ids soft_labels cross_attention_mask image_grid_thw".split()
    rows, labels = answer_rows({"input_ids": ids, "labels": ids, "label": ids, **dict.fromkeys(others)})
    assert rows.tolist() == [[True, True, False]] and labels.tolist() == [1, 1]


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_is_made_of_a_linear_layer(bias):
    layer, hidden = torch.nn.Linear(6, 17, bias=bias), draw(2, 3, 6)
    loss = distill_loss(Head.from_linear(hidden, layer, softcap=4.0), draw(2, 3, 17))
    loss.backward()
    expected = distill_loss(4 * torch.tanh(layer(hidden) / 4), draw(2, 3, 17))
    torch.testing.assert_close(loss, expected)
    assert layer.weight.grad.any() and (layer.bias.grad.any() if bias else layer.bias is None)
    with pytest.raises(ValueError, match="lm_head must be a torch.nn.Linear, got Embedding"):
        Head.from_linear(hidden, torch.nn.Embedding(17, 6))
