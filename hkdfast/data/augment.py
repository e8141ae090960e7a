"""Augmentation of questions about images: reconstruction of HKD4VLM's diverse augmentation (arXiv:2506.13038).

    augment = Augment([RandomApply(Flip()), Crop(), Color(), Paraphrase(), ShuffleOptions()], seed=1)
    dataset = dataset.map(augment, with_indices=True)       # of datasets, its "image" cast to datasets.Image; or
    dataset = Augmented(examples, augment, copies=2)        # of torch: made when read, anew in each epoch

An example is a dict that `hkdfast.evaluate.choices.example` returned. Transforms of the image alone also accept a dict
with "image" and "text" only. A transform is a small dataclass. It is called with (example, rng) and returns a changed
copy of the example. The prompt is written last, from the fields, so transforms can be combined in any order. Transforms
that write new statements are in `synthetic.py`.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from ..batch import derive_seed
from ..choices import LETTERS, check_list, random_order
from .images import image_of
from .tasks import TASKS, question, record_of, template_of

SIDES = {"left": "right", "right": "left"}
# "leftmost", "left-hand" and "rightwards" name a side; "bright", "leftover" and "rights" do not
SIDE = re.compile(r"\b(left|right)(?=(?:most|wards?|hand|handed)?\b)", re.IGNORECASE)
TEXT_FIELDS = ("statement", "context", "question")  # texts about the image; "options" is a list of more


@dataclass(frozen=True)
class Augment:
    """Transforms one after the other, as a function of (example, index) for `datasets.Dataset.map`.

    What it does to an example depends on (seed, epoch, index) alone, not on the order of the examples, the number of
    processes or the global random state.

    Args:
        transforms: functions of (example, random.Random) to an example.
        seed: of all random choices.
        epoch: each epoch makes other choices. `at(epoch)` returns the same augmentation for another epoch.
    """

    transforms: Sequence[Any]
    seed: int = 0
    epoch: int = 0

    def __call__(self, example, index):
        rng = random.Random(derive_seed(self.seed, self.epoch, int(index)))
        example = dict(example)
        for transform in self.transforms:
            example = transform(example, rng)
        return asked(example)

    def at(self, epoch):
        return replace(self, epoch=epoch)


def asked(example):
    """The example with its prompt, written from its fields."""
    if "options" not in example:
        return example
    return example | {"text": question(record_of(example), template=example.get("template", 0))}


class Augmented:
    """A map-style dataset that augments each example when it is read.

    Args:
        examples: sequence of examples.
        augment: Augment.
        copies: how many augmented versions of each example there are. Index i is a version of example
            i % len(examples).

    `set_epoch`, which Trainer and accelerate call, changes the random choices in each epoch. With persistent workers
    (`dataloader_persistent_workers`) it has no effect, because each worker has its own copy of the dataset.
    """

    def __init__(self, examples, augment, copies=1):
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        self.examples, self.augment, self.copies = examples, augment, copies

    def set_epoch(self, epoch):
        self.augment = self.augment.at(epoch)

    def __len__(self):
        return len(self.examples) * self.copies

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} examples")
        return self.augment(self.examples[index % len(self.examples)], index)


@dataclass(frozen=True)
class RandomApply:
    """Apply a transform with a probability; otherwise return the example unchanged.

    Raises:
        ValueError: a probability outside 0 to 1.
    """

    transform: Any
    probability: float = 0.5

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be between 0 and 1, got {self.probability}")

    def __call__(self, example, rng):
        return self.transform(example, rng) if rng.random() < self.probability else example


@dataclass(frozen=True)
class ShuffleOptions:
    """Shuffle the options and adapt the letters of the answer: the counterpart of the mapping shift for training.

    Args:
        fixed: texts of options that keep their place; None: those of the example's task.
    """

    fixed: Sequence[str] | None = None

    def __call__(self, example, rng):
        record = record_of(example)
        fixed = TASKS[record.task].fixed if self.fixed is None else self.fixed
        order = random_order(record.options, rng, fixed)
        options = [record.options[option] for option in order]
        if record.answer is None:
            return example | {"options": options}
        places = sorted(order.index(LETTERS.index(letter)) for letter in record.answer)
        return example | {"options": options, "answer": "".join(LETTERS[place] for place in places)}


@dataclass(frozen=True)
class Paraphrase:
    """Ask the question by another template, drawn at random.

    Args:
        templates: numbers of the task's templates, or texts as `hkdfast.evaluate.choices.choice` takes them; None: all
            templates of the example's task.

    Raises:
        ValueError: if the list is empty; when called, for a template that the task does not have.
    """

    templates: Sequence[int | str] | None = None

    def __post_init__(self):
        check_list("templates", self.templates)
        if self.templates is not None and not self.templates:
            raise ValueError("templates is empty, expected at least one, or None for those of the task")

    def __call__(self, example, rng):
        task = record_of(example).task
        known = range(len(TASKS[task].templates)) if self.templates is None else self.templates
        template = rng.choice(known)
        template_of(task, template)
        return example | {"template": template}


@dataclass(frozen=True)
class Flip:
    """Mirror the image, left to right, if the texts allow it.

    Args:
        text: "refuse": an example whose statement, context, question or options mention left or right is returned
            unchanged. "swap": left and right are exchanged in the texts, whatever they mean ("has left", "is right").
            Writing in an image is mirrored too: do not use Flip where it matters.

    Raises:
        ValueError: another value of `text`.
    """

    text: str = "refuse"

    def __post_init__(self):
        if self.text not in ("refuse", "swap"):
            raise ValueError(f"unknown text {self.text!r}, expected refuse or swap")

    def __call__(self, example, rng):
        names = [name for name in TEXT_FIELDS if name in example] if "options" in example else ["text"]
        options = example.get("options", [])
        if any(SIDE.search(text) for text in (*(example[name] for name in names), *options)):
            if self.text == "refuse":
                return example
            example = example | {name: mirrored(example[name]) for name in names}
            if options:
                example["options"] = [mirrored(option) for option in options]
        return example | {"image": image_of(example).transpose(Image.Transpose.FLIP_LEFT_RIGHT)}


def mirrored(text):
    """The text with left and right exchanged; upper and lower case stay."""

    def other(found):
        word = found[1]
        swapped = SIDES[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return SIDE.sub(other, text)


@dataclass(frozen=True)
class Crop:
    """Cut out a part of the image with the same proportions and resize it to the image's size.

    Args:
        min_scale: smallest side of the part, as a fraction of the image's. A question may be about what is cut off:
            keep it near 1.

    Raises:
        ValueError: a fraction outside 0 to 1.
    """

    min_scale: float = 0.9

    def __post_init__(self):
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale must be above 0 and at most 1, got {self.min_scale}")

    def __call__(self, example, rng):
        image = image_of(example)
        side = rng.uniform(self.min_scale, 1)
        width, height = image.width * side, image.height * side
        x, y = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        part = (x, y, min(x + width, image.width), min(y + height, image.height))
        return example | {"image": image.resize(image.size, Image.Resampling.BICUBIC, part)}


@dataclass(frozen=True)
class Color:
    """Change brightness, contrast and saturation by random factors. The hue stays, because questions ask for colors.

    Args:
        brightness, contrast, saturation: each factor is drawn from 1 - x to 1 + x.

    Raises:
        ValueError: one outside 0 to 1.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __post_init__(self):
        for name, amount in vars(self).items():
            if not 0 <= amount < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {amount}")

    def __call__(self, example, rng):
        image = image_of(example)
        kinds = (ImageEnhance.Brightness, self.brightness), (ImageEnhance.Contrast, self.contrast)
        for enhance, amount in (*kinds, (ImageEnhance.Color, self.saturation)):
            image = enhance(image).enhance(rng.uniform(1 - amount, 1 + amount))
        return example | {"image": image}


@dataclass(frozen=True)
class Noise:
    """Add Gaussian noise to every pixel, as in a photo taken in poor light. Its strength is drawn for each image.

    Args:
        max_std: largest standard deviation of the noise, as a fraction of the range of a pixel.

    Raises:
        ValueError: a fraction outside 0 to 1.
    """

    max_std: float = 0.1

    def __post_init__(self):
        if not 0 <= self.max_std <= 1:
            raise ValueError(f"max_std must be between 0 and 1, got {self.max_std}")

    def __call__(self, example, rng):
        pixels = np.asarray(image_of(example), np.float32)
        normal = np.random.default_rng(rng.getrandbits(64)).standard_normal(pixels.shape, np.float32)
        noisy = pixels + 255 * rng.uniform(0, self.max_std) * normal
        return example | {"image": Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))}
