"""The picture world's short cuts against the long way round."""

import numpy as np
import pytest
import torch
from PIL import Image

from hkdfast.evaluate.pope import read_questions
from seed.bases import load
from world.questions import SPLITS, pope, prompts, write_pope
from world.scenes import OBJECTS, SCENE_OF, company, pictures
from world.tinyllava import ask, normalised, prompt, question

pytestmark = pytest.mark.study


@pytest.fixture(scope="module")
def base():
    return load("seed1")


def test_objects_of_a_scene_keep_company():
    together = company()
    same = SCENE_OF[:, None] == SCENE_OF
    assert together[same].mean() > 5 * together[~same].mean()
    assert len(OBJECTS) == 48


def test_a_seed_gives_one_world():
    for one, two in zip(pope(5, 3)[1].values(), pope(5, 3)[1].values(), strict=True):
        assert (one == two).all()
    assert not (pictures(2, np.random.default_rng(0))[0] == pictures(2, np.random.default_rng(1))[0]).all()


def test_asking_many_questions_at_once_changes_no_answer(base):
    model, processor = base
    images = pictures(3, np.random.default_rng(0))[0]
    image, index = torch.tensor([0, 2, 0, 1, 2, 2]), torch.tensor([3, 4, 5, 6, 7, 30])
    batch = processor(
        images=[Image.fromarray(images[i]) for i in image],
        text=[prompt(question(i)) for i in index],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        expected = model(**batch).logits[:, -1]
    found = ask(model, processor.tokenizer, normalised(images), image, index, batch=2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_chat_template_writes_the_prompt(base):
    content = [{"type": "image"}, {"type": "text", "text": question(0)}]
    talk = [{"role": "user", "content": content}]
    text = base[1].apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert text == prompt(question(0))


def test_questions_are_half_yes_and_read_as_pope(tmp_path):
    images, splits = pope(4, 1)
    write_pope(images, splits, tmp_path)
    for split in SPLITS:
        found = read_questions(tmp_path / f"pope_{split}.json", images=tmp_path)
        assert [question.label == "yes" for question in found] == [True, False] * 8


def test_a_negative_is_not_in_the_image():
    images, splits = pope(50, 2)
    shown = [{*objects} for objects in pictures(50, np.random.default_rng(2))[1]]
    for rows in splits.values():
        assert all((index in shown[image]) == bool(there) for image, index, there in rows)


def test_half_of_the_prompts_are_those_the_model_doubts(base):
    model, processor = base
    images, asked = prompts(model, processor.tokenizer, 40, 0)
    logits = ask(model, processor.tokenizer, normalised(images), *torch.from_numpy(asked).T)
    sure = logits.softmax(-1).amax(-1).view(40, 8)
    every = torch.cartesian_prod(torch.arange(40), torch.arange(48))
    blind = ask(model, processor.tokenizer, normalised(images), *every.T).softmax(-1).amax(-1)
    assert sure[:, 4:].mean() < blind.mean() - 0.02
