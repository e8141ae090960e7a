"""The layout of images in a batch: which rows belong to which example, which are copies, which are padding.

Depending on the model, `pixel_values` has a row for each example, each image, each tile or each patch. Except for the
first, the number of rows per example is found in other tensors of the batch, or not at all.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import isqrt
from typing import Any

import torch
from torch import Tensor

# keys with the number of rows of each image, and of the images of each example, for processors that return them
ROWS = {
    "videos": ("video_grid_thw",),
    "local": ("num_local_patches",),
    "": ("image_grid_thw", "image_grid_hw", "num_patches", "num_crops"),
}
PICTURES = ("batch_num_images", "images_per_sample")
# keys with the pixels or patches of each image, for layouts with padded rows: placeholders are proportional to them
AREAS = ("spatial_shapes", "image_sizes")


def rows_of_examples(
    name: str, pixels: Tensor, batch: Mapping[str, Any], placeholders: Mapping[str, int | None] | None = None
) -> list[int]:
    """How many rows of the tensor batch[name] belong to each example, which is a row of batch["input_ids"].

    Raises:
        ValueError: if the batch does not say.
    """
    examples = len(batch["input_ids"])
    if examples == 1:
        return [len(pixels)]
    if pixels.dim() >= 5 and len(pixels) == examples and batch.get("image_sizes") is None:
        return [1] * examples  # (B, images, ...), padded with images of zeros
    sizes = rows_of_pictures(name, pixels, batch) or [1] * len(pixels)
    counts = pictures_of_examples(name, pixels, sizes, batch, placeholders)
    if counts is None:
        raise ValueError(
            f"{name} has {len(pixels)} rows for {examples} examples, and the batch does not show which rows belong to "
            "which example: use batches of one example"
        )
    ends = [0, *accumulate(counts)]
    return [sum(sizes[start:end]) for start, end in zip(ends, ends[1:], strict=False)]


def rows_of_pictures(name: str, pixels: Tensor, batch: Mapping[str, Any]) -> list[int] | None:
    """The number of rows of each image, from its grid or count; None if the batch has none that fits."""
    for key in next(keys for kind, keys in ROWS.items() if name.endswith(kind)):
        if batch.get(key) is not None:
            counts = torch.as_tensor(batch[key])
            sizes = (counts.prod(-1) if "grid" in key else counts.flatten()).tolist()
            if sum(sizes) == len(pixels):
                return sizes
    return None


def pictures_of_examples(
    name: str,
    pixels: Tensor,
    sizes: list[int],
    batch: Mapping[str, Any],
    placeholders: Mapping[str, int | None] | None,
) -> list[int] | None:
    """The number of images of each example, or None if unknown."""
    examples, tokens = len(batch["input_ids"]), tokens_of_examples(name, batch, placeholders)
    for key in PICTURES:
        if batch.get(key) is not None:
            counts = torch.as_tensor(batch[key]).flatten().tolist()
            if len(counts) == examples and sum(counts) == len(sizes):
                return counts
    if tokens is not None:
        weights = weights_of_pictures(name, pixels, sizes, batch)
        shares = weights and divide(weights, tokens)
        if shares:
            return shares
    return [1] * examples if len(sizes) == examples and (tokens is None or all(tokens)) else None


def weights_of_pictures(name: str, pixels: Tensor, sizes: list[int], batch: Mapping[str, Any]) -> list[int] | None:
    """For each image a number to which its placeholders are proportional; None if the batch has none."""
    areas = [batch[key] for key in AREAS if batch.get(key) is not None and "video" not in name]
    if not areas:
        return sizes
    # with tiles, (images, tiles, C, H, W), the sizes are those of the images before they were cut
    weights = torch.as_tensor(areas[0]).prod(-1).flatten().tolist()
    return weights if pixels.dim() < 5 and len(weights) == len(sizes) else None


def tokens_of_examples(
    name: str, batch: Mapping[str, Any], placeholders: Mapping[str, int | None] | None
) -> list[int] | None:
    """The number of image placeholders in each example; None if unknown."""
    kind, ids, kinds = "video" if "video" in name else "image", batch["input_ids"], batch.get("mm_token_type_ids")
    if placeholders and placeholders.get(kind) is not None:
        marked = ids == placeholders[kind]
    elif kinds is not None and kinds.shape == ids.shape:
        marked = kinds == (2 if kind == "video" else 1)
    else:
        return None
    counts = marked.sum(-1).tolist()
    return counts if any(counts) else None


def divide(weights: Sequence[int], tokens: Sequence[int]) -> list[int] | None:
    """Divide the weights, in their order, among the examples in proportion to their tokens: the number of weights of
    each example, or None if there is no exact division."""
    total, ends = sum(weights), {end: count for count, end in enumerate(accumulate(weights), 1)} | {0: 0}
    shares = [divmod(end * total, sum(tokens)) for end in accumulate(tokens)]
    if any(rest or end not in ends for end, rest in shares):
        return None
    reached = [0, *(ends[end] for end, _ in shares)]
    return [after - before for before, after in zip(reached, reached[1:], strict=False)]


def share_copies(noise: Tensor, name: str, pixels: Tensor, batch: Mapping[str, Any]) -> None:
    """Give equal frames of a temporal patch the same noise, in place.

    A row of patches (N, 3 * 2 * P * P) holds two frames. For a still image, or the odd last frame of a video, they are
    copies. In Qwen2-VL and related models the channels are the outer dimension, in others the frames.
    """
    grid = batch.get("video_grid_thw" if "video" in name else "image_grid_thw")
    if grid is None or pixels.dim() != 2 or pixels.shape[1] != 6 * isqrt(pixels.shape[1] // 6) ** 2:
        return  # with one frame a row has 3 * P * P values, which is never 6 times a square
    grid = torch.as_tensor(grid)
    sizes = grid.prod(-1).tolist()
    if sum(sizes) != len(pixels):
        return
    for frames, x, z in zip(grid[:, 0].tolist(), pixels.split(sizes), noise.split(sizes), strict=True):
        done = torch.zeros(frames, dtype=torch.bool, device=pixels.device)
        for layout, axis in (((3, 2), 3), ((2, 3), 2)):
            x, z = (t.view(frames, -1, *layout, pixels.shape[1] // 6) for t in (x, z))
            same = (x == x.narrow(axis, 0, 1)).flatten(1).all(1) & ~done
            z.copy_(torch.where(same.view(-1, 1, 1, 1, 1), z.narrow(axis, 0, 1), z))
            done |= same


def keep_padding(noisy: Tensor, pixels: Tensor) -> Tensor:
    """Set images and tiles of zeros, (..., C, H, W) in each row, to zero again: Idefics and SmolVLM recognize padding
    by its zeros."""
    if pixels.dim() < 5:
        return noisy
    blank = (pixels == 0).flatten(-3).all(-1)[..., None, None, None]
    return torch.where(blank, pixels, noisy)
