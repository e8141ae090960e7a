"""Coupled training and evaluation by two processes are those of one."""

import pytest
import torch
import zoo
from coupled_models import batch, chain, logged, pyramid, stage
from test_seed_trainer import Gradients
from zoo import Rows, one_thread  # noqa: F401

from hkdfast.hf import (
    SeedTrainer,
)


def steps_of(folder, **options):
    """Gradients and log of every step of a pyramid of two stages over eight examples, the last two without answers."""
    seen = Gradients()
    trainer = pyramid(folder, chain(), batch(unlabeled=(6, 7)), max_grad_norm=0.0, **options)
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.steps


@pytest.mark.slow
def test_two_processes_are_one_large_batch(tmp_path):
    """An answer that nobody knows is met by one of the processes in some steps, by both or none in others."""
    trainer, expected = steps_of(tmp_path / "one", per_device_train_batch_size=4)
    zoo.two_processes(
        tmp_path,
        """
import test_coupled_processes
trainer, steps = test_coupled_processes.steps_of(FOLDER + "/two", ddp_backend="gloo", per_device_train_batch_size=1,
    gradient_accumulation_steps=2)
if torch.distributed.get_rank() == 0:
    torch.save((steps, trainer.history), FOLDER + "/found.pt")
""",
    )
    found, history = torch.load(tmp_path / "found.pt")
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(grad.abs().max() for grad in theirs.values())
        for name, grad in theirs.items():
            assert (ours[name] - grad).abs().max() <= 1e-3 * scale, name
    for ours, theirs in zip(logged(history), logged(trainer.history), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    ended = sorted(each.name for each in (tmp_path / "two/stage-2").iterdir())
    assert ended == ["done.json", "run.json", "student", "teacher"]


def evaluated(folder, kind, **options):
    """Metrics of five examples, with and without labels, and of as many answers."""
    if kind == "stage":
        found = batch(size=5, unlabeled=(1,))
        return stage(folder, chain(2), found, **options).evaluate(Rows(found))
    found = zoo.batch(size=5, answers=2 if kind == "labels" else None)
    return SeedTrainer(zoo.build("llava"), zoo.config(folder, **options)).evaluate(Rows(found))


KINDS = ("prompts", "labels", "stage")


@pytest.mark.slow
def test_an_evaluation_by_two_processes_counts_each_example_once(tmp_path):
    """Of five examples in batches of two, one process gets three and the other two: the last batches are filled up."""
    zoo.two_processes(
        tmp_path,
        """
import test_coupled_processes as tests
found = {kind: tests.evaluated(f"{FOLDER}/{kind}", kind, ddp_backend="gloo", per_device_eval_batch_size=2)
    for kind in tests.KINDS}
if torch.distributed.get_rank() == 0:
    torch.save(found, FOLDER + "/found.pt")
""",
    )
    found = torch.load(tmp_path / "found.pt")
    for kind in KINDS:
        expected = evaluated(tmp_path / "one" / kind, kind, per_device_eval_batch_size=5)
        names = [name for name in expected if not name.endswith(("runtime", "per_second", "preparation_time"))]
        assert len(names) > 4
        for name in names:
            assert found[kind][name] == pytest.approx(expected[name], rel=1e-4), (kind, name)
