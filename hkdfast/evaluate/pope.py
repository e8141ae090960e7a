"""POPE, polling-based object probing: questions, answers and scores in the formats of the official scripts.

Li et al., 2023 (arXiv:2305.10355). Two scripts are in use and do not agree on every answer; both are here, by rule:

    "vcd"   eval_pope.py of VCD (arXiv:2311.16922), which the tables of SEED and its neighbours follow. An answer is
            right if the lower-case label is a substring of the lower-case answer. So "no" is found in "not", "know"
            and "snow", an answer may be right under either label, and one with neither word is wrong under both.
    "pope"  evaluate.py of POPE itself. The answer up to its first full stop, without commas, split at spaces, is "no"
            if "No", "no" or "not" is one of the words, and "yes" in every other case, the empty answer included.
"""

from dataclasses import dataclass
from pathlib import Path

from . import jsonl


@dataclass(frozen=True)
class Question:
    """One line of a question file, in the file's own words."""

    question_id: int | str
    image: str  # file name within the image folder
    text: str
    label: str | None  # "yes" or "no"; None where labels were not asked for


def read_questions(path, images=None, labels=True):
    """The questions of a JSON-lines file with the fields question_id, image, text and label, in the file's order.

    Args:
        path: the file; POPE's are called .json and hold one object per line.
        images: folder in which every image must exist, or None for no look.
        labels: whether every line must have a label, "yes" or "no" in any case. If not, labels are not read.

    Raises:
        FileNotFoundError: no such file, folder or image.
        ValueError: a line that does not parse ("file:line: ..."), a missing or wrong field, a question_id twice.
    """
    path = Path(path).expanduser()
    questions, lines = [], {}
    for number, record in jsonl.read(path):
        name = jsonl.field(path, number, record, "question_id", (int, str))
        if name in lines:
            raise ValueError(f"{path}:{number}: question_id {name!r} is already on line {lines[name]}")
        lines[name] = number
        image, text = (jsonl.field(path, number, record, key) for key in ("image", "text"))
        for key, value in (("image", image), ("text", text)):
            if not value.strip():
                raise ValueError(f"{path}:{number}: {key} is empty")
        label = None
        if labels:
            label = jsonl.field(path, number, record, "label").lower().strip()
            if label not in ("yes", "no"):
                raise ValueError(f"{path}:{number}: label is {record['label']!r}, expected 'yes' or 'no'")
        questions.append(Question(name, image, text, label))
    if images is not None:
        require_images(path, questions, images)
    return questions


def require_images(path, questions, folder):
    """Say which images of the questions are not in the folder, if any."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {str(folder)!r} is not a folder")
    wanted = dict.fromkeys(question.image for question in questions)
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        count = f"{len(missing)} of {len(wanted)} images of {path} are"
        raise FileNotFoundError(f"{count} not in {str(folder)!r}, the first is {missing[0]!r}")
