"""The study of SEED."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hkd import export
from hkdfast.evaluate.pope import score
from seed import study
from seed.bases import BASES, load
from seed.command import cells, parts
from seed.study import SECOND, TRAINED, Exam, cell_file, yes_no
from seed.table import SPLITS, equal_yes_rate, margin, marked, meaning, shifted, text, tuned_shift
from world.questions import prompts
from world.scenes import pictures
from world.tinyllava import ask, prompt, question

pytestmark = pytest.mark.study


@pytest.fixture(scope="module")
def base():
    return load("seed1")


def asked(processor):
    """A batch about two images, and the prompt as the chat template writes it."""
    images = [Image.fromarray(image) for image in pictures(2, np.random.default_rng(3))[0]]
    texts = [prompt(question(index)) for index in (4, 30)]
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question(4)}]}]
    batch = processor(images=images, text=texts, return_tensors="pt", padding=True)
    return batch, processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("name", ["bases/seed1", "bases/seed2", "bases/seed3"])
def test_an_ordinary_folder_holds_the_model_that_the_study_loads(name, tmp_path):
    model, processor = export.load(name)
    folder = BASES / "seed1"  # which is stored as one
    if name != "bases/seed1":
        folder = tmp_path
        export.write(name, folder)
    found, ordinary = AutoProcessor.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder)
    assert found.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    (ours, text), (theirs, same) = asked(processor), asked(found)
    assert text == same and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    state = ordinary.state_dict()
    assert state.keys() == model.state_dict().keys() and {weight.dtype for weight in state.values()} == {torch.float32}
    assert all(torch.equal(state[key], weight) for key, weight in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**ours).logits, ordinary(**ours).logits)


def test_loading_a_base_takes_no_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load("seed1")
    assert torch.equal(torch.rand(3), expected)


def test_a_shift_moves_the_margin_alone(base):
    model, processor = base
    exam = Exam(5, images=20)
    cell = {5: exam.take(partial(ask, model, processor.tokenizer), yes_no(processor)).astype(np.float64)}
    moved = shifted(cell, 0.7)
    np.testing.assert_allclose(margin(cell) - margin(moved), 0.7, atol=1e-9)
    np.testing.assert_allclose(moved[5][..., 2] - moved[5][..., 1], cell[5][..., 2] - cell[5][..., 1], atol=1e-9)
    assert abs(equal_yes_rate(cell, moved) - 0.7) < 0.2
    assert tuned_shift(cell, [exam]) >= 0


@pytest.mark.parametrize("system", TRAINED)
def test_every_system_trains_the_adapter_alone(system, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # trainers have their folders where they run

    def few(model, tokenizer, count, seed, device):
        return prompts(model, tokenizer, 24, seed)

    monkeypatch.setattr(study, "prompts", few)
    trained, options = [], {"max_steps": 2, "per_device_train_batch_size": 8}
    study.train("seed1", system, 1, lambda number, model: trained.append((number, model)), **options)
    ((number, model),) = trained
    assert number == 1
    before, after = load("seed1")[0].state_dict(), model.get_base_model().state_dict()
    assert any(after[name].any() for name in after if "lora_B" in name)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() & after.keys())


def test_the_bases_answer(base):
    exam = Exam(9, images=100)
    for folder in BASES.iterdir():
        model, processor = load(folder.name)
        cell = {9: exam.take(partial(ask, model, processor.tokenizer), yes_no(processor))}
        f1 = {split: score(pairs[0])["f1"] for split, pairs in marked(cell, [exam], "greedy").items()}
        assert f1["random"] > 0.85 and 0.65 < f1["adversarial"] < 0.8


def test_a_job_is_what_is_still_to_be_made(tmp_path):
    args = SimpleNamespace(full=True)
    decoded, trained = cells(args, ["seed1"], [1, 2], ["base", "SEED", "alpha 0"], tmp_path)
    assert decoded == [("seed1", "base")]
    assert trained == [("seed1", "SEED", 1, 2), ("seed1", "alpha 0", 1, 1), ("seed1", "SEED", 2, 1)]
    found = parts(decoded, trained, 2)
    assert [title for title, _ in found.values()][1:-1] == [
        "base on seed1",
        "SEED on seed1, seed 1, round 1 of 2",
        "SEED on seed1, seed 1, round 2 of 2",
        "alpha 0 on seed1, seed 1, round 1 of 1",
        "SEED on seed1, seed 2, round 1 of 1",
    ]
    for name in ("base", *(system + end for system in TRAINED for end in ("", SECOND))):
        for seed in (None, 1, 2):
            file = cell_file(tmp_path, "seed1", name, seed)
            file.parent.mkdir(exist_ok=True)
            file.touch()
    assert cells(args, ["seed1"], [1, 2], ["base", "SEED", "alpha 0"], tmp_path) == ([], [])


def test_what_a_table_means_is_one_sentence():
    def row(*gains):
        entries = ({"f1": 80.0, "f1_gain": list(gain), "accuracy_gain": list(gain)} for gain in gains)
        return {"greedy": dict(zip(SPLITS, entries, strict=True))}

    none, up, down = (0.1, -0.2, 0.4), (3.2, 3.0, 3.3), (-1.2, -1.5, -0.9)
    rows = [("base", 1, row(none, none, none)), ("SEED", 1, row(none, down, up))]
    hard, middle, easy = reversed(SPLITS)
    assert meaning(rows) == (
        f"In F1 against its base, SEED, at one forward an answer, gains 3.2 on {hard} questions [+3.0, +3.3], loses "
        f"1.2 on {middle} questions [-1.5, -0.9], neither gains nor loses on {easy} questions [-0.2, +0.4]."
    )
    lines = text(rows, "greedy").splitlines()
    assert len(lines) == 3 and all(len(line) <= 120 for line in lines)
