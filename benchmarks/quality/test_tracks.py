"""The two tracks of the challenge about the picture world."""

from collections import Counter

import numpy as np
import pytest

from hkdfast.choices import LETTERS
from hkdfast.data.augment import Augment, ShuffleOptions
from hkdfast.data.challenge import read, write
from hkdfast.data.synthetic import RewriteStatement
from hkdfast.data.tasks import record_of
from hkdfast.evaluate.choices import NONE, example
from world.scenes import OBJECTS
from world.tracks import (
    FACTS,
    SWAPS,
    TEMPLATES,
    TRACKS,
    ask,
    number,
    photos,
    right_answer,
)

pytestmark = pytest.mark.study


@pytest.fixture(scope="module")
def world():
    return photos(400, 11)


def demanded(record, objects):
    """The letter that the image and the texts demand, told from the words alone."""
    seen = {OBJECTS[index] for index in objects}
    if record.task == "hallucination":
        phrases = record.statement.replace(" and", ",").split(", ")
        assert sorted([*phrases, NONE]) == sorted(record.options)
        (wrong,) = [phrase for phrase in phrases if phrase not in seen] or [NONE]
        return LETTERS[record.options.index(wrong)]
    name, claimed = record.statement.split(" in sight and ")
    pair = FACTS.index(record.context) // 2
    if FACTS.index(claimed) // 2 != pair:
        return LETTERS[record.options.index("Not Verifiable")]
    told = ["False", "Partially True", "True"][(name in seen) + (claimed == record.context)]
    return LETTERS[record.options.index(told)]


@pytest.mark.parametrize("track", TRACKS)
def test_answers_are_those_that_image_and_context_demand(world, track):
    _, contents, _ = world
    records = ask(track, contents, 3)
    for record in records:
        objects = contents[number(record.image)]
        assert record.answer == right_answer(record, objects) == demanded(record, objects)
    shares = np.bincount([LETTERS.index(record.answer) for record in records]) / len(records)
    assert (abs(shares - 0.25) < 0.08).all()


@pytest.mark.parametrize("track", TRACKS)
def test_rewrites_have_one_right_answer_that_they_do_not_tell(world, track):
    _, contents, _ = world
    rewrite, answers = Augment([RewriteStatement(swaps=SWAPS), ShuffleOptions(fixed=())], seed=5), []
    for index, record in enumerate(ask(track, contents, 3)):
        made = rewrite(example(record, template=TEMPLATES[track]), index)
        again, objects = record_of(made), contents[number(record.image)]
        assert again.answer is None and again.image == record.image and again.statement != record.statement
        assert right_answer(again, objects) == demanded(again, objects)
        answers.append(right_answer(again, objects))
    assert min(Counter(answers).values()) > 0.08 * len(answers)


def test_wrong_phrases_are_near_by_the_share_asked_for(world):
    _, contents, _ = world

    def near(share):
        records = [r for r in ask("hallucination", contents, 4, near=share) if r.answer != "D"]
        wrong = [OBJECTS.index(r.options[LETTERS.index(r.answer)]) for r in records]
        return np.mean([w // 8 == contents[number(r.image)][0] // 8 for w, r in zip(wrong, records, strict=True)])

    assert near(0.0) < 0.25 and near(0.7) > 0.6


@pytest.mark.parametrize("track", TRACKS)
def test_a_track_is_written_as_the_challenge_does(world, tmp_path, track):
    _, contents, _ = world
    records = ask(track, contents[:20], 1)
    write(tmp_path / "questions.json", records)
    assert read(tmp_path / "questions.json", track) == records
