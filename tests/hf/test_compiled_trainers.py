"""Trainers with torch_compile=True: the loss runs inside the head of the compiled model, and is the same."""

import pytest
import torch
import zoo
from zoo import one_thread  # noqa: F401

from hkdfast.hf import PyramidConfig, PyramidTrainer, SeedTrainer, run_state


def seed(folder, **options):
    config = zoo.config(folder, max_steps=2, per_device_train_batch_size=4, lora_r=4, **options)
    trainer = SeedTrainer(zoo.build("llava"), config, train_dataset=zoo.Rows(zoo.batch("llava", size=8)))
    trainer.train()
    return trainer.state.log_history


def pyramid(folder, **options):
    quiet = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1)
    config = PyramidConfig(str(folder), max_steps=2, per_device_train_batch_size=4, **quiet, **options)
    models = [zoo.build("llava", number) for number in range(2)]
    PyramidTrainer(models, config, train_dataset=zoo.Rows(zoo.batch("llava", size=8, answers=2))).train()
    return run_state.read_done(folder / "stage-1")["history"]


@pytest.mark.slow
@pytest.mark.parametrize("train", [seed, pyramid])
def test_a_compiled_model_learns_the_same(tmp_path, train):
    found = []
    for name, options in (("eager", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "inductor"})):
        torch._dynamo.reset()
        found.append([entry["loss"] for entry in train(tmp_path / name, **options) if "loss" in entry])
    torch._dynamo.reset()
    assert len(found[0]) == 2 and found[0][0] != found[0][1]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
