"""Questions about the picture world: POPE's three splits with answers, and training prompts without.

    python benchmarks/quality/run.py questions 1001 /tmp/pope --images 500
    hkdfast evaluate pope ...

POPE (Li et al., 2023, arXiv:2305.10355) asks "Is there a X in the image?", as often about objects that are there as
about objects that are not. The splits differ in the latter: random ones; those most frequent in the set; those that
most often accompany what the image shows.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from world.scenes import OBJECTS, company, pictures
from world.tinyllava import ask, normalised, question

SPLITS = ("random", "popular", "adversarial")
EACH = 2  # objects asked for that are there, and that are not, per image and split


def absent(objects, rng, split, frequency):
    """Two objects that the image does not show, chosen as the split says."""
    others = rng.permutation([index for index in range(len(OBJECTS)) if index not in objects])
    if split == "popular":
        others = sorted(others, key=lambda index: -frequency[index])
    elif split == "adversarial":
        together = company()[objects].sum(0)
        others = sorted(others, key=lambda index: -together[index])
    return others[:EACH]


def pope(count, seed):
    """A question set over `count` new images.

    Returns:
        the images (count, 64, 64, 3) uint8, and for each split an array (4 * count, 3) of image, object and whether it
        is there.
    """
    rng = np.random.default_rng(seed)
    images, contents = pictures(count, rng)
    frequency = np.bincount(np.concatenate(contents), minlength=len(OBJECTS))
    splits = {}
    for split in SPLITS:
        rows = []
        for image, objects in enumerate(contents):
            for there, not_there in zip(
                rng.permutation(objects)[:EACH], absent(objects, rng, split, frequency), strict=True
            ):
                rows += [(image, there, 1), (image, not_there, 0)]
        splits[split] = np.array(rows)
    return images, splits


def prompts(model, tokenizer, count, seed, yes=0.65, device="cpu"):
    """Training prompts: eight unlabelled questions about each of `count` new images.

    Four are asked as instruction data asks, a share `yes` of them about something that is there; their answers are
    dropped. Four are drawn from sixteen objects chosen blindly, the more likely the less sure the model is.

    Returns:
        the images, and an array (8 * count, 2) of image and object.
    """
    rng = np.random.default_rng(seed)
    images, contents = pictures(count, rng)
    asked = np.empty((count, 20), np.int64)
    for image, objects in enumerate(contents):
        there = rng.random(4) < yes
        others = rng.permutation([index for index in range(len(OBJECTS)) if index not in objects])[:4]
        asked[image, :4] = np.where(there, rng.choice(objects, 4), others)
        asked[image, 4:] = rng.permutation(len(OBJECTS))[:16]
    blind = asked[:, 4:]
    logits = ask(model, tokenizer, normalised(images).to(device), np.arange(count).repeat(16), blind.reshape(-1))
    sure = logits.softmax(-1).amax(-1).double().numpy().reshape(blind.shape)
    doubt = 1.02 - sure  # never zero, so that four can be drawn
    chosen = [
        rng.choice(row, 4, replace=False, p=weight / weight.sum()) for row, weight in zip(blind, doubt, strict=True)
    ]
    asked = np.concatenate([asked[:, :4], chosen], 1)
    return images, np.stack([np.arange(count).repeat(8), asked.reshape(-1)], 1)


def write_images(images, folder):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / image_name(number))


def image_name(number):
    return f"images/{number:06d}.png"


def write_pope(images, splits, folder):
    """Write the set as POPE publishes its own: one JSON line per question, a file per split, the images beside them."""
    write_images(images, folder)
    for split, rows in splits.items():
        with open(folder / f"pope_{split}.json", "w") as file:
            for number, (image, index, there) in enumerate(rows, 1):
                line = {"question_id": number, "image": image_name(image), "text": question(index)}
                print(json.dumps(line | {"label": "yes" if there else "no"}), file=file)


def write_prompts(images, rows, folder):
    """Write training prompts in the same format, without labels."""
    write_images(images, folder)
    with open(folder / "prompts.json", "w") as file:
        for number, (image, index) in enumerate(rows, 1):
            print(json.dumps({"question_id": number, "image": image_name(image), "text": question(index)}), file=file)


def add_arguments(parser):
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=500)


def run(options):
    write_pope(*pope(options.images, options.seed), options.folder)
