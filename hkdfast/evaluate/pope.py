"""POPE, polling-based object probing: questions, answers and scores in the formats of the official scripts.

Li et al., 2023 (arXiv:2305.10355). Two scripts are in use and do not agree on every answer. `rule` chooses one:

    "vcd"   eval_pope.py of VCD (arXiv:2311.16922), used for the tables of SEED and related papers. An answer is right
            if the lower-case label is a substring of the lower-case answer. So "not", "know" and "snow" contain "no",
            an answer may be right under either label, and an answer with neither word is wrong under both.
    "pope"  evaluate.py of POPE itself. The answer up to its first full stop, without commas, is split at spaces. It is
            "no" if "No", "no" or "not" is one of the words, and "yes" otherwise; an empty answer is "yes" too.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data import jsonl
from ..data.image_mark import without_mark

RULES = ("vcd", "pope")
METRICS = ("accuracy", "precision", "recall", "f1", "yes_rate")


@dataclass(frozen=True)
class Question:
    """One line of a question file."""

    question_id: int | str
    image: str  # file name within the image folder
    text: str
    label: str | None  # "yes" or "no"; None if labels were not read
    place: str = field(default="", compare=False, repr=False)  # "file:line"


@dataclass(frozen=True)
class Graded:
    """The graded answers to one question set: all that scores and intervals need."""

    images: tuple[str, ...]  # (N,) image of each question; questions on one image are not independent
    label: torch.Tensor  # (N,) bool, True where the truth is yes
    right: torch.Tensor  # (N,) bool, True where the answer is right


def read_questions(path, images=None, labels=True):
    """The questions of a JSON-lines file with the fields question_id, image, text and label, in the file's order.

    The placeholder <image> at the beginning or end of a text, as in LLaVA's files, is removed.

    Args:
        path: the file; POPE's are called .json and hold one object per line.
        images: folder in which every image must exist; None: not checked.
        labels: whether every line must have a label, "yes" or "no" in upper or lower case. False: labels are not read.

    Raises:
        FileNotFoundError: no such file, folder or image.
        ValueError: a line that cannot be parsed ("file:line: ..."), a missing or wrong field, a repeated question_id,
            <image> elsewhere in a text.
    """
    path = Path(path).expanduser()
    questions, lines = [], {}
    for number, record in jsonl.read(path):
        name = jsonl.field(path, number, record, "question_id", (int, str))
        first = lines.setdefault(name, number)
        if first != number:
            raise ValueError(f"{path}:{number}: question_id {name!r} is already on line {first}")
        image, text = (jsonl.field(path, number, record, key) for key in ("image", "text"))
        place = f"{path}:{number}"
        text = without_mark(f"{place}: text", text)
        label = None
        if labels:
            label = jsonl.field(path, number, record, "label").lower().strip()
            if label not in ("yes", "no"):
                raise ValueError(f"{path}:{number}: label is {jsonl.shown(record['label'])}, expected 'yes' or 'no'")
        questions.append(Question(name, image, text, label, place))
    if images is not None:
        require_images(path, questions, images)
    return questions


def require_images(path, questions, folder):
    """Refuse questions whose image is not in the folder."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {str(folder)!r} is not a folder")
    wanted = dict.fromkeys(question.image for question in questions)
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        count = f"{len(missing)} of {len(wanted)} images of {path} are"
        raise FileNotFoundError(f"{count} not in {str(folder)!r}, the first is {missing[0]!r}")


