"""The study of SEED."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hkd import export
from hkdfast.evaluate.pope import score
from seed.bases import BASES, load
from seed.study import Exam, yes_no
from seed.table import equal_yes_rate, margin, marked, shifted, tuned_shift
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


def test_the_bases_answer(base):
    exam = Exam(9, images=100)
    for folder in BASES.iterdir():
        model, processor = load(folder.name)
        cell = {9: exam.take(partial(ask, model, processor.tokenizer), yes_no(processor))}
        f1 = {split: score(pairs[0])["f1"] for split, pairs in marked(cell, [exam], "greedy").items()}
        assert f1["random"] > 0.85 and 0.65 < f1["adversarial"] < 0.8
