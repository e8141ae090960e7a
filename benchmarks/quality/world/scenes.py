"""The picture world: photo cut-outs of 48 objects, scattered over the background of one of six scenes.

An image shows two to four objects, one per quadrant. Objects of one scene keep each other's company (`BIAS`), which
is the statistical prior that a language model learns and later mistakes for sight.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

CUTOUTS = Path(__file__).parent / "cutouts"
SCENES = {
    "kitchen": ("teapot", "mug", "kettle", "banana", "apple", "orange", "tomato", "broccoli"),
    "farm": ("cow", "sheep", "pig", "horse", "rooster", "dog", "rabbit", "goat"),
    "wild": ("elephant", "giraffe", "zebra", "lion", "tiger", "bear", "gorilla", "camel"),
    "sea": ("dolphin", "orca", "clownfish", "lobster", "seahorse", "penguin", "otter", "seagull"),
    "street": ("car", "firetruck", "bus", "truck", "mailbox", "bin", "tricycle", "dumper"),
    "play": ("guitar", "violin", "trumpet", "drum", "soccerball", "basketball", "camera", "trophy"),
}
OBJECTS = tuple(name for names in SCENES.values() for name in names)
PER_SCENE = 8
SCENE_OF = np.arange(len(OBJECTS)) // PER_SCENE
COLOURS = np.array(
    [(200, 180, 140), (90, 150, 60), (190, 140, 70), (50, 100, 190), (120, 120, 125), (150, 80, 150)], np.float32
)
SIZE = 64  # pixels a side
SPRITES = (20, 30)  # the longest side of an object, in pixels
BIAS = 0.85  # chance that an object is drawn from the image's own scene


@cache
def cutout(index):
    return Image.open(CUTOUTS / f"{OBJECTS[index]}.png").convert("RGBA")


@cache
def sprite(index, size, flipped):
    """Colours (h, w, 3) in 0..255 and opacity (h, w, 1) in 0..1 of one object whose longest side is `size`."""
    image = cutout(index)
    ratio = size / max(image.size)
    image = image.resize([max(2, int(side * ratio)) for side in image.size], Image.LANCZOS)
    if flipped:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image, np.float32)
    return pixels[..., :3], pixels[..., 3:] / 255


def sample(rng, bias=BIAS):
    """Two to four different objects that keep company."""
    count, scene = rng.integers(2, 5), rng.integers(len(SCENES))
    objects = []
    while len(objects) < count:
        own = rng.random() < bias
        index = int(PER_SCENE * scene + rng.integers(PER_SCENE)) if own else int(rng.integers(len(OBJECTS)))
        if index not in objects:
            objects.append(index)
    return objects


def render(objects, rng, scene=None):
    """Draw objects into quadrants picked at random.

    Without `scene` the background is that of the first object's scene, in one image of twenty any.

    Returns:
        the image (64, 64, 3) uint8, the quadrant of each object, and the scene of the background.
    """
    if scene is None:
        scene = SCENE_OF[objects[0]] if rng.random() < 0.95 else rng.integers(len(SCENES))
    # a colour field of nine patches: coarse enough to survive the noise that hides the objects
    patches = np.clip(COLOURS[scene] + rng.normal(0, 28, (3, 3, 3)), 0, 255).astype(np.uint8)
    image = np.asarray(Image.fromarray(patches).resize((SIZE, SIZE), Image.BICUBIC), np.float32)
    image = image + rng.normal(0, 6, (SIZE, SIZE, 1))
    half = SIZE // 2
    quadrants = rng.permutation(4)[: len(objects)]
    for index, quadrant in zip(objects, quadrants, strict=True):
        colours, opacity = sprite(index, int(rng.integers(SPRITES[0], SPRITES[1] + 1)), bool(rng.integers(2)))
        height, width, _ = colours.shape
        top = half * (quadrant // 2) + rng.integers(half - height + 1)
        left = half * (quadrant % 2) + rng.integers(half - width + 1)
        spot = image[top : top + height, left : left + width]
        spot += opacity * (colours - spot)
    return np.clip(image, 0, 255).astype(np.uint8), quadrants, int(scene)


def pictures(count, rng, bias=BIAS):
    """`count` images (count, 64, 64, 3) and the objects in each."""
    objects = [sample(rng, bias) for _ in range(count)]
    return np.stack([render(names, rng)[0] for names in objects]), objects


@cache
def company(bias=BIAS, images=20000):
    """(48, 48) how often two objects share an image: the count behind adversarial questions."""
    rng = np.random.default_rng(5)
    counts = np.zeros((len(OBJECTS), len(OBJECTS)))
    for _ in range(images):
        objects = sample(rng, bias)
        counts[np.ix_(objects, objects)] += 1
    np.fill_diagonal(counts, 0)
    return counts
