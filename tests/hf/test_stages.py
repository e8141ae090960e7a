"""The chain of a pyramid: models in memory, folders and adapters of stages, and what a refinement saves."""

import gc
import weakref

import peft
import pytest
import torch
import transformers as hf
import zoo
from coupled_models import (
    LORA,
    STEPS,
    batch,
    chain,
    pyramid,
    saved,
    ternary,
)
from transformers import LlavaForConditionalGeneration
from zoo import Rows, one_thread  # noqa: F401

from hkdfast.hf import (
    family,
)


class Memory:
    """Stands in for load_model: how many models live when the next is loaded."""

    def __init__(self, load):
        self.load, self.made, self.living = load, [], []

    def __call__(self, name, dtype):
        self.living.append(sum(ref() is not None for ref in self.made))
        model = self.load(name, dtype)
        self.made.append(weakref.ref(model))
        return model


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["concurrent", "frozen"])
def test_two_models_of_the_chain_are_in_memory(tmp_path, monkeypatch, mode):
    names = [*saved(tmp_path), *saved(tmp_path / "more", 1)]
    memory = Memory(family.load_model)
    monkeypatch.setattr("hkdfast.hf.pyramid.load_model", memory)
    # autocast is put into a model's own forward, which then holds the model
    trainer = pyramid(tmp_path / "out", names, batch(), max_steps=1, mode=mode, bf16=True)
    gc.disable()  # what is free at the next load must not be luck
    try:
        trainer.train()
    finally:
        gc.enable()
    assert memory.living == [0, 1, 1, 1]
    gc.collect()
    assert [ref() is trainer.model for ref in memory.made] == [False, False, False, True]
    assert [ref() is None for ref in memory.made] == [True, True, True, False]


@pytest.mark.slow
def test_every_finished_model_is_an_ordinary_folder(tmp_path):
    names = saved(tmp_path)
    trainer = pyramid(tmp_path / "out", names, batch(), stage_epochs=[1, 2], max_steps=-1, stage_weights=[1.0, 0.5])
    student = trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("final", "out/stage-2/student"):
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / folder)
        hf.AutoProcessor.from_pretrained(tmp_path / folder)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))
    assert [entry["stage"] for entry in trainer.history if "loss" in entry] == [1] * 2 + [2] * 4
    first, second = (LlavaForConditionalGeneration.from_pretrained(tmp_path / f"out/stage-{k}/{role}")
                     for k, role in ((1, "student"), (2, "teacher")))  # fmt: skip
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)  # it went on learning as a teacher


@pytest.mark.slow
def test_a_frozen_teacher_does_not_change_and_is_not_saved_again(tmp_path):
    names = saved(tmp_path)
    trainer = pyramid(tmp_path / "out", names, batch(), mode="frozen")
    trainer.train()
    assert sorted(each.name for each in (tmp_path / "out/stage-2").iterdir()) == ["done.json", "run.json", "student"]
    assert not any("teacher_cross_entropy" in entry for entry in trainer.history)


@pytest.mark.slow
def test_adapters_are_trained_and_the_weights_below_stay(tmp_path):
    names = saved(tmp_path)
    student = pyramid(tmp_path / "out", names, batch(), max_steps=3, **LORA).train()
    found = zoo.batch(seed=9)
    for folder, base in (("stage-1/teacher", names[0]), ("stage-2/teacher", names[1]), ("stage-2/student", names[2])):
        below = LlavaForConditionalGeneration.from_pretrained(base).eval()
        before = below(**found).logits
        loaded = peft.PeftModel.from_pretrained(below, tmp_path / "out" / folder).eval()
        assert not torch.allclose(loaded(**found).logits, before, atol=1e-3), folder
        assert peft.PeftConfig.from_pretrained(tmp_path / "out" / folder).base_model_name_or_path == base
    assert torch.allclose(loaded(**found).logits, student.eval()(**found).logits, atol=1e-5)
    # and an adapter can be refined as it is
    refined = ternary(
        tmp_path / "on", [names[0], names[1], str(tmp_path / "out/stage-2/student")], batch(), max_steps=1
    )
    refined.train()
    refined.save_model(str(tmp_path / "refined"))
    again = peft.PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(names[2]), tmp_path / "refined"
    )
    with torch.no_grad():
        assert not torch.allclose(again.eval()(**found).logits, student(**found).logits, atol=1e-4)


def test_one_configuration_makes_adapters_of_all_models(tmp_path):
    """PEFT writes a model's name into the configuration that its adapter is made of."""
    names, config = saved(tmp_path), peft.LoraConfig(r=2, target_modules=["q_proj"])
    pyramid(tmp_path / "out", names, batch(), peft_config=config, max_steps=1).train()
    assert config.base_model_name_or_path is None
    for folder, name in zip(("stage-1/teacher", "stage-2/teacher", "stage-2/student"), names, strict=True):
        assert family.base_of(tmp_path / "out" / folder) == name, folder


@pytest.mark.slow
def test_adapters_know_their_models_from_everywhere(tmp_path, monkeypatch):
    saved(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    first = pyramid("first", ["model-0", "model-1"], batch(), lora_r=2).train()
    second = pyramid("second", ["first/stage-1/teacher", "first/stage-1/student"], batch()).train()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name, trained in (("first", first), ("second", second)):
        loaded = family.load_model(f"../{name}/stage-1/student")
        for ours, theirs in zip(loaded.parameters(), trained.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_an_adapter_is_known_by_its_hub_name(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--zoo--adapter/snapshots/abc"
    peft.LoraConfig(base_model_name_or_path="zoo/base").save_pretrained(snapshot)
    (tmp_path / "models--zoo--adapter/refs").mkdir()
    (tmp_path / "models--zoo--adapter/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert family.is_adapter("zoo/adapter") and family.base_of("zoo/adapter") == "zoo/base"
    assert not family.is_adapter("zoo/nothing") and family.base_of("zoo/nothing") == "zoo/nothing"


def test_checkpoints_go_when_their_stage_is_finished(tmp_path):
    found = dict(STEPS, max_steps=1, keep_checkpoints=False)
    student = pyramid(tmp_path, chain(2), batch(), **found).train()
    assert not list(tmp_path.glob("stage-1/checkpoint-*"))
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stage-1/student")
    assert torch.equal(loaded.lm_head.weight, student.lm_head.weight)


def test_a_refinement_saves_its_student_or_all_that_are_mutual(tmp_path):
    models = chain()
    trainer = ternary(tmp_path / "run", models, batch(), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded.lm_head.weight, models[2].lm_head.weight)
    assert not any(parameter.requires_grad for model in models[:2] for parameter in model.parameters())
    trainer = ternary(tmp_path / "run2", chain(), batch(), max_steps=1, form="mutual")
    trainer.save_model(str(tmp_path / "all"))
    assert sorted(each.name for each in (tmp_path / "all").iterdir()) == ["model1", "model2", "model3"]
