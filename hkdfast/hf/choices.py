"""Multiple-choice questions about images, answered by a Hugging Face model under shifts of their letters."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .. import choices
from ..choices import LETTERS, Answers
from ..data import tasks
from ..data.images import rgb
from . import generate
from .collator import QuestionCollator
from .head import head_fn

INFERENCE = tasks.ChoiceInference()
# those of it that choices.answer takes
ANSWERED = tuple(name for name in tasks.ChoiceInference.__annotations__ if name not in ("template", "multi_answer"))


def encoder(
    processor: Any, model: Any = None, folder: str | PathLike[str] | None = None, instruction: str = ""
) -> Callable[..., dict[str, Any]]:
    """`encode` for `hkdfast.choices.answer`: batches as training makes them, on the model's device and in its dtype.

    Args:
        processor: of images and text, as AutoProcessor.from_pretrained gives.
        model: what the batches are for; None: they stay as the processor makes them.
        folder: of the images, if images are file names; else they are paths or PIL images.
        instruction: follows every prompt after a space.

    Raises:
        ValueError: as `QuestionCollator`.
    """
    collators = {kind: QuestionCollator(processor, kind, instruction) for kind in (False, True)}

    def encode(prompts: list[str], images: list[Any], answers: list[str] | None = None) -> dict[str, Any]:
        pictures: dict[int, Any] = {}  # an image is decoded once for all the prompts about it
        for image in images:
            if id(image) not in pictures:
                pictures[id(image)] = picture(image, folder)
        examples = [{"image": pictures[id(image)], "text": text} for text, image in zip(prompts, images, strict=True)]
        if answers is not None:
            examples = [each | {"answer": text} for each, text in zip(examples, answers, strict=True)]
        batch = collators[answers is not None](examples)
        return {name: placed(x, model) for name, x in batch.items()}

    return encode


def picture(image: Any, folder: str | PathLike[str] | None) -> Any:
    return rgb(image if folder is None or not isinstance(image, str | PathLike) else Path(folder).expanduser() / image)


def placed(x: Any, model: Any) -> Any:
    if isinstance(x, (list, tuple)):  # some processors list their images
        return type(x)(placed(one, model) for one in x)
    if model is None or not isinstance(x, torch.Tensor):
        return x
    return x.to(model.device, dtype=model.dtype if x.is_floating_point() else None)


def answer_file(
    model: Any,
    processor: Any,
    records: Sequence[tasks.Record],
    images: str | PathLike[str],
    path: str | PathLike[str],
    inference: tasks.ChoiceInference = INFERENCE,
    *,
    name: str = "",
    resume: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Answer every record and write the answers, a JSON object a line, to a file that appears when whole.

    A line holds question_id, image_id, model_id, the prompt, the letter or letters chosen, the one without shifts, the
    log-probabilities of the options in their own order, and the settings. `evaluate.choices.read_answers` reads it.

    Args:
        model, processor: as `answer.load` gives them.
        records: list of `evaluate.tasks.Record`.
        images: folder of their images.
        path: the JSON-lines file to write. Until it is complete, finished lines are in `path` with ".partial" added.
        inference: `evaluate.tasks.ChoiceInference`.
        name: model_id of each line.
        resume: take over what a run that was stopped left, if questions, name and settings are the same.
        progress: show a bar.

    Returns:
        list of the lines, dicts.

    Raises:
        ValueError: as `hkdfast.choices.answer`; images that do not decode.
    """
    settings = asdict(inference) | {"fixed": list(inference.fixed)}  # a tuple would not come back from JSON as one
    lines = [
        {"question_id": one.question_id, "image_id": one.image, "model_id": name}
        | {"prompt": tasks.question(one, template=inference.template)}
        | {"choice": None, "unshifted": None, "scores": None, "metadata": settings}
        for one in records
    ]
    blanks = ("choice", "unshifted", "scores")
    size = inference.batch_size
    with generate.resumable_jsonl(path, lines, blanks, size, resume=resume, progress=progress) as (done, write):
        rest = [tasks.choice(one, inference.template) for one in records[len(done) :]]
        if rest:
            options = {name: getattr(inference, name) for name in ANSWERED}
            encode = encoder(processor, model, images)

            def write_batch(found: Answers) -> None:
                asked = records[len(done) : len(done) + len(found.choice)]
                write(filled(asked, found, inference.multi_answer))

            choices.answer(head_fn(model), encode, rest, on_batch=write_batch, **options)
    return done


def filled(records: Sequence[tasks.Record], found: Answers, multi_answer: bool) -> list[dict[str, Any]]:
    """The blanks of these records' lines, which their `Answers` fill in."""
    lines = []
    rows = zip(records, found.choice.tolist(), found.by_shift, found.scores.tolist(), strict=True)
    for record, place, by_shift, scores in rows:
        scores = scores[: len(record.options)]
        lines.append(
            {
                "choice": tasks.letters_of(record, place, scores, multi_answer),
                "unshifted": LETTERS[by_shift[0].argmax()],
                "scores": [score if score > -math.inf else None for score in scores],
            }
        )
    return lines
