"""The multiple-choice tracks of the Responsible-AI challenge: questions, prompts, answers and micro-F1.

Two tasks (github.com/mm-hall-fact/ACMMM2025): "hallucination", which of some phrases of a caption the image does not
support, and "factcheck", whether a claim about an image in its context is true. A file holds a JSON list of objects, or
one object a line, with the fields of the challenge's page; each object may be wrapped in {"metadata": ...}.

    hallucination  image_id, system1_question, system1_answer, system2_question, choices, correct_choice
    factcheck      image_id, claim, context, question, choices, correct_choice

"image", "question" and "answer" are understood for image_id, system2_question and correct_choice.
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
    """Micro-F1 and what it is made of, fractions of 1, over all questions and for each class.

    As the challenge's page defines it: TP, an answer that matches exactly (as a set of letters); P = TP / (TP + FP),
    FP an answer that does not; R = TP / (TP + FN), FN a question without its right answer, wrongly or not answered; F1
    = 2 P R / (P + R). With every question answered all three are the accuracy. A ratio over nothing is 0.

    The classes of "factcheck" are its options. Those of "hallucination" are "No hallucination" and "hallucination",
    for a letter says nothing there; a wrong phrase for a phrase counts against "hallucination" twice.

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
    """The answers as `bootstrap.paired` takes them; its metrics "f1", "precision" and "recall" are those of `score`.

    Every question becomes two rows: one that asks for its right answer, and one where an answer that is wrong is a
    false positive. Other metrics of POPE have no meaning here.

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
