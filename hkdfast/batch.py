"""The meaning of a batch: which positions are answers; and noise on its images."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from .heads import Head
from .noise import blend, check_images, check_noise, normal
from .ops.objective import UNLABELED
from .pixels import keep_padding, rows_of_examples, share_copies

Batch: TypeAlias = Mapping[str, Any]  # tensors by name, as a processor returns them
Model: TypeAlias = Callable[[Any], Tensor | Head]  # from a batch to logits (N, V) or a Head at its answer rows

IGNORE_INDEX = -100  # the label of a position that is not an answer
KEYS = ("input_ids", "attention_mask", "position_ids", "labels", "shift_labels", "distill_only")  # read by answer_rows


def check_keys(batch: Batch) -> None:
    """Refuse a key that looks like a misspelt one of KEYS, which would be ignored silently."""
    for key in batch:
        for right in KEYS:
            if right not in batch and key not in KEYS and one_typo(str(key).lower().replace("-", "_"), right):
                raise ValueError(f"the batch has no key {right!r} but one like it, {key!r}: rename it to {right!r}")


def one_typo(a: str, b: str) -> bool:
    """Whether two words are equal but for one letter left out, added or changed, or two neighbors swapped."""
    head = len(os.path.commonprefix([a, b]))
    a, b = a[head:], b[head:]
    tail = len(os.path.commonprefix([a[::-1], b[::-1]]))
    a, b = a[: len(a) - tail], b[: len(b) - tail]
    return len(a) <= 1 and len(b) <= 1 or len(a) == 2 and a == b[::-1]


def answer_rows(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The positions whose next token is part of an answer.

    With "shift_labels" or "labels" in the batch: positions whose next label is not -100, and positions that
    "distill_only" marks. Their next token is unknown, and only a teacher provides the target. Without labels: the last
    token of each prompt, found by "attention_mask" (padding on either side), or in a packed batch (1, T) by the
    restarts of "position_ids".

    Args:
        batch: dict with "input_ids" (B, T) and any of the keys above, all (B, T) int64, distill_only bool.

    Returns:
        rows (B, T) bool, and the next labels (N,) int64 at these N rows, `hkdfast.UNLABELED` where the label is
        unknown; None without labels.
    """
    check_keys(batch)
    if batch.get("shift_labels") is not None:
        labels = batch["shift_labels"]
    elif batch.get("labels") is not None:
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    elif batch.get("distill_only") is not None:
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    else:
        return last_tokens(batch), None
    rows = labels != IGNORE_INDEX
    if batch.get("distill_only") is not None:
        unknown = batch["distill_only"] & ~rows
        rows, labels = rows | unknown, labels.masked_fill(unknown, UNLABELED)
    return rows, labels[rows]


def last_tokens(batch: Batch) -> Tensor:
    """(B, T) bool: the last token of each prompt that is not padding."""
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and mask.dim() == 2:
        mask = mask.bool()
    else:
        mask = torch.ones_like(ids, dtype=torch.bool)
        if positions is not None and positions.shape == ids.shape:
            # the token before each restart, and the last one
            return torch.nn.functional.pad(positions[:, 1:] <= positions[:, :-1], (0, 1), value=True)
    left = mask.flip(1).cumsum(1).flip(1)  # tokens from here to the end
    return mask & (left == 1)


def derive_seed(*numbers: object) -> int:
    """One seed of 63 bits from several values; it depends on all of them."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def noised(
    batch: Batch,
    step: int = 500,
    *,
    sigma: float | None = None,
    seed: int | None = None,
    first: int = 0,
    draw: int = 0,
    placeholders: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """The batch with noise on its images: on all floating-point tensors whose name contains "pixel_values".

    Every image, tile and video frame gets its own noise of the requested strength; so does a thumbnail that shows the
    same as the tiles, and the same image at another resolution. Copies of one image share their noise: Qwen2-VL and
    related models duplicate each still image, as two frames of a patch. Images and tiles of zeros are padding in
    layouts with several images per row of the batch; they stay zero.

    Args:
        batch: dict of tensors. Not changed. The images may also be a list with one floating-point tensor (or a list of
            tensors) for each example.
        step, sigma: as in `hkdfast.diffuse`.
        seed: of the noise; None: torch's own generator. With a seed, the noise of example i (row i of "input_ids")
            depends only on (seed, first + i, draw) and on its own images, not on other examples, the division into
            batches or padding. Several prompts packed into a row are one example.
        first: index of the batch's first example.
        draw: number of the draw.
        placeholders: {"image": id, "video": id}: the tokens in "input_ids" that stand for images. With a seed, and
            images in order of image, tile or patch instead of example, they show which images belong to which example;
            without `placeholders`, "mm_token_type_ids" does. Examples with exactly one image each need neither.

    Raises:
        ValueError: if the batch has no images, or they are not floating point; if step or sigma is out of range; with a
            seed, if the batch does not show which images belong to which example, as for several images of different
            sizes per example in LLaVA-NeXT's layout. A batch of one example always works.
    """
    check_noise(step, sigma)
    names = [name for name, x in batch.items() if "pixel_values" in name and x is not None]
    if not names:
        raise ValueError(f"the batch has no images: expected 'pixel_values', got {', '.join(batch)} alone")
    found = {name: noisy(name, batch, step, sigma, seed, first, draw, placeholders) for name in names}
    return cast(Any, batch) | found  # a BatchFeature stays a BatchFeature


def noisy(
    name: str,
    batch: Batch,
    step: int,
    sigma: float | None,
    seed: int | None,
    first: int,
    draw: int,
    placeholders: Mapping[str, int | None] | None,
) -> Any:
    """The noised images of batch[name], with the same nesting of lists."""
    images, examples = batch[name], len(batch["input_ids"])

    def draw_noise(x: Tensor, *place: int) -> Tensor:
        if seed is None:
            return torch.randn(x.shape, dtype=torch.float32, device=x.device)
        return normal(x.shape, derive_seed(seed, name, first + place[0], draw, *place[1:]), x.device)

    def each(x: Any, *place: int) -> Any:
        if isinstance(x, list | tuple):
            return [each(one, *place, i) for i, one in enumerate(x)]
        return blend(x, draw_noise(x, *place), step, sigma)

    if isinstance(images, list | tuple):
        if len(images) != examples:
            raise ValueError(f"{name} is a list of {len(images)}, expected one entry for each of {examples} examples")
        check_list(name, images)
        return each(images)
    check_images(name, images)
    rows = [len(images)] if seed is None else rows_of_examples(name, images, batch, placeholders)
    noise = torch.cat([draw_noise(part, i) for i, part in enumerate(images.split(rows))])
    share_copies(noise, name, images, batch)
    return keep_padding(blend(images, noise, step, sigma), images)


def check_list(name: str, images: Sequence[Any]) -> None:
    for i, x in enumerate(images):
        (check_list if isinstance(x, list | tuple) else check_images)(f"{name}[{i}]", x)
