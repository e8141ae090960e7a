"""A stopped pyramid or refinement resumes to the same losses bit for bit, and nothing of another run."""

import shutil

import pytest
import torch
from coupled_models import LORA, STEPS, batch, chain, logged, pyramid, saved, stage, ternary
from transformers import LlavaForConditionalGeneration
from zoo import Rows, one_thread  # noqa: F401

from hkdfast.ternary import FORMS


@pytest.fixture(scope="module", params=["full", "lora"])
def whole(request, tmp_path_factory):
    """A training of two stages, with dropout, whose every step is kept."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    names = saved(folder, dropout=0.1)
    options = STEPS | (LORA if request.param == "lora" else {})
    trainer = pyramid(folder / "out", names, batch(unlabeled=(1, 5)), **options)
    trainer.train()
    return folder / "out", names, options, trainer


def kept(source, target, stage, steps, done):
    """What a run leaves that is killed in a stage: its checkpoints so far, and stages before."""
    for number in range(1, stage + 1):
        for each in (source / f"stage-{number}").iterdir():
            if number < stage or done or each.name in ["run.json", *(f"checkpoint-{step}" for step in steps)]:
                where = target / f"stage-{number}" / each.name
                where.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(each, where) if each.is_dir() else shutil.copy(each, where)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, steps, done",
    [(1, (1,), False), (1, (1, 2, 3), False), (1, (), True), (2, (1, 2), False), (2, (1, 2, 3), False), (2, (), True)],
    ids=["amid 1", "end of 1", "after 1", "amid 2", "end of 2", "after 2"],
)
def test_a_killed_run_goes_on_to_the_same_losses_bit_for_bit(whole, tmp_path, stage, steps, done):
    folder, names, options, expected = whole
    kept(folder, tmp_path / "out", stage, steps, done)
    # a kill while a checkpoint is written leaves one without a state
    broken = tmp_path / f"out/stage-{stage}/checkpoint-9"
    shutil.copytree(folder / "stage-1/checkpoint-1", broken)
    (broken / "trainer_state.json").unlink()
    stamps = {each: each.stat().st_mtime_ns for each in (tmp_path / "out").glob("stage-1/done.json")}
    trainer = pyramid(tmp_path / "out", names, batch(unlabeled=(1, 5)), **options)
    torch.manual_seed(123)  # whatever ran before
    student = trainer.train(resume_from_checkpoint=True)
    assert logged(trainer.history) == logged(expected.history)
    for ours, theirs in zip(student.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(each.stat().st_mtime_ns == stamp for each, stamp in stamps.items())  # not done again
    assert (tmp_path / "out/stage-2/done.json").is_file()


@pytest.mark.slow
def test_stages_are_not_overwritten_nor_mixed(whole, tmp_path):
    folder, names, options, _ = whole
    kept(folder, tmp_path / "out", 1, (), True)
    with pytest.raises(
        ValueError, match="stage-1 already holds a training run: pass resume_from_checkpoint=True or choose another"
    ):
        pyramid(tmp_path / "out", names, batch(), **options).train()
    other = [names[1], names[0], names[2]]
    with pytest.raises(ValueError, match=r"another run: models was \['.*model-0', '.*model-1'.* is \['.*model-1'"):
        pyramid(tmp_path / "out", other, batch(), **options).train(True)
    for change, told in (
        (dict(stage_weights=0.5), r"stage_weights was \[1.0\] and is \[0.5\]"),
        (dict(learning_rates=[1.0, 2.0, 3.0]), "learning_rates was .* and is .1.0, 2.0. now"),
        (dict(seed=7), "seed was 42 and is 7"),
    ):
        with pytest.raises(ValueError, match=f"stage-1 is another run: {told}"):
            pyramid(tmp_path / "out", names, batch(), **(options | change)).train(True)
    (tmp_path / "out/stage-1/run.json").unlink()
    with pytest.raises(ValueError, match="stage-1 cannot be resumed: it has no run.json"):
        pyramid(tmp_path / "out", names, batch(), **options).train(True)
    with pytest.raises(ValueError, match="nothing to resume: no folder"):
        pyramid(tmp_path / "nowhere", names, batch(), **options).train(True)
    with pytest.raises(ValueError, match="must be True or False, got '.*checkpoint-1'"):
        pyramid(tmp_path / "out", names, batch(), **options).train(str(folder / "stage-1/checkpoint-1"))
    shutil.copytree(folder, tmp_path / "gap")
    shutil.rmtree(tmp_path / "gap/stage-1")
    with pytest.raises(ValueError, match="stage-2 already holds a training run, but .*stage-1 is not finished"):
        pyramid(tmp_path / "gap", names, batch(), **options).train(True)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_refinement_resumes_bit_for_bit(tmp_path, form):
    count = 2 if form == "one_pair" else 3
    options = STEPS | dict(form=form, teachers="trained")
    runs = []
    for folder, resume in (("one", None), ("two", True), ("three", None)):
        trainer = ternary(tmp_path / folder, chain(count, dropout=0.1), batch(unlabeled=(1, 5)), **options)
        if resume:
            shutil.copytree(tmp_path / "one/checkpoint-1", tmp_path / "two/checkpoint-1")
            shutil.copy(tmp_path / "one/run.json", tmp_path / "two")
        torch.manual_seed(len(runs))  # whatever ran before
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    first, *others = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in runs)
    assert others == [first, first] and len(first) == 3
    for run in runs[1:]:
        for ours, theirs in zip(run.model.parameters(), runs[0].model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    other = ternary(tmp_path / "two", chain(count), batch(), **(options | dict(temperature=2.0)))
    with pytest.raises(ValueError, match="two is another run: temperature was 1.0 and is 2.0 now"):
        other.train(resume_from_checkpoint=str(tmp_path / "two/checkpoint-1"))
    with pytest.raises(
        ValueError, match="two already holds a training run: pass resume_from_checkpoint=True or choose another"
    ):
        ternary(tmp_path / "two", chain(count), batch(), **options).train()  # its checkpoints would be taken for this


def test_the_best_checkpoint_ends_a_stage(tmp_path):
    best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rates=[0.0, 0.5])
    models, found = chain(2), batch()
    before = models[1].lm_head.weight.detach().clone()
    trainer = stage(tmp_path, models, found, Rows(batch(seed=5)), **STEPS | best)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert len(losses) == 3 and all(
        "eval_student_divergence" in e for e in trainer.state.log_history if "eval_loss" in e
    )
    step = min(losses, key=losses.get)
    kept = LlavaForConditionalGeneration.from_pretrained(tmp_path / f"checkpoint-{step}/student")
    assert torch.equal(models[1].lm_head.weight, kept.lm_head.weight)
    assert not torch.equal(before, kept.lm_head.weight)
