"""Questions about images as batches of a model: prompts alone, or with their answers."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..batch import IGNORE_INDEX
from ..data.images import image_of
from .generate import tokenize
from .templates import answered, prompts


@dataclass
class QuestionCollator:
    """Makes a batch of questions, each about one image.

    An example is a dict with "image" (a PIL image or a path) and "text" (the question), and with "answer" (the text to
    be answered, or None where nobody knows it) if `answers` is set. A batch holds what the processor makes of them,
    padded on the left; with answers also "labels" (B, T): the tokens of the answer and of the end of its turn, -100
    elsewhere; and if some are None "distill_only" (B, T) bool: where such an answer would begin, the end of its prompt.

    Args:
        processor: of images and text, as AutoProcessor.from_pretrained gives.
        answers: whether the answers belong into the batch.
        instruction: text after every question, separated by a space, as in `GenerationOptions.instruction`.

    Raises:
        ValueError: if the processor has no tokenizer, or that has neither pad nor eos token; while batching, for an
            image that does not decode, or an example that lacks its answer.
    """

    processor: Any
    answers: bool = False
    instruction: str = ""

    def __post_init__(self):
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None:
            kind = type(self.processor).__name__
            raise ValueError(f"{kind} has no tokenizer: pass the processor of AutoProcessor.from_pretrained")
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither pad nor eos token: set processor.tokenizer.pad_token")

    def __call__(self, examples):
        texts = [f"{example['text']} {self.instruction}".strip() for example in examples]
        images = [image_of(example) for example in examples]
        asked = prompts(self.processor, texts)
        if not self.answers:
            return dict(tokenize(self.processor, asked, images))
        for example in examples:
            if "answer" not in example:
                raise ValueError(
                    f'the example {example["text"]!r} has no "answer": give it one, or None if a teacher is to give it'
                )
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

    def labels(self, batch, asked, answered, answers):
        """(B, T): the last tokens of each conversation, as many as it has beyond its prompt.

        They are counted in the texts, where an image is one token: all of its tokens stand in the prompt.
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
    """

    questions: list
    folder: Path
    answers: bool = False

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, index):
        question = self.questions[index]
        example = {"image": Path(self.folder).expanduser() / question.image, "text": question.text}
        return example | ({"answer": question.label.capitalize()} if self.answers else {})
