"""Multiple-choice questions about images, answered by a Hugging Face model under shifts of their letters."""

import math
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from .. import choices
from ..choices import LETTERS
from ..evaluate import tasks
from . import answer
from .collator import QuestionCollator
from .head import answers as model_answers

INFERENCE = tasks.Inference()
# those of it that choices.answer takes
ANSWERED = tuple(name for name in tasks.Inference.__annotations__ if name not in ("template", "several"))


def encoder(processor, model=None, folder=None, instruction=""):
    """`encode` for `hkdfast.choices.answer`: batches as training makes them, on the model's device and in its dtype.

    Args:
        processor: of images and text, as AutoProcessor.from_pretrained gives.
        model: what the batches are for; None: they stay as the processor makes them.
        folder: of the images, where a question is about a file name; else it is about a path or a PIL image.
        instruction: follows every prompt after a space.

    Raises:
        ValueError: as `QuestionCollator`.
    """
    collators = {kind: QuestionCollator(processor, kind, instruction) for kind in (False, True)}

    def encode(prompts, abouts, answers=None):
        pictures = {}  # an image is decoded once for all the prompts about it
        for about in abouts:
            if id(about) not in pictures:
                pictures[id(about)] = picture(about, folder)
        examples = [{"image": pictures[id(about)], "text": text} for text, about in zip(prompts, abouts, strict=True)]
        if answers is not None:
            examples = [each | {"answer": text} for each, text in zip(examples, answers, strict=True)]
        batch = collators[answers is not None](examples)
        return {name: placed(x, model) for name, x in batch.items()}

    return encode


def picture(about, folder):
    if isinstance(about, Image.Image):
        return about.convert("RGB")
    return answer.read_image(about if folder is None else Path(folder).expanduser() / about)


def placed(x, model):
    if isinstance(x, (list, tuple)):  # some processors list their images
        return type(x)(placed(one, model) for one in x)
    if model is None or not isinstance(x, torch.Tensor):
        return x
    return x.to(model.device, dtype=model.dtype if x.is_floating_point() else None)


def answer_file(model, processor, records, images, path, inference=INFERENCE, *, name="", resume=False, progress=True):
    """Answer every record and write the answers, a JSON object a line, to a file that appears when whole.

    A line holds question_id, image_id, model_id, the prompt, the letter or letters chosen, the one without shifts, the
    log-probabilities of the options in their own order, and the settings. `evaluate.choices.read_answers` reads it.

    Args:
        model, processor: as `answer.load` gives them.
        records: list of `evaluate.tasks.Record`.
        images: folder of their images.
        path: the JSON-lines file to write. Until it is whole, what is done stands in `path` with ".partial" added.
        inference: `evaluate.tasks.Inference`.
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
    with answer.filling(path, lines, blanks, size, resume=resume, progress=progress) as (done, write):
        rest = [tasks.choice(one, inference.template) for one in records[len(done) :]]
        if rest:
            options = {name: getattr(inference, name) for name in ANSWERED}
            encode = encoder(processor, model, images)

            def tell(found):
                asked = records[len(done) : len(done) + len(found.choice)]
                write(filled(asked, found, inference.several))

            choices.answer(model_answers(model), encode, rest, tell=tell, **options)
    return done


def filled(records, found, several):
    """The blanks of these records' lines, which their `Answers` fill in."""
    lines = []
    rows = zip(records, found.choice.tolist(), found.by_shift, found.scores.tolist(), strict=True)
    for record, place, by_shift, scores in rows:
        scores = scores[: len(record.options)]
        lines.append(
            {
                "choice": tasks.named(record, place, scores, several),
                "unshifted": LETTERS[by_shift[0].argmax()],
                "scores": [score if score > -math.inf else None for score in scores],
            }
        )
    return lines
