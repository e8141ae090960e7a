"""MME's score: accuracy and accuracy+ of yes/no questions in pairs. Fu et al., 2023 (arXiv:2306.13394)."""

from pathlib import Path

from ..data import jsonl
from . import pope

# The subset on which SEED and related papers report hallucination.
HALLUCINATION = ("existence", "count", "position", "color")


def read(path):
    """A subtask's answers file as [(image, question, truth, answer), ...], two lines per image, tabs between fields.

    Raises:
        FileNotFoundError: no such file.
        ValueError: "file:line: ..." for a line that is not UTF-8 or without four fields, a truth other than yes or no,
            a pair on two images.
    """
    path = Path(path).expanduser()
    rows = []
    found = list(jsonl.lines(jsonl.content(path)))
    for number, line in found if found[-1][1] else found[:-1]:
        fields = jsonl.decoded(path, line.removesuffix(b"\r"), number).split("\t")
        if len(fields) != 4:
            raise ValueError(
                f"{path}:{number}: {len(fields)} fields between tabs, expected image, question, truth, answer"
            )
        image, question, truth, answer = fields
        if truth.lower() not in ("yes", "no"):
            raise ValueError(f"{path}:{number}: truth is {jsonl.shown(truth)}, expected Yes or No")
        if number % 2 == 0 and rows[-1][0] != image:
            raise ValueError(
                f"{path}:{number}: image {image!r} follows {rows[-1][0]!r}, expected two questions per image"
            )
        rows.append((image, question, truth.lower(), answer.lower()))
    if not rows or len(rows) % 2:
        raise ValueError(f"{path}: {len(rows)} questions, expected two per image")
    return rows


def parse(answer):
    """How the official script reads a lower-case answer: "yes", "no" or "other", by its first four characters.

    So " yes" is yes, "the answer is yes" is other, "know" and "not" are no.
    """
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


def score(rows):
    """{"accuracy", "accuracy_plus", "score", "questions", "unreadable"} of a subtask.

    accuracy is a fraction of 1. accuracy_plus is the fraction of images with both questions right. score is 100 times
    their sum, at most 200. An answer that `parse` reads as "other" is wrong. unreadable counts these answers and those
    that do not contain exactly one of the two words; it does not change the score.
    """
    right = [parse(answer) == truth for _, _, truth, answer in rows]
    both = [first and second for first, second in zip(right[::2], right[1::2], strict=True)]
    accuracy, plus = sum(right) / len(right), sum(both) / len(both)
    unreadable = sum(parse(answer) == "other" or not pope.is_plain(answer) for *_, answer in rows)
    found = {"accuracy": accuracy, "accuracy_plus": plus, "score": accuracy * 100 + plus * 100}
    return found | {"questions": len(rows), "unreadable": unreadable}


def files(folder):
    """The .txt files of a results folder, one for each subtask; FileNotFoundError if there is none."""
    found = sorted(Path(folder).expanduser().glob("*.txt"))
    if not found:
        raise FileNotFoundError(f"no .txt file in {str(folder)!r}, expected one per MME subtask")
    return found


def score_folder(folder):
    """{subtask: score} of each .txt file in a results folder, and the sum of the hallucination subset if all are there.

    Raises:
        FileNotFoundError: no such folder, or no .txt file in it.
        ValueError: as `read`.
    """
    scores = {file.stem: score(read(file)) for file in files(folder)}
    if all(name in scores for name in HALLUCINATION):
        scores["hallucination"] = {"score": sum(scores[name]["score"] for name in HALLUCINATION)}
    return scores
