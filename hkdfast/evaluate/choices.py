"""The score of the Responsible-AI challenge's multiple-choice tracks: micro-F1 (github.com/mm-hall-fact/ACMMM2025).

The formats of its files are described in `hkdfast.data.challenge`.
"""

import torch

from ..choices import LETTERS
from ..data.tasks import NONE, TASKS, ChoiceInference, Record, choice, example, is_none, question
from . import pope

__all__ = [
    "ChoiceInference",
    "NONE",
    "Record",
    "TASKS",
    "choice",
    "example",
    "grade",
    "question",
    "score",
]


def answers_to(records):
    unlabeled = [record.question_id for record in records if record.answer is None]
    if unlabeled:
        raise ValueError(f"{len(unlabeled)} questions have no answer, the first is {unlabeled[0]!r}")
    return [record.answer for record in records]


def score(records, answers):
    """Micro-F1, precision and recall, as fractions of 1, over all questions and for each class.

    The challenge's page defines: TP is an answer that matches exactly (as a set of letters); FP is an answer that does
    not match; FN is a question without its right answer, wrongly answered or not at all. P = TP / (TP + FP), R = TP /
    (TP + FN), F1 = 2 P R / (P + R). If every question is answered, all three equal the accuracy. A ratio with the
    denominator 0 is 0.

    The classes of "factcheck" are its options. Those of "hallucination" are "No hallucination" and "hallucination",
    because a letter has no meaning of its own there. If the right and the given phrase differ, "hallucination" gets an
    FP and an FN.

    Args:
        records: list of Record with answers.
        answers: (N,) letters in order, or None for no answer.

    Returns:
        {"micro_f1", "precision", "recall", "questions", "answered", "right", "classes": {name: the same}}.

    Raises:
        ValueError: another number of answers than records, or a record without its answer.
    """
    truth = answers_to(records)
    if len(answers) != len(records):
        raise ValueError(f"{len(answers)} answers for {len(records)} questions")
    rows = [
        (class_of(record, right), None if given is None else class_of(record, given), given == right)
        for record, right, given in zip(records, truth, answers, strict=True)
    ]
    names = sorted({row[0] for row in rows} | {row[1] for row in rows if row[1] is not None})

    def ratios(of):
        asked = [row for row in rows if of is None or row[0] == of]
        given = [row for row in rows if row[1] is not None and (of is None or row[1] == of)]
        right = sum(row[2] for row in asked)
        counts = torch.tensor([right, len(given) - right, 0, len(asked) - right])
        found = {name: value.item() for name, value in pope.metrics(counts).items()}
        numbers = {"questions": len(asked), "answered": len(given), "right": right}
        return {"micro_f1": found["f1"], "precision": found["precision"], "recall": found["recall"]} | numbers

    return ratios(None) | {"classes": {name: ratios(name) for name in names}}


def class_of(record, letters):
    texts = [record.options[LETTERS.index(letter)] for letter in letters]
    if record.task == "factcheck":
        return " + ".join(texts)
    return NONE if all(map(is_none, texts)) else "hallucination"


def grade(records, answers, source=""):
    """The answers in the form of `bootstrap.paired`, whose metrics "f1", "precision" and "recall" are those of `score`.

    Every question becomes two rows: a positive one, right if the answer is right, and a negative one, wrong if the
    answer is wrong (a false positive). POPE's other metrics have no meaning here.

    Args:
        records, answers: as in `score`.
        source: as in `pope.grade`.
    """
    truth = answers_to(records)
    right = [given == label for given, label in zip(answers, truth, strict=True)]
    harmless = [given is None or given == label for given, label in zip(answers, truth, strict=True)]
    images = tuple(source + record.image for record in records)
    label = torch.tensor([True] * len(records) + [False] * len(records))
    return pope.Graded(images * 2, label, torch.tensor(right + harmless))
