"""Questions about images as batches of a model: prompts alone, or with their answers."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from ..batch import IGNORE_INDEX
from ..data.generation import with_instruction
from ..data.image_mark import without_mark
from ..data.images import rgb
from ..data.jsonl import shown
from ..evaluate.pope import Question
from .generate import tokenize
from .templates import answered, image_marks, prompts


@dataclass
class QuestionCollator:
    """Makes a batch of questions, each about one image.

    An example is a dict with "image" (a PIL image or a path) and "text" (the question). If `answers` is set, it also
    has "answer": the answer text, or None if it is unknown and only the teachers provide a target. A batch is the
    processor's output, padded on the left. With answers it also has "labels" (B, T): the tokens of the answer and of
    the end of its turn, -100 elsewhere. If some answers are None, it has "distill_only" (B, T) bool: True at the last
    token of their prompts.

    Args:
        processor: for images and text, as AutoProcessor.from_pretrained returns it.
        answers: whether the batch includes the answers.
        instruction: text after every question, separated by a space, as in `GenerationOptions.instruction`.

    Raises:
        ValueError: if the processor has no tokenizer, or the tokenizer neither pad nor eos token; while batching, for
            an image that cannot be decoded, an example without image, text or answer, an example that is not a dict, or
            a text with an image placeholder that is neither first nor last.
    """

    processor: Any
    answers: bool = False
    instruction: str = ""

    def __post_init__(self) -> None:
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None:
            kind = type(self.processor).__name__
            raise ValueError(f"{kind} has no tokenizer: pass the processor of AutoProcessor.from_pretrained")
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither pad nor eos token: set processor.tokenizer.pad_token")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        texts = [self.text_of(number, example) for number, example in enumerate(examples)]
        images = [self.image_of(number, example) for number, example in enumerate(examples)]
        asked = prompts(self.processor, texts)
        if not self.answers:
            return dict(tokenize(self.processor, asked, images))
        answers = [example["answer"] for example in examples]
        whole = [
            prompt if answer is None else answered(self.processor, text, prompt, answer)
            for text, prompt, answer in zip(texts, asked, answers, strict=True)
        ]
        batch = dict(tokenize(self.processor, whole, images))
        batch["labels"] = self.labels(batch, asked, whole, answers)
        if None in answers:
            batch["distill_only"] = torch.zeros_like(batch["labels"], dtype=torch.bool)
            batch["distill_only"][:, -1] = torch.tensor([answer is None for answer in answers])
        return batch

    def text_of(self, number: int, example: Mapping[str, Any]) -> str:
        """Check an example, and return its question with the instruction."""
        where = f"example {number} of the batch"
        if not isinstance(example, Mapping):
            raise ValueError(f"{where} is a {type(example).__name__}, expected a dict with 'image' and 'text'")
        for name in ("image", "text", *(("answer",) if self.answers else ())):
            if name not in example:
                hint = ": pass a text, or None if only the teachers provide a target" if name == "answer" else ""
                raise ValueError(f"{where} has no {name!r}, only {', '.join(map(str, example))}{hint}")
        text = example["text"]
        if not isinstance(text, str):
            raise ValueError(f"{where}: text is {shown(text)}, expected a question")
        text = without_mark(f"{where}: text", text)
        found = next((mark for mark in image_marks(self.processor) if mark in text), None)
        if found:
            raise ValueError(f"{where}: text contains {found}, the model's own image placeholder: {shown(text)}")
        if self.answers and not isinstance(example["answer"], str | None):
            raise ValueError(
                f"{where}: answer is {shown(example['answer'])}, expected a text, or None if it is unknown"
            )
        return with_instruction(text, self.instruction)

    def image_of(self, number: int, example: Mapping[str, Any]) -> Image:
        try:
            return rgb(example["image"])
        except ValueError as error:
            raise ValueError(f"example {number} of the batch: {error}") from error

    def labels(
        self, batch: Mapping[str, Any], asked: list[str], answered: list[str], answers: list[str | None]
    ) -> torch.Tensor:
        """(B, T): the last tokens of each conversation, those after its prompt.

        They are counted in the texts, where an image is one token. All tokens of an image are in the prompt.
        """
        ids = batch["input_ids"]
        labels = ids.new_full(ids.shape, IGNORE_INDEX)
        encoded = (self.processor.tokenizer(texts).input_ids for texts in (asked, answered))
        for row, (prompt, whole) in enumerate(zip(*encoded, strict=True)):
            if answers[row] is None:
                continue
            count = len(whole) - len(os.path.commonprefix([prompt, whole]))
            if not count:
                raise ValueError(f"the answer adds no token to its prompt: {answered[row]!r}")
            labels[row, -count:] = ids[row, -count:]
        return labels


@dataclass
class Questions:
    """A dataset of questions about the images of a folder.

    Args:
        questions: list of `hkdfast.evaluate.pope.Question`.
        folder: of the images.
        answers: whether the examples have answers, the labels "Yes" and "No".

    Raises:
        ValueError: an element of another type, or a question without the label that `answers` needs.
    """

    questions: Sequence[Question]
    folder: Path
    answers: bool = False

    def __post_init__(self) -> None:
        for number, question in enumerate(self.questions):
            if not isinstance(question, Question):
                raise ValueError(f"question {number} is a {type(question).__name__}, expected a Question of pope")
            if self.answers and question.label is None:
                raise ValueError(f"{question.place or number}: the question has no label, which answers=True needs")

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        question = self.questions[index]
        example = {"image": Path(self.folder).expanduser() / question.image, "text": question.text}
        return example | ({"answer": str(question.label).capitalize()} if self.answers else {})