def read_answers(path, questions):
    """The answer texts of a JSON-lines file, one per question and in the order of the questions.

    A line holds question_id and text, as VCD's scripts write, or question and answer, as in POPE's examples. Line by
    line the ids (or the texts of the questions, if there is no id) must be those of the questions.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that cannot be parsed, a missing answer, another number of lines, another id or question.
    """
    path = Path(path).expanduser()
    records = jsonl.read(path)
    answers = []
    for question, (number, record) in zip(questions, records, strict=False):
        key, expected = "question_id", question.question_id
        if key not in record and "question" in record:
            key, expected = "question", question.text
        found = jsonl.field(path, number, record, key, (int, str))
        if key == "question":
            found = without_mark(f"{path}:{number}: question", found)
        if found != expected:
            what = f"{path}:{number}: {key} is {jsonl.shown(found)}, expected {jsonl.shown(expected)}"
            kind = type(expected).__name__
            why = (
                f"the questions have it as {kind}"
                if str(found) == str(expected)
                else "answers must have the order of the questions"
            )
            raise ValueError(f"{what}: {why}")
        answers.append(jsonl.field(path, number, record, "text" if "text" in record else "answer"))
    if len(records) != len(questions):
        raise ValueError(f"{path}: {len(records)} answers for {len(questions)} questions")
    return answers


def is_right(answer, label, rule="vcd"):
    """Whether an answer is right by the rule of an official script, "vcd" or "pope"."""
    if rule == "vcd":
        return label in answer.lower()
    words = answer.split(".")[0].replace(",", "").split(" ")
    return label == ("no" if {"No", "not", "no"} & set(words) else "yes")


def grade(questions, answers, rule="vcd", source=""):
    """Grade the answers by the rule of an official script.

    Args:
        questions: (N,) list of Question with labels.
        answers: (N,) list of str, in the order of the questions.
        rule: "vcd" or "pope" (see the module docstring).
        source: prefix for the image names. If question sets over different folders use the same file names, give them
            different prefixes, so that an interval does not count two images as one.

    Raises:
        ValueError: an unknown rule, other numbers of answers than questions, a question without a label.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}, expected one of {', '.join(RULES)}")
    if len(questions) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(questions)} questions")
    unlabeled = [question.question_id for question in questions if question.label is None]
    if unlabeled:
        raise ValueError(f"{len(unlabeled)} questions have no label, the first is {unlabeled[0]!r}")
    right = [is_right(answer, question.label, rule) for question, answer in zip(questions, answers, strict=True)]
    return Graded(
        tuple(source + question.image for question in questions),
        torch.tensor([question.label == "yes" for question in questions], dtype=torch.bool),
        torch.tensor(right, dtype=torch.bool),
    )


def confusion(graded):
    """(N, 4) float64, a single 1 per row: true positive, false positive, true negative, false negative. Yes is
    positive."""
    label, right = graded.label, graded.right
    return torch.stack([label & right, ~label & ~right, ~label & right, label & ~right], -1).double()


def metrics(counts):
    """{name: (...)} of METRICS for counts (..., 4) as `confusion` orders them, float64, fractions of 1.

    A ratio with the denominator 0 is 0: precision without an answer "yes", recall without a label "yes", F1 without a
    true positive. The official scripts divide by zero there.
    """
    tp, fp, tn, fn = counts.double().unbind(-1)
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    asked = tp + fp + tn + fn
    return {
        "accuracy": ratio(tp + tn, asked),
        "precision": precision,
        "recall": recall,
        # in the script's order of operations, to get its last digit
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_rate": ratio(tp + fp, asked),
    }


def ratio(part, whole):
    return torch.where(whole > 0, part / whole.where(whole > 0, 1), 0)


def score(graded):
    """{metric: float} of one question set, as fractions of 1, and the number of "questions".

    yes_rate is the script's: an answer counts as "yes" if it is right under yes or wrong under no.
    """
    return {name: value.item() for name, value in metrics(confusion(graded).sum(0)).items()} | {
        "questions": len(graded.images)
    }


def is_plain(answer):
    """Whether an answer is clear: it contains exactly one of the words yes and no, in upper or lower case."""
    return len({"yes", "no"}.intersection(re.findall(r"[^\W\d_]+", answer.lower()))) == 1


def count_unreadable(answers):
    """The number of answers with neither yes nor no, or both. The official scripts count each as one of the two."""
    return sum(not is_plain(answer) for answer in answers)


def split_name(path):
    """The name of a question file in a table: random, popular or adversarial if its name contains it, else its name."""
    found = re.findall("random|popular|adversarial", Path(path).stem)
    return found[-1] if found else Path(path).stem
