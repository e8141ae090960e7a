"""The option list is in LossOptions: what repeats it for users, type checkers and the docs repeats it exactly."""

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from hkdfast import Head, contrast, coupled_loss, distill_loss, pyramid, ternary
from hkdfast.engine.options import BatchKeywords, LossKeywords, LossOptions
from hkdfast.losses import MODULE_OPTIONS, DistillLoss

OPTIONS = {field.name: field.default for field in fields(LossOptions)}
OWN = {  # parameters that are not options
    distill_loss: ("student", "teacher", "divergence", "beta", "divergence_weight", "hard_weight"),
    coupled_loss: ("heads", "coupling", "hard_weight"),
}
DOCS = Path(__file__).parents[2] / "docs"
TRAINERS = ("SeedTrainer", "PyramidTrainer", "TernaryTrainer", "DistillTrainer")


def defaults(function):
    return {name: one.default for name, one in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("loss", OWN)
def test_a_loss_has_every_option_in_order_with_its_default(loss):
    found = {name: default for name, default in defaults(loss).items() if name not in OWN[loss]}
    assert list(found.items()) == list(OPTIONS.items())
    assert set(OWN[loss]) <= set(defaults(loss))


@pytest.mark.parametrize("loss", OWN)
def test_an_option_reaches_the_list_under_its_own_name(loss, monkeypatch):
    """LossOptions is made by position in both functions."""
    seen = {}

    def spy(*args):
        seen.update(zip(OPTIONS, args, strict=True))
        raise InterruptedError

    monkeypatch.setattr("hkdfast.losses.LossOptions", spy)
    head = Head(torch.zeros(1, 1), torch.zeros(2, 1))
    args = (head, head) if loss is distill_loss else ([head, head], [[0, 1], [0, 0]])
    # teacher_floor is read before the list is made
    given = {name: name for name in OPTIONS}
    with pytest.raises(InterruptedError):
        loss(*args, **given)
    assert seen == given


def test_contrast_and_the_options_of_seed_have_the_same_defaults():
    for name, default in defaults(contrast).items():
        assert name == "purified" or default == OPTIONS[name], name


def test_type_checkers_know_every_option():
    assert set(get_type_hints(LossKeywords)) == set(OPTIONS) - {"return_metrics"}
    assert set(get_type_hints(BatchKeywords)) < set(get_type_hints(LossKeywords))


def test_the_module_takes_every_option_but_those_of_a_batch():
    batch = set(defaults(DistillLoss.forward)) - {"self", "student", "teacher"}
    assert set(MODULE_OPTIONS) == {"beta", "divergence_weight", "hard_weight"} | set(OPTIONS) - batch
    for name in MODULE_OPTIONS:
        assert re.search(rf"\b{name}\b", DistillLoss.__doc__), name


@pytest.mark.parametrize("method", [pyramid, ternary], ids=["pyramid", "ternary"])
def test_a_method_documents_the_options_that_it_hands_over(method):
    listed = re.search(r"        options: (.*?)\n\n", method.loss.__doc__, re.S)[1]
    for name in set(get_type_hints(BatchKeywords)) - {"split"}:
        assert re.search(rf"\b{name}\b", listed), name


def test_configs_have_the_options_with_their_defaults():
    configs = pytest.importorskip("hkdfast.hf.configs")
    from hkdfast.hf import DistillConfig, PyramidConfig, SeedConfig, TernaryConfig

    for config in (SeedConfig, PyramidConfig, TernaryConfig, DistillConfig):
        for name in set(OPTIONS) & set(config.__dataclass_fields__) - {"vocab"}:  # heads of a family are padded
            field = config.__dataclass_fields__[name]
            assert field.default is not MISSING and field.default == OPTIONS[name], (config.__name__, name)
        assert {"temperature", "teacher_floor", "precision", "tile_memory", "backend"} <= set(
            config("out", use_cpu=True).loss_options()
        )
    assert set(configs.LOSS) >= set(OPTIONS)


def test_trainers_list_the_same_arguments_of_trainer():
    hf = pytest.importorskip("hkdfast.hf")
    from transformers import Trainer

    shared = {"data_collator", "train_dataset", "eval_dataset", "processing_class"}
    for name in TRAINERS:
        found = defaults(getattr(hf, name).__init__)
        assert [each for each in found if each in shared | {"peft_config"}] == [
            "data_collator",
            "train_dataset",
            "eval_dataset",
            "processing_class",
            "peft_config",
        ]
        assert all(found[each] is None for each in (*shared, "peft_config", "args"))
        assert list(found)[-1] == "others"
    assert shared <= set(defaults(Trainer.__init__))


@pytest.mark.skipif(not DOCS.exists(), reason="not a checkout")
def test_the_docs_explain_every_option():
    text = (DOCS / "losses.md").read_text()
    for name in OPTIONS:
        assert re.search(rf"`{name}\b", text), name
