"""The multiple-choice tracks of the Responsible-AI challenge: questions, prompts, answers and micro-F1.

Two tasks (github.com/mm-hall-fact/ACMMM2025): "hallucination", which of some phrases of a caption the image does not
support, and "factcheck", whether a claim about an image in its context is true. A file holds a JSON list of objects, or
one object a line, with the fields of the challenge's page; each object may be wrapped in {"metadata": ...}.

    hallucination  image_id, system1_question, system1_answer, system2_question, choices, correct_choice
    factcheck      image_id, claim, context, question, choices, correct_choice

"image", "question" and "answer" are understood for image_id, system2_question and correct_choice.
"""

import json
import re
from pathlib import Path

from ..choices import LETTERS
from ..evaluate import pope
from . import jsonl
from .tasks import TASKS, Record, template_of


def entries(path):
    """The objects of a file as [(line number, or "entry 3" of a list, dict), ...], "metadata" wrappers taken off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: "file:line: ..." or "file:entry 3: ..." for what is not JSON or not an object.
    """
    path = Path(path).expanduser()
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    found = [] if data.lstrip()[:1] == b"[" else jsonl.read(path)
    if not found:
        found = [(f"entry {number}", value) for number, value in enumerate(jsonl.parse(path, data), 1)]
    return [(number, unwrapped(value)) for number, value in found]


def unwrapped(value):
    inner = value.get("metadata") if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) and len(value) == 1 else value


def read(path, task, images=None, labels=True):
    """The records of a file of the challenge, in the file's order.

    Args:
        path: the file, as the head of this module tells.
        task: a key of TASKS.
        images: folder in which every image must exist, or None for no look.
        labels: whether every question must have its answer. None reads those that are there and not empty, False none.

    Raises:
        FileNotFoundError: no such file, folder or image.
        ValueError: an unknown task, a file without questions, an entry that does not parse, a missing or wrong field,
            a question_id twice; the message names file, line or entry, field and value.
    """
    template_of(task)
    path = Path(path).expanduser()
    records, seen = [], {}
    for index, (number, entry) in enumerate(entries(path)):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}:{number}: expected an object, found a {type(entry).__name__}")
        record = parse(path, number, entry, task, index, labels)
        first = seen.setdefault(record.question_id, number)
        if first != number:
            raise ValueError(f"{path}:{number}: question_id {record.question_id!r} is already at {first}")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: the file has no questions")
    if images is not None:
        pope.require_images(path, records, images)
    return records


def parse(path, number, entry, task, index, labels):
    """The Record of one object of a file."""
    known = TASKS[task]

    def get(*names, default=None):
        name = next((name for name in names if name in entry), None)
        if name is None and default is not None:
            return default
        return jsonl.field(path, number, entry, name or names[0])

    options = parse_options(path, number, entry, known.options)
    answer, name = None, "correct_choice"
    if name not in entry and "answer" in entry:
        name = "answer"
    if labels or labels is None and entry.get(name) not in (None, "", []):
        value = jsonl.field(path, number, entry, name, (str, list))
        answer = parse_letters(f"{path}:{number}: {name}", value, len(options))
        if answer is None:
            raise ValueError(
                f"{path}:{number}: {name} is {value!r}, expected one of {', '.join(LETTERS[: len(options)])}"
            )
    key = next((name for name in ("question_id", "id") if name in entry), None)
    return Record(
        task,
        get("image_id", "image"),
        get(known.statement),
        get(known.context, default=""),
        get(known.question, "question", default=known.asked),
        options,
        answer,
        index if key is None else jsonl.field(path, number, entry, key, (int, str)),
    )


