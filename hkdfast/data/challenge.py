"""The multiple-choice tracks of the Responsible-AI challenge: questions, prompts, answers and micro-F1.

Two tasks (github.com/mm-hall-fact/ACMMM2025): "hallucination", which of some phrases of a caption the image does not
support, and "factcheck", whether a claim about an image in its context is true. A file holds a JSON list of objects, or
one object a line, with the fields of the challenge's page; each object may be wrapped in {"metadata": ...}.

    hallucination  image_id, system1_question, system1_answer, system2_question, choices, correct_choice
    factcheck      image_id, claim, context, question, choices, correct_choice

"image", "question" and "answer" are accepted for image_id, system2_question and correct_choice. One <image> at the
beginning or end of a text is removed.
"""

import json
import re
from pathlib import Path

from ..choices import LETTERS
from ..evaluate import pope
from . import jsonl, outputs
from .image_mark import MARK, without_mark
from .tasks import TASKS, Record, template_of


def entries(path):
    """The objects of a file, without "metadata" wrappers: [(line number, or "entry 3" of a list, dict), ...].

    Raises:
        FileNotFoundError: no such file.
        ValueError: "file:line: ..." or "file:entry 3: ..." for what is not JSON or not an object.
    """
    path = Path(path).expanduser()
    data = jsonl.content(path)
    if data.lstrip()[:1] == b"[":
        found = [(f"entry {number}", value) for number, value in enumerate(jsonl.parse(path, data), 1)]
    else:
        found = jsonl.objects(path, data)
    return [(number, unwrapped(value)) for number, value in found]


def unwrapped(value):
    inner = value.get("metadata") if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) and len(value) == 1 else value


def read(path, task, images=None, labels=True):
    """The records of a file of the challenge, in the file's order.

    Args:
        path: the file (see the module docstring for its format).
        task: a key of TASKS.
        images: folder in which every image must exist; None: not checked.
        labels: True: every question must have an answer. None: answers that exist and are not empty are read. False: no
            answer is read.

    Raises:
        FileNotFoundError: no such file, folder or image.
        ValueError: an unknown task, a file without questions, an entry that cannot be parsed, a missing or wrong field,
            a repeated question_id; the message names file, line or entry, field and value.
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

    texts = {
        "statement": get(known.statement),
        "context": get(known.context, default=""),
        "question": get(known.question, "question", default=known.asked),
    }
    marks = {name: text.count(MARK) for name, text in texts.items()}
    if sum(marks.values()) > 1:
        raise ValueError(f"{path}:{number}: {MARK} occurs {sum(marks.values())} times, expected one image")
    texts |= {name: without_mark(f"{path}:{number}: {name}", texts[name]) for name, count in marks.items() if count}
    options = parse_options(path, number, entry, known.options)
    answer, name = None, "correct_choice"
    if name not in entry and "answer" in entry:
        name = "answer"
    if labels or labels is None and entry.get(name) not in (None, "", []):
        value = jsonl.field(path, number, entry, name, (str, list))
        answer = parse_letters(f"{path}:{number}: {name}", value, options)
        if answer is None:
            raise ValueError(
                f"{path}:{number}: {name} is {jsonl.shown(value)}, expected one of {', '.join(LETTERS[: len(options)])}"
            )
    key = next((name for name in ("question_id", "id") if name in entry), None)
    return Record(
        task=task,
        image=get("image_id", "image"),
        options=options,
        answer=answer,
        question_id=index if key is None else jsonl.field(path, number, entry, key, (int, str)),
        place=f"{path}:{number}",
        **texts,
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
                raise ValueError(
                    f"{where}: id is {jsonl.shown(one.get('id'))}, expected {letter!r}: A, B, C, ... in order"
                )
            one = one.get("choice")
        if not isinstance(one, str) or not one.strip():
            raise ValueError(f"{where}: option {letter} is {jsonl.shown(one)}, expected a text")
        if MARK in one:
            raise ValueError(f"{where}: option {letter} contains {MARK}: {jsonl.shown(one)}")
        texts.append(one)
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: {len(choices)} options, expected 2 to {len(LETTERS)}")
    if len(set(texts)) < len(texts):
        raise ValueError(f"{where}: an option occurs twice in {jsonl.shown(texts)}")
    return tuple(texts)


def parse_letters(where, value, options):
    """The letters of an answer, sorted: "AC" for "A, C", "AC" or ["C", "A"], "C" for "c."; None for an empty value.

    Letters without a separator must be capitals: "ad" and "Bad" are words.

    Args:
        where: prefix of an error message.
        value: the value in the file.
        options: texts of the options.

    Raises:
        ValueError: for anything else, a letter that labels no option, or the text of an option.
    """
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where} is {jsonl.shown(value)}, expected letters")
    words = [word for part in parts for word in re.split(r"[\s,;.()]+", part) if word]
    known = LETTERS[: len(options)]
    letters = [word.upper() for word in words]
    if len(words) == 1 and not isinstance(value, list) and words[0].isupper():
        letters = list(words[0])
    texts = {option.strip().casefold(): letter for letter, option in zip(known, options, strict=True)}
    text = value.strip().casefold() if isinstance(value, str) else None
    word = len(letters) > 1 and text in texts  # an option "BAD" does not mean the letters B, A and D
    if word or len(set(letters)) < len(letters) or not set(letters) <= set(known):
        hint = f" ({value.strip()!r} is the text of {texts[text]})" if text in texts else ""
        raise ValueError(
            f"{where} is {jsonl.shown(value)}{hint}, expected letters of {known[0]} to {known[-1]}, each once"
        )
    return "".join(sorted(letters)) or None


def write(path, records):
    """Write records to a JSON file in the challenge's own format, which `read` reads."""
    with outputs.replacing(path) as file:
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
    with outputs.replacing(path) as file:
        json.dump(lines, file, indent=1)
        file.write("\n")


