"""The study of SEED."""

from functools import partial

import numpy as np
import pytest

from hkdfast.evaluate.pope import score
from seed.study import BASES, Exam, load, yes_no
from seed.table import equal_yes_rate, margin, marked, shifted, tuned_shift
from world.tinyllava import ask

pytestmark = pytest.mark.study


@pytest.fixture(scope="module")
def base():
    return load("seed1")


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