def parse_options(path, number, entry, default):
    """The texts of an entry's choices: [{"id": "A", "choice": text}, ...] or [text, ...]."""
    if "choices" not in entry and default:
        return default
    choices = jsonl.field(path, number, entry, "choices", (list,))
    where = f"{path}:{number}: choices"
    texts = []
    for letter, one in zip(LETTERS, choices, strict=False):
        if isinstance(one, dict):
            if one.get("id") != letter:
                raise ValueError(f"{where}: id is {one.get('id')!r}, expected {letter!r}: A, B, C, ... in order")
            one = one.get("choice")
        if not isinstance(one, str) or not one.strip():
            raise ValueError(f"{where}: option {letter} is {one!r}, expected a text")
        texts.append(one)
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: {len(choices)} options, expected 2 to {len(LETTERS)}")
    if len(set(texts)) < len(texts):
        raise ValueError(f"{where}: an option stands twice in {texts}")
    return tuple(texts)


def parse_letters(where, value, n):
    """Letters in order, "AC", of "C", "c.", "A, C", "AC" or ["A", "C"]; None for an empty value.

    Raises:
        ValueError: beginning with `where`, for anything else, or a letter beyond the n options.
    """
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where} is {value!r}, expected letters")
    letters = re.sub(r"[\s,;.()]", "", "".join(parts)).upper()
    known = LETTERS[:n]
    if len(set(letters)) < len(letters) or not set(letters) <= set(known):
        raise ValueError(f"{where} is {value!r}, expected letters of {known[0]} to {known[-1]}, each once")
    return "".join(sorted(letters)) or None


def write(path, records):
    """Write records to a JSON file in the challenge's own format; `read` gives them back."""
    with jsonl.replacing(path) as file:
        json.dump([official(record) for record in records], file, indent=1, ensure_ascii=False)
        file.write("\n")


def official(record):
    """The record as an object of the challenge's files."""
    known = TASKS[record.task]
    found = {"question_id": record.question_id, "image_id": record.image}
    found |= {known.context: record.context, known.statement: record.statement, known.question: record.question}
    if record.answer is not None:
        texts = [record.options[LETTERS.index(letter)] for letter in record.answer]
        found |= {"correct_answer": "; ".join(texts), "correct_choice": record.answer}
    return found | {"choices": [{"id": a, "choice": b} for a, b in zip(LETTERS, record.options, strict=False)]}


def write_answers(path, records, answers):
    """Write answers, letters or None, as a JSON list of objects with question_id, image_id and choice."""
    lines = [
        {"question_id": record.question_id, "image_id": record.image, "choice": answer}
        for record, answer in zip(records, answers, strict=True)
    ]
    with jsonl.replacing(path) as file:
        json.dump(lines, file, indent=1)
        file.write("\n")


def read_answers(path, records):
    """The answers of a file, letters or None where one is missing, in the order of the records.

    The file holds objects, in a JSON list or one a line, or a list of letters in the order of the records. An object's
    letters are its "choice" or "answer". Objects with question_id may come in any order and be fewer than the records;
    others come in the order of the records, with image_id or nothing beside. No answer is null, "" or an absent object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is no answer to these records; the message names file and line or entry.
    """
    path = Path(path).expanduser()
    places = {record.question_id: place for place, record in enumerate(records)}
    found = {}
    for place, (number, entry) in enumerate(entries(path)):
        value = entry
        if isinstance(entry, dict):
            if "question_id" in entry:
                name = entry["question_id"]
                place = places.get(name) if isinstance(name, int | str) else None
                if place is None or place in found:
                    what = "answered twice" if place is not None else "not among the questions"
                    raise ValueError(f"{path}:{number}: question_id {name!r} is {what}")
            image = entry.get("image_id")
            if image is not None and place < len(records) and image != records[place].image:
                raise ValueError(f"{path}:{number}: image_id is {image!r}, expected {records[place].image!r}")
            key = "choice" if "choice" in entry else "answer"
            value = jsonl.field(path, number, entry, key, (str, list, type(None)))
        if place >= len(records):
            raise ValueError(f"{path}:{number}: more answers than the {len(records)} questions")
        if value is not None:
            value = parse_letters(f"{path}:{number}: answer", value, len(records[place].options))
        found[place] = value
    return [found.get(place) for place in range(len(records))]
