"""What is wrong with a file of JSON is said with its name and line, and never at length."""

import json
import re

import pytest

from hkdfast.data import challenge, jsonl
from hkdfast.evaluate import mme, pope

QUESTION = {"question_id": 1, "image": "1.png", "text": "Is there a cat?", "label": "yes"}
CLAIM = {"question_id": 1, "image": "1.png", "claim": "A cat.", "context": "A photo.", "answer": "D"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (json.dumps([QUESTION]).encode(), "q: the whole file is one JSON list, expected one JSON object per line"),
        (json.dumps([QUESTION], indent=1).encode(), "q: the whole file is one JSON list, expected one"),
        (json.dumps(QUESTION, indent=1).encode(), "q: the whole file is one JSON dict, expected one"),
        (json.dumps(QUESTION).encode("utf-16"), "q: the file is UTF-16 or UTF-32, expected UTF-8"),
        (json.dumps(QUESTION).encode("utf-16-le"), "q: the file is UTF-16 or UTF-32, expected UTF-8"),
        (json.dumps(QUESTION).encode("utf-32"), "q: the file is UTF-16 or UTF-32, expected UTF-8"),
        (b"", "q: the file has no lines"),
        (b"\xef\xbb\xbf \n", "q: the file has no lines"),
        (b'{"a": 1} {"a": 2}', "q:1: more than one JSON value, the second at column 10"),
        (b'{"label": "yes", "label": "no"}', "q:1: an object has the field 'label' twice"),
    ],
)
def test_files_of_another_form(tmp_path, data, message):
    (tmp_path / "q").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        pope.read_questions(tmp_path / "q")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "q").write_bytes(b"\xef\xbb\xbf" + json.dumps(QUESTION).encode())
    assert len(pope.read_questions(tmp_path / "q")) == 1
    (tmp_path / "q").write_bytes(b"\xef\xbb\xbf" + json.dumps([CLAIM]).encode())
    assert len(challenge.read(tmp_path / "q", "factcheck")) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": ["1.png", "2.png"]}, "q:1: image is ['1.png', '2.png'], expected str"),
        ({"image": [0] * 999}, "q:1: image is a list of 999, [0, 0, 0"),
        ({"image": {"path": "x" * 999}}, "q:1: image is a dict of 1, {'path': 'xxx"),
        ({"label": 1}, "q:1: label is 1, expected str"),
        ({"label": "x" * 999}, "q:1: label is a str of 999, 'xxx"),
        ({"text": "a \ud83d cat"}, r"q:1: text contains half a character, '\ud83d'"),
        ({"text": " "}, "q:1: text is ' ', expected a question"),
    ],
)
def test_a_wrong_field_is_shown_in_short(tmp_path, change, message):
    (tmp_path / "q").write_text(json.dumps(QUESTION | change))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        pope.read_questions(tmp_path / "q")
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_an_id_of_another_kind_is_named(tmp_path):
    (tmp_path / "q").write_text(json.dumps(QUESTION))
    (tmp_path / "a").write_text(json.dumps({"question_id": "1", "text": "Yes"}))
    with pytest.raises(ValueError, match="a:1: question_id is '1', expected 1: the questions have it as int"):
        pope.read_answers(tmp_path / "a", pope.read_questions(tmp_path / "q"))
    (tmp_path / "c").write_text(json.dumps([CLAIM]))
    records = challenge.read(tmp_path / "c", "factcheck")
    (tmp_path / "a").write_text(json.dumps({"question_id": "1", "choice": "A"}))
    with pytest.raises(ValueError, match="a:1: question_id '1' is not among the questions, 1 is"):
        challenge.read_answers(tmp_path / "a", records)
    (tmp_path / "a").write_text(json.dumps({"question_id": True, "choice": "A"}))
    with pytest.raises(ValueError, match="a:1: question_id is True, expected int or str"):
        challenge.read_answers(tmp_path / "a", records)


def test_mme_of_another_encoding(tmp_path):
    (tmp_path / "count.txt").write_text("1.png\tq\tYes\tyes\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"count\.txt: the file is UTF-16"):
        mme.score_folder(tmp_path)


# The mark of the image


@pytest.mark.parametrize("text", ["<image>\nIs there a cat?", "Is there a cat?\n<image>", " <image> Is there a cat?"])
def test_one_mark_at_an_end_is_taken_off(tmp_path, text):
    (tmp_path / "q").write_text(json.dumps(QUESTION | {"text": text}))
    assert pope.read_questions(tmp_path / "q")[0].text == "Is there a cat?"
    (tmp_path / "a").write_text(json.dumps({"question": text, "answer": "yes"}))
    assert pope.read_answers(tmp_path / "a", pope.read_questions(tmp_path / "q")) == ["yes"]
    (tmp_path / "c").write_text(json.dumps(CLAIM | {"context": text}))
    assert challenge.read(tmp_path / "c", "factcheck")[0].context == "Is there a cat?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is <image> a cat?", "has <image> in the middle"),
        ("<image> Is there a cat? <image>", "has <image> more than one"),
        ("<image>\n<image>\nWhich is a cat?", "has <image> more than one"),
        ("<image>", "is '', expected a question"),
    ],
)
def test_other_marks_are_refused_with_file_and_line(tmp_path, text, message):
    (tmp_path / "q").write_text(json.dumps(QUESTION) + "\n" + json.dumps(QUESTION | {"question_id": 2, "text": text}))
    with pytest.raises(ValueError, match=f"q:2: text {message}"):
        pope.read_questions(tmp_path / "q")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claim": "<image> A cat.", "context": "<image> A photo."}, "q:1: <image> occurs 2 times, expected one"),
        ({"claim": "A <image> cat."}, "q:1: statement has <image> in the middle"),
        ({"choices": ["yes", "a <image>"]}, "q:1: choices: option B contains <image>"),
    ],
)
def test_marks_in_questions_of_the_challenge(tmp_path, change, message):
    (tmp_path / "q").write_text(json.dumps(CLAIM | change))
    with pytest.raises(ValueError, match=message):
        challenge.read(tmp_path / "q", "factcheck")


def test_shown_is_short():
    assert jsonl.shown([1, 2]) == "[1, 2]"
    assert jsonl.shown([0] * 999) == "a list of 999, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ..."
