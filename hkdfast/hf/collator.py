"""Questions about images as batches of a model: prompts alone, or with their answers."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

IGNORE = -100


def open_image(image):
    """A PIL image in RGB, from a PIL image or the path of one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not an image, or a damaged one; the message names it.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as file:
            return file.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {str(image)!r}: {error}") from error


@dataclass
class QuestionCollator:
    """Makes a batch of questions, each about one image.

    An example is a dict with "image" (a PIL image or a path) and "text" (the question); with "answer" (the text to be
    answered) if `answers` is set. A batch holds what the processor makes of them, padded; with answers also "labels":
    the tokens of the answer and of the end of its turn, -100 elsewhere.

    Args:
        processor: a processor with a tokenizer that has a pad token, as AutoProcessor.from_pretrained gives.
        answers: whether examples have answers that belong into the batch.
        prompt: how a prompt is written, with {question} and the processor's image token, e.g.
            "USER: <image>\\n{question} ASSISTANT:"; None: the processor's chat template writes it.
        suffix: added to each question, e.g. " Please answer this question with one word."

    Raises:
        ValueError: if the processor has no tokenizer, no pad token, or neither chat template nor `prompt` is there.
    """

    processor: Any
    answers: bool = False
    prompt: str | None = None
    suffix: str = ""

    def __post_init__(self):
        kind = type(self.processor).__name__
        if getattr(self.processor, "tokenizer", None) is None:
            raise ValueError(f"{kind} has no tokenizer: pass the processor of AutoProcessor.from_pretrained")
        if self.tokenizer.pad_token is None:
            raise ValueError(
                "the tokenizer has no pad token: set one, e.g. processor.tokenizer.pad_token = "
                "processor.tokenizer.eos_token"
            )
        if self.prompt is None and not getattr(self.processor, "chat_template", None):
            raise ValueError(
                f"{kind} has no chat template: give a prompt, e.g. 'USER: <image>\\n{{question}} ASSISTANT:'"
            )
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError(f"prompt {self.prompt!r} does not say where the {{question}} goes")

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    def written(self, question, answer=None):
        """A conversation as text: up to where the answer begins, or to the end of the answer's turn."""
        question = question + self.suffix
        if self.prompt is not None:
            text = self.prompt.replace("{question}", question)
            return text if answer is None else f"{text} {answer}{self.tokenizer.eos_token or ''}"
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)

    def __call__(self, examples):
        answers = [example["answer"] if self.answers else None for example in examples]
        texts = [self.written(example["text"], answer) for example, answer in zip(examples, answers, strict=True)]
        images = [[open_image(example["image"])] for example in examples]
        batch = dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt"))
        if self.answers:
            batch["labels"] = self.labels(batch, texts, [self.written(example["text"]) for example in examples])
        return batch

    def labels(self, batch, texts, prompts):
        """(B, T): the last tokens of each text, as many as it has beyond its prompt.

        Counted on the unexpanded texts: an image's tokens all stand in the prompt.
        """
        labels = batch["input_ids"].new_full(batch["input_ids"].shape, IGNORE)
        pairs = zip(*(self.tokenizer(list(column)).input_ids for column in (texts, prompts)), strict=True)
        for row, (text, prompt) in enumerate(pairs):
            count = len(text) - len(os.path.commonprefix([text, prompt]))
            if not count:
                raise ValueError(f"the answer of {texts[row]!r} adds no token to its prompt")
            places = batch["attention_mask"][row].nonzero().squeeze(-1)[-count:]
            labels[row, places] = batch["input_ids"][row, places]
        return labels

    def generate(self, model, examples, **options):
        """The model's answers to the questions, as texts. Padding is on the left, whatever the tokenizer's side.

        Args:
            model: the model, or the PEFT model around it.
            examples: list of dicts with "image" and "text".
            options: of model.generate, e.g. max_new_tokens=5, do_sample=True.
        """
        side, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        try:
            prompts = QuestionCollator(self.processor, False, self.prompt, self.suffix)
            batch = {name: x.to(model.device) for name, x in prompts(examples).items()}
        finally:
            self.tokenizer.padding_side = side
        made = model.generate(**batch, **{"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id} | options)
        return self.tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass
class Questions:
    """A dataset of questions about the images of a folder, from what `hkdfast.evaluate.pope.read_questions` gives."""

    questions: list
    folder: Path
    answers: bool = False

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, index):
        question = self.questions[index]
        example = {"image": Path(self.folder) / question.image, "text": question.text}
        return example | ({"answer": question.label.capitalize()} if self.answers else {})
