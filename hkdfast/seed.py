"""SEED step by step, as plain functions over a model and a batch: reconstruction of SEED (arXiv:2507.04680).

    clean, confidence = identify(teacher, batch)              where is the model unsure of its answers?
    noisy = isolate(teacher, batch)                           what would it say without a clear view?
    loss, metrics = distil(student, batch, purify(clean, noisy, alpha=1.5))

A batch is a dict of tensors, as a processor makes it. A model is any function of a batch that returns what comes next
at the batch's answer rows, in the order of `answer_rows`: logits (N, V) or a `Head`. `hkdfast.hf.answers` makes such a
function of a Hugging Face model. Teacher and student may be one model, with its adapter off and on.
"""

import hashlib
import math

import torch

from .arguments import check_word
from .contrast import WORDS, purify
from .distill import distill_loss
from .noise import diffuse
from .objective import UNLABELLED

__all__ = ["answer_rows", "distil", "identify", "isolate", "noised", "purify"]

IGNORE = -100  # the label of a position that is not an answer


def answer_rows(batch):
    """The positions whose next token is (part of) an answer.

    With "shift_labels" or "labels" in the batch: those whose next label is not -100, and those that "distil_only"
    marks: what comes next there is not known, but a teacher is asked. Without labels: the last token of each prompt, by
    "attention_mask" (padding on either side); in a packed batch (1, T) by the restarts of "position_ids".

    Args:
        batch: dict with "input_ids" (B, T) and, where there are some, the above, all (B, T) int64; distil_only bool.

    Returns:
        rows (B, T) bool, and the next labels (N,) int64 of those rows, `hkdfast.UNLABELLED` where it is not known; None
        without labels.
    """
    if batch.get("shift_labels") is not None:
        labels = batch["shift_labels"]
    elif batch.get("labels") is not None:
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    elif batch.get("distil_only") is not None:
        labels = torch.full_like(batch["input_ids"], IGNORE)
    else:
        return last_tokens(batch), None
    rows = labels != IGNORE
    if batch.get("distil_only") is not None:
        unknown = batch["distil_only"] & ~rows
        rows, labels = rows | unknown, labels.masked_fill(unknown, UNLABELLED)
    return rows, labels[rows]


def last_tokens(batch):
    """(B, T) bool: the last token of each prompt that is not padding."""
    ids, mask, positions = (batch.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if mask is not None and mask.dim() == 2:
        mask = mask.bool()
    else:
        mask = torch.ones_like(ids, dtype=torch.bool)
        if positions is not None and positions.shape == ids.shape:
            # one token before each restart, and the very last
            return torch.nn.functional.pad(positions[:, 1:] <= positions[:, :-1], (0, 1), value=True)
    left = mask.flip(1).cumsum(1).flip(1)  # tokens from here to the end
    return mask & (left == 1)


def mixed(*numbers):
    """One seed made of several numbers: 63 bits that depend on all of them."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def noised(batch, step=500, *, sigma=None, seed=None, first=0, draw=0):
    """The batch with noise on its images: every floating-point tensor whose name starts with "pixel_values".

    Args:
        batch: dict of tensors. Not changed.
        step, sigma: as in `hkdfast.diffuse`.
        seed: of the noise, or None to draw from torch's own generator. With a seed, the noise of example i depends on
            (seed, first + i, draw) alone, however the examples are split into batches; where the images cannot be told
            apart by example (their number is no multiple of the batch's) it depends on (seed, first, draw).
        first: index of the batch's first example.
        draw: number of the draw.

    Raises:
        ValueError: if the batch has no such tensor, or a step or sigma is out of range.
    """
    names = [name for name, x in batch.items() if name.startswith("pixel_values") and is_image(x)]
    if not names:
        listed = [name for name, x in batch.items() if name.startswith("pixel_values")]
        found = f"{listed[0]!r} as a {type(batch[listed[0]]).__name__}" if listed else f"{', '.join(batch)} alone"
        raise ValueError(f"the batch has no images: expected 'pixel_values' as one floating-point tensor, got {found}")
    examples = len(batch["input_ids"])
    return batch | {name: noise(batch[name], examples, step, sigma, seed, first, draw) for name in names}


def is_image(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def noise(images, examples, step, sigma, seed, first, draw):
    if seed is None:
        return diffuse(images, step, sigma=sigma)
    parts = examples if len(images) % examples == 0 else 1
    generator = torch.Generator(images.device)
    return torch.cat(
        [
            diffuse(part, step, sigma=sigma, generator=generator.manual_seed(mixed(seed, first + i, draw)))
            for i, part in enumerate(images.tensor_split(parts))
        ]
    )


def identify(model, batch, *, confidence="max_prob", tiles="float32", memory=None, backend=None):
    """How sure the model is of its answers.

    Args:
        model: function of a batch, see the head of this module. No gradient passes.
        batch: dict of tensors.
        confidence: "max_prob": the largest probability. "entropy": 1 - H / log V. "target": the probability of the
            label; the batch then needs labels.
        tiles, memory, backend: as in `distill_loss`.

    Returns:
        what the model returned, and the confidence of each answer row: (N,) float32 between 0 and 1.

    Raises:
        ValueError: on an unknown confidence, or "target" without labels.
    """
    check_word("confidence", confidence, WORDS["confidence"])
    labels = answer_rows(batch)[1]
    # only where a row may be without one does the host wait for a look
    asks = confidence == "target"
    if asks and (labels is None or batch.get("distil_only") is not None and (labels == UNLABELLED).any()):
        raise ValueError('confidence "target" needs labels in the batch, of every answer row')
    with torch.no_grad():
        clean = model(batch)
        _, metrics = distill_loss(
            clean, clean, labels=labels, metrics=True, tiles=tiles, memory=memory, backend=backend
        )
    if confidence == "entropy":
        return clean, 1 - metrics["teacher_entropy"] / math.log(max(clean.shape[-1], 2))
    return clean, metrics["confidence"] if confidence == "max_prob" else (-metrics["cross_entropy"]).exp()


def isolate(model, batch, *, step=500, sigma=None, draws=1, seed=None, first=0):
    """What the model answers when noise hides the images, so that it leans on what its language believes.

    Args:
        model: function of a batch, see the head of this module. No gradient passes.
        batch, step, sigma, seed, first: as in `noised`.
        draws: how often noise is drawn and the model run.

    Returns:
        list of what the model returned, one per draw, for `purify`, which averages them.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    with torch.no_grad():
        return [model(noised(batch, step, sigma=sigma, seed=seed, first=first, draw=draw)) for draw in range(draws)]


def distil(model, batch, teacher, divergence="reverse_kl", **options):
    """The student's loss against the purified teacher, mode-seeking unless another divergence is named.

    Args:
        model: the student, a function of a batch, see the head of this module. Gets the gradient.
        batch: dict of tensors; its labels, if any, are those that hard_weight and the confidence "target" read.
        teacher: what `purify` returned, or any teacher of `distill_loss`.
        divergence, options: as in `distill_loss`.

    Returns:
        the loss and a dict of per-row metrics, as `distill_loss` with metrics=True.
    """
    labels = answer_rows(batch)[1]
    return distill_loss(model(batch), teacher, divergence, labels=labels, metrics=True, **options)
