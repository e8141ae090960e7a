"""Text, prompts with completions, and conversations as batches of a language model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jinja2
import torch

from .. import notes
from ..batch import IGNORE_INDEX
from ..data.jsonl import shown

Encoded: TypeAlias = dict[str, list[Any]]
FORMS = ("input_ids", "messages", "prompt", "text")  # an example has one of these columns
ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass
class TextCollator:
    """Makes a batch of examples in text.

    An example is a dict with one of
        "text": learned from its first to its last token, and the end of the text;
        "prompt" and "completion", texts or lists of messages: the completion is learned, and its end; None where nobody
            knows it: then the prompt's end is distilled without a label;
        "messages", a list of {"role", "content"} (and "tools", if there are some): the turns of the assistant are
            learned;
        "input_ids", and "labels" where not all of them are learned; "distill_only", True where the next token is
            distilled without a label.
    Other columns are ignored. A batch holds "input_ids", "attention_mask" and "labels" (B, T), padded on the right,
    -100 where nothing is learned; and "distill_only" (B, T) bool if a completion is None.

    Args:
        tokenizer: as AutoTokenizer.from_pretrained gives.
        max_length: sequences are cut after so many tokens; None: never.

    Raises:
        ValueError: a tokenizer without pad and eos token, or without a chat template that messages need; while
            batching, an example of no such form, messages without an assistant's turn, or an example of which nothing
            is left to be learned. Names the example.
    """

    tokenizer: Any
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None and self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has neither pad nor eos token: set tokenizer.pad_token")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return self.pad([self.encode(each, f"example {place} of the batch") for place, each in enumerate(examples)])

    def pad(self, encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """A batch of what `encode` gives."""
        longest = max(len(each["input_ids"]) for each in encoded)
        end = self.tokenizer.pad_token_id
        end = self.tokenizer.eos_token_id if end is None else end

        def padded(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[*each, *[filler] * (longest - len(each))] for each in values])

        ids = [each["input_ids"] for each in encoded]
        batch = {
            "input_ids": padded(ids, end),
            "attention_mask": padded([[1] * len(each) for each in ids], 0),
            "labels": padded([each["labels"] for each in encoded], IGNORE_INDEX),
        }
        if any("distill_only" in each for each in encoded):
            marks = [each.get("distill_only", [False] * len(each["input_ids"])) for each in encoded]
            batch["distill_only"] = padded(marks, False)
        return batch

    def encode(self, example: Mapping[str, Any], where: str = "the example") -> Encoded:
        """{"input_ids", "labels"} of an example as lists, "distill_only" where its completion is None.

        Args:
            where: what an error calls it.
        """
        if not isinstance(example, Mapping):
            raise ValueError(f"{where} is a {type(example).__name__}, expected a dict")
        found = [name for name in FORMS if example.get(name) is not None]
        if len(found) != 1:
            has = f"both {' and '.join(found)}" if found else f"only {', '.join(map(str, example)) or 'nothing'}"
            raise ValueError(f"{where} has {has}, expected one of text, prompt and completion, messages, input_ids")
        encoded = getattr(self, f"encode_{found[0]}")(example, where)
        encoded = {name: values[: self.max_length] for name, values in encoded.items()}
        learned = sum(label != IGNORE_INDEX for label in encoded["labels"][1:]) + any(encoded.get("distill_only", ()))
        if not learned:
            cut = f"the first {self.max_length} tokens of " if self.max_length else ""
            raise ValueError(f"{where}: {cut}its {found[0]} leave nothing to be learned")
        return encoded

    def encode_input_ids(self, example: Mapping[str, Any], where: str) -> Encoded:
        ids = list(map(int, example["input_ids"]))
        labels = ids if example.get("labels") is None else list(map(int, example["labels"]))
        if len(labels) != len(ids):
            raise ValueError(f"{where} has {len(ids)} input_ids and {len(labels)} labels, expected one for each")
        encoded = {"input_ids": ids, "labels": list(labels)}
        if example.get("distill_only") is not None:
            encoded["distill_only"] = list(map(bool, example["distill_only"]))
            if len(encoded["distill_only"]) != len(ids):
                found = len(encoded["distill_only"])
                raise ValueError(f"{where} has {len(ids)} input_ids and {found} distill_only, expected one for each")
        return encoded

    def encode_text(self, example: Mapping[str, Any], where: str) -> Encoded:
        ids = self.tokens(checked(example, "text", where) + self.end, special=True)
        return {"input_ids": ids, "labels": list(ids)}

    def encode_prompt(self, example: Mapping[str, Any], where: str) -> Encoded:
        if "completion" not in example:
            raise ValueError(
                f"{where} has a prompt without completion: give it one, or None if a teacher is to give it"
            )
        if isinstance(example["prompt"], (list, tuple)):
            turns = list(example["prompt"])
            return self.encode_turns([*turns, *(example["completion"] or ())], where, example, first=len(turns))
        prompt = self.tokens(checked(example, "prompt", where), special=True)
        if example["completion"] is None:
            return unanswered(prompt)
        text = example["prompt"] + checked(example, "completion", where)
        return after(prompt, self.tokens(text + self.end, special=True))

    def encode_messages(self, example: Mapping[str, Any], where: str) -> Encoded:
        return self.encode_turns(list(example["messages"]), where, example)

    def encode_turns(self, turns: list[Any], where: str, example: Mapping[str, Any], first: int = 0) -> Encoded:
        """A conversation, of which the assistant's turns from number `first` on are learned.

        A turn is found by what the template adds with it. Some templates change earlier turns, they drop their thoughts
        for instance: a turn that differs from how it was written as the last one is not learned, and a note on stderr
        says so.
        """
        check_turns(turns, where)

        def render(part: list[Any], **how: Any) -> list[int]:
            try:
                text = self.tokenizer.apply_chat_template(part, tools=example.get("tools"), tokenize=False, **how)
            except (jinja2.TemplateError, TypeError, KeyError) as error:
                raise ValueError(f"{where}: the chat template does not take its messages: {error}") from error
            return self.tokens(text, special=False)

        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{where} has messages, but the tokenizer has no chat template: set tokenizer.chat_template"
            )
        if "completion" in example and example["completion"] is None:
            return unanswered(render(turns, add_generation_prompt=True))
        own = [n for n, turn in enumerate(turns) if turn["role"] == "assistant" and n >= first]
        if not own:
            raise ValueError(f"{where} has no turn of the assistant to be learned")
        ids = render(turns)
        labels, changed = [IGNORE_INDEX] * len(ids), 0
        for n in own:
            begin, end = render(turns[:n], add_generation_prompt=True), render(turns[: n + 1])
            if ids[: len(begin)] == begin and ids[: len(end)] == end and len(end) > len(begin):
                labels[len(begin) : len(end)] = end[len(begin) :]
            else:
                changed += 1
        if changed:
            notes.note_once(
                f"{where}: {changed} of {len(own)} turns of the assistant are not learned: the chat template changes "
                "them once other turns follow. Examples that end after each turn would learn all"
            )
        return {"input_ids": ids, "labels": labels}

    def tokens(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    @property
    def end(self) -> str:
        return self.tokenizer.eos_token or ""


def after(prompt: list[int], whole: list[int]) -> Encoded:
    """What a prompt's tokens are followed by is learned; a token across the border belongs to it."""
    start = len(os.path.commonprefix([prompt, whole]))
    return {"input_ids": whole, "labels": [IGNORE_INDEX] * start + whole[start:]}


def unanswered(prompt: list[int]) -> Encoded:
    marks = [False] * (len(prompt) - 1) + [True]
    return {"input_ids": prompt, "labels": [IGNORE_INDEX] * len(prompt), "distill_only": marks}


def checked(example: Mapping[str, Any], name: str, where: str) -> str:
    """A column that holds a text."""
    if not isinstance(example[name], str):
        raise ValueError(f"{where}: {name} is {shown(example[name])}, expected a text")
    return example[name]


def check_turns(turns: list[Any], where: str) -> None:
    """Refuse what is no conversation."""
    for n, turn in enumerate(turns):
        role = turn.get("role") if isinstance(turn, Mapping) else None
        if role not in ROLES:
            raise ValueError(
                f"{where}: message {n} is {shown(turn)}, expected a dict with role, one of {', '.join(ROLES)}"
            )
        if not isinstance(turn.get("content"), str | list) and not turn.get("tool_calls"):
            raise ValueError(f"{where}: message {n} has the content {shown(turn.get('content'))}, expected a text")
    if not turns or turns[0]["role"] == "assistant":
        raise ValueError(f"{where}: its messages begin with the assistant's, expected a user's or the system's")
