"""Questions that a processor or a batch cannot take are found before the first answer, and named."""

import json
import re

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
Image = pytest.importorskip("PIL.Image")

import zoo  # noqa: E402

from hkdfast.cli import main  # noqa: E402
from hkdfast.data.tasks import Record, example, record_of  # noqa: E402
from hkdfast.evaluate.pope import Question  # noqa: E402
from hkdfast.hf import generate  # noqa: E402
from hkdfast.hf.collator import QuestionCollator, Questions  # noqa: E402

PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.fixture(scope="module")
def processor():
    return zoo.processor("llava")


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_marks_are_found_with_their_place(family):
    found = zoo.processor(family)
    whole = [("q.json:1", "Is there a cat?"), ("q.json:2", "Is there a dog? Yes.")]
    generate.check_texts(found, whole)
    with pytest.raises(
        ValueError, match="q.json:7 contains <image>, the model's own image placeholder: 'Is <image> it.'"
    ):
        generate.check_texts(found, [*whole, ("q.json:7", "Is <image> it?")])


def test_any_text_that_the_processor_stumbles_over_is_found(processor, monkeypatch):
    template = processor.chat_template

    texts = [("q.json:1", "Is there a cat?"), ("q.json:2", "Is there a \ud83d?")]
    with pytest.raises(ValueError, match=r"^q.json:2: the processor does not accept 'Is there a \\ud83d\?': "):
        generate.check_texts(processor, texts)
    wrong = "{% if 'dog' in messages[0]['content'][1]['text'] %}{{ raise_exception('no dogs') }}{% endif %}"
    monkeypatch.setattr(processor, "chat_template", wrong + template)
    with pytest.raises(ValueError, match="^q.json:2: the processor does not accept 'Is there a dog.': no dogs"):
        generate.check_texts(processor, [("q.json:1", "Is there a cat?"), ("q.json:2", "Is there a dog?")])
    double = "{% if 'dog' in messages[0]['content'][1]['text'] %}<image>{% endif %}"
    monkeypatch.setattr(processor, "chat_template", double + template)
    with pytest.raises(
        ValueError, match="^q.json:2 gives a prompt with 2 image placeholders, expected 1: 'Is there a dog.'"
    ):
        generate.check_texts(processor, [("q.json:1", "Is there a cat?"), ("q.json:2", "Is there a dog?")])


def home(tmp_path, text):
    zoo.build("llava", seed=1).save_pretrained(tmp_path / "model")
    zoo.processor("llava").save_pretrained(tmp_path / "model")
    zoo.picture(0).save(tmp_path / "0.png")
    texts = ["Is there a cat in the image?", text]
    lines = [json.dumps({"question_id": i, "image": "0.png", "text": t, "label": "yes"}) for i, t in enumerate(texts)]
    (tmp_path / "q.json").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("Is <start> it?", [], "q.json:2 contains <start>, the model's own image placeholder"),
        ("Is it?", ["--instruction", "<end>"], "--instruction contains <end>, the model's own image placeholder"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "seed"])
def test_the_commands_refuse_before_the_first_answer(tmp_path, capsys, command, text, options, message):
    folder = home(tmp_path, text)
    words = ["--model", folder / "model", "--questions", folder / "q.json", "--images", folder]
    words = [*(["evaluate", "pope"] if command == "evaluate" else ["seed", "--use-cpu"]), *words, *options]
    assert main([*map(str, words), "--output", str(folder / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists() and not (folder / "out.answers").exists()


def test_questions_of_llavas_format_are_answered_as_others_are(tmp_path, capsys):
    answers = []
    for number, text in enumerate(("Is there a dog in the image?", "<image>\nIs there a dog in the image?")):
        (tmp_path / str(number)).mkdir()
        folder = home(tmp_path / str(number), text)
        words = ["--model", folder / "model", "--questions", folder / "q.json", "--images", folder, "--device", "cpu"]
        code = main([*map(str, ["evaluate", "pope", *words, "--max-new-tokens", 3, "--output", folder / "s.json"])])
        assert code == 0, capsys.readouterr().err
        lines = (folder / "s.answers" / "q.0.jsonl").read_text().splitlines()
        answers.append([json.loads(line)["text"] for line in lines])
    assert answers[0] == answers[1]


# Examples given in Python


def test_a_mark_at_an_end_changes_no_batch(processor):
    collator = QuestionCollator(processor)
    plain = collator([{"image": zoo.picture(0), "text": "Is there a cat?"}])
    for text in ("<image>\nIs there a cat?", "Is there a cat? <image>"):
        marked = collator([{"image": zoo.picture(0), "text": text}])
        assert (marked["input_ids"] == plain["input_ids"]).all()


GOOD = {"image": PICTURE, "text": "Is there a cat?", "answer": "Yes"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": ...}, "example 1 of the batch has no 'image', only text, answer"),
        ({"text": ...}, "example 1 of the batch has no 'text', only image, answer"),
        ({"answer": ...}, "example 1 of the batch has no 'answer', only image, text: pass a text, or None"),
        ({"image": [PICTURE, PICTURE]}, "example 1 of the batch: image is a list of 2, expected one PIL image"),
        ({"image": {"bytes": b"x" * 999}}, "example 1 of the batch: image is a dict of bytes, expected a PIL image"),
        ({"text": ["a"] * 999}, "example 1 of the batch: text is a list of 999, ['a', 'a'"),
        ({"text": "Is <image> it?"}, "example 1 of the batch: text has <image> in the middle"),
        ({"answer": 3}, "example 1 of the batch: answer is 3, expected a text, or None"),
    ],
)
def test_examples_that_are_none(processor, change, message):
    example = {name: value for name, value in (GOOD | change).items() if value is not ...}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        QuestionCollator(processor, answers=True)([GOOD, example])
    assert len(str(caught.value)) < 220
    with pytest.raises(ValueError, match="example 0 of the batch is a str, expected a dict with 'image' and 'text'"):
        QuestionCollator(processor)(["a question"])


def test_questions_that_are_none():
    asked = [Question(0, "0.png", "Is there a cat?", "yes"), Question(1, "1.png", "?", None, "q.json:2")]
    assert Questions(asked, ".")[1]["text"] == "?"
    with pytest.raises(ValueError, match="q.json:2: the question has no label, which answers=True needs"):
        Questions(asked, ".", answers=True)
    with pytest.raises(ValueError, match="question 0 is a dict, expected a Question"):
        Questions([{"image": "0.png"}], ".")


def test_the_place_of_a_record_is_no_part_of_it():
    record = Record("factcheck", "0.png", "A cat.", "", "?", ("a", "b"), "A", 3, "q.json:2")
    assert record == Record("factcheck", "0.png", "A cat.", "", "?", ("a", "b"), "A", 3)
    assert "place" not in example(record) and record_of(example(record)) == record
