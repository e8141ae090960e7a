"""TextCollator: what each form of an example learns, and what is refused."""

import pytest
import torch
import zoo
from trainers import CHAT
from zoo import one_thread  # noqa: F401

from hkdfast import notes
from hkdfast.batch import answer_rows
from hkdfast.hf import TextCollator


@pytest.fixture
def collator():
    words = zoo.tokenizer()
    words.chat_template = CHAT
    return TextCollator(words)


def learned(collator, example):
    """The texts of the tokens that a single example is learned at, and whether one is distilled without a label."""
    batch = collator([example])
    rows, labels = answer_rows(batch)
    words = collator.tokenizer.convert_ids_to_tokens([label for label in labels.tolist() if label >= 0])
    return words, int((labels < 0).sum())


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"text": "is there a cat"}, (["is", "there", "a", "cat", "</s>"], 0)),
        ({"prompt": "is there a", "completion": " cat"}, (["cat", "</s>"], 0)),
        ({"prompt": "is there a", "completion": None}, ([], 1)),
        ({"input_ids": [8, 9, 10], "labels": [-100, -100, 10]}, (None, 0)),
        ({"input_ids": [8, 9, 10], "labels": [-100] * 3, "distill_only": [False, False, True]}, ([], 1)),
    ],
)
def test_what_is_learned(collator, example, expected):
    words, unlabeled = learned(collator, example)
    assert unlabeled == expected[1]
    assert words == expected[0] if expected[0] is not None else len(words) == 1


def test_turns_of_the_assistant_are_learned(collator):
    turns = [
        {"role": "user", "content": "is there a cat"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "a dog ?"},
        {"role": "assistant", "content": "cow"},
    ]
    collator.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    assert learned(collator, {"messages": turns}) == (["no", "cow"], 0)
    asked = {"prompt": turns[:3], "completion": turns[3:]}
    assert learned(collator, asked) == (["cow"], 0)
    assert learned(collator, asked | {"completion": None}) == ([], 1)


def test_a_template_that_changes_earlier_turns_is_noted(collator, monkeypatch, capsys):
    monkeypatch.setattr(notes, "noted", set())
    collator.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else 'word' }} {% endfor %}"
    )
    turns = [{"role": "user", "content": "is there"}, {"role": "assistant", "content": "no"}] * 2
    assert learned(collator, {"messages": turns})[0] == ["no"]
    assert "1 of 2 turns of the assistant are not learned" in capsys.readouterr().err


def test_a_batch_is_padded_on_the_right(collator):
    batch = collator([{"text": "is there a cat"}, {"text": "no"}, {"prompt": "a", "completion": None}])
    pad = collator.tokenizer.pad_token_id
    assert batch["input_ids"].shape == batch["labels"].shape == batch["distill_only"].shape
    assert (batch["input_ids"][batch["attention_mask"] == 0] == pad).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["distill_only"].sum() == 1 and batch["labels"].dtype == torch.int64


def test_long_texts_are_cut(collator):
    short = TextCollator(collator.tokenizer, max_length=3)
    assert short([{"text": "is there a cat"}])["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="the first 3 tokens of its prompt leave nothing to be learned"):
        short([{"prompt": "is there a cat", "completion": " no"}])


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("text", "example 0 of the batch is a str, expected a dict"),
        ({"text": "a", "prompt": "b"}, "has both prompt and text"),
        ({"words": "a"}, "has only words, expected one of text, prompt and completion, messages, input_ids"),
        ({"text": 3}, "text is 3, expected a text"),
        ({"prompt": "a"}, "a prompt without completion"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "message 0 is .*expected a dict with role, one of system"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "begin with the assistant's"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0 has the content 3, expected a text"),
        ({"input_ids": [1, 2], "labels": [1]}, "has 2 input_ids and 1 labels"),
        ({"input_ids": [1, 2], "distill_only": [True]}, "has 2 input_ids and 1 distill_only"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "leave nothing to be learned"),
    ],
)
def test_other_examples_are_refused(collator, example, message):
    with pytest.raises(ValueError, match=message):
        collator([example])


def test_messages_need_a_template(collator):
    collator.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template: set tokenizer.chat_template"):
        collator([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])


def test_a_tokenizer_needs_a_token_to_pad_with():
    words = zoo.tokenizer()
    words.pad_token = words.eos_token = None
    with pytest.raises(ValueError, match="neither pad nor eos token"):
        TextCollator(words)