def read_answers(path, records):
    """The answers of a file in the order of the records: letters, or None for a missing answer.

    The file holds objects, as a JSON list or one per line, or a JSON list of letters in the order of the records. The
    letters of an object are its "choice" or "answer". Objects with question_id may have any order, and some may be
    missing. Objects without it must be as many as the records and in their order; image_id is optional. null, "" and a
    missing object mean no answer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an entry that is not an answer to these records; the message names file and line or entry.
    """
    path = Path(path).expanduser()
    places = {record.question_id: place for place, record in enumerate(records)}
    found, named = {}, None
    for place, (number, entry) in enumerate(entries(path)):
        value = entry
        has_id = isinstance(entry, dict) and "question_id" in entry
        if named not in (None, has_id):
            raise ValueError(f"{path}:{number}: {'a' if has_id else 'no'} question_id, unlike the answers before it")
        named = has_id
        if isinstance(entry, dict):
            if has_id:
                name = jsonl.field(path, number, entry, "question_id", (int, str))
                place = places.get(name)
                if place is None or place in found:
                    what = (
                        "answered twice" if place is not None else f"not among the questions{other_kind(name, places)}"
                    )
                    raise ValueError(f"{path}:{number}: question_id {name!r} is {what}")
            image = entry.get("image_id")
            if image is not None and place < len(records) and image != records[place].image:
                raise ValueError(
                    f"{path}:{number}: image_id is {jsonl.shown(image)}, expected {records[place].image!r}"
                )
            key = "choice" if "choice" in entry else "answer"
            value = jsonl.field(path, number, entry, key, (str, list, type(None)))
        if place >= len(records):
            raise ValueError(f"{path}:{number}: more answers than the {len(records)} questions")
        if value is not None:
            value = parse_letters(f"{path}:{number}: answer", value, records[place].options)
        found[place] = value
    if not named and len(found) < len(records):
        raise ValueError(
            f"{path}: {len(found)} answers for {len(records)} questions: without question_id the file must have an "
            "entry for each question, null for no answer"
        )
    return [found.get(place) for place in range(len(records))]


def other_kind(name, known):
    """A hint for an error: the same question_id exists as a text instead of a number, or the other way round."""
    other = next((each for each in known if str(each) == str(name)), None)
    return "" if other is None else f", {other!r} is"
