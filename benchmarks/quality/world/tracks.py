"""The two tracks of the Responsible-AI challenge, asked about the picture world.

    python benchmarks/quality/run.py track hallucination 7 out/track --questions 500
    python benchmarks/quality/run.py export chains/seed1/L --output out/models
    hkdfast evaluate choices --task hallucination --data out/track/questions.json --images out/track \\
        --model out/models/chains/seed1/L --template $'{statement}?\\n{options}' --output out/choices.json

"hallucination": which phrase of a caption is not in the image, A to D, D being "No hallucination". "factcheck": a claim
of two parts. The first names an object in sight, and the image decides. The second says when or where the photo was
taken, and the context decides, unless it tells of something else: then the claim is not verifiable. Otherwise it is
true, partially true or false as two, one or none of its parts are right.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from hkdfast.choices import LETTERS, OPTIONS_PLACEHOLDER
from hkdfast.data.augment import ShuffleOptions
from hkdfast.data.challenge import write
from hkdfast.data.synthetic import RewriteStatement
from hkdfast.evaluate.choices import NONE, TASKS, Record
from world.scenes import OBJECTS, PER_SCENE, SCENE_OF, SCENES, render, sample

TRACKS = ("hallucination", "factcheck")
VERDICTS = TASKS["factcheck"].options
FACTS = ("morning", "evening", "summer", "winter", "monday", "sunday", "berlin", "tokyo")  # by twos: one or the other
TEMPLATES = {  # of the prompts: few words, all of this world
    "hallucination": f"{{statement}}?\n{OPTIONS_PLACEHOLDER}",
    "factcheck": f"{{context}}. {{statement}}?\n{OPTIONS_PLACEHOLDER}",
}
SWAPS = {  # what a rewrite may put in a phrase's place: another object of its scene, the other fact
    name: [other for other in names if other != name] for names in SCENES.values() for name in names
} | {fact: [FACTS[place ^ 1]] for place, fact in enumerate(FACTS)}
REWRITE = (RewriteStatement(swaps=SWAPS), ShuffleOptions(fixed=()))  # without a look at the image
NOISE = 0.7  # largest standard deviation of the pixel noise, in normalised pixels
NEAR = 0.7  # share of wrong objects that belong to the scene


def photos(count, seed):
    """`count` noisy images of three or four objects.

    Returns:
        the images (count, 64, 64, 3) uint8, the objects in each, what each quadrant holds (count, 4), 48 for nothing.
    """
    rng = np.random.default_rng(seed)
    images, contents = [], []
    places = np.full((count, 4), len(OBJECTS))
    while len(images) < count:
        objects = sample(rng)
        if len(objects) < 3:
            continue
        image, quadrants, _ = render(objects, rng)
        places[len(images), quadrants] = objects
        noise = 127.5 * NOISE * rng.random() * rng.standard_normal(image.shape, np.float32)
        images.append(np.clip(image + noise, 0, 255).astype(np.uint8))
        contents.append([int(index) for index in objects])
    return np.stack(images), contents, places


def foreign(rng, near, scene, but):
    """An object that is not among `but`, from the scene with chance `near`."""
    while True:
        own = rng.random() < near
        index = int(PER_SCENE * scene + rng.integers(PER_SCENE)) if own else int(rng.integers(len(OBJECTS)))
        if index not in but:
            return index


def file_name(image):
    return f"{image:06d}.png"


def number(name):
    """Of the image in a file of that name."""
    return int(name.removesuffix(".png"))


def captioned(image, phrases, wrong):
    """The record of a caption; `wrong` is the index of the phrase that is, 3 for none."""
    first, second, third = (OBJECTS[index] for index in phrases)
    known = TASKS["hallucination"]
    return Record(
        "hallucination",
        file_name(image),
        f"{first}, {second} and {third}",
        "Describe the image",
        known.asked,
        (first, second, third, NONE),
        LETTERS[wrong],
        image,
    )


def verdict(right, claimed, told):
    """On a claim: whether its object is in sight, the fact it claims, the fact that the context tells."""
    if claimed // 2 != told // 2:
        return "Not Verifiable"
    return ("False", "Partially True", "True")[right + (claimed == told)]


def checked(image, seen, right, claimed, told):
    """The record of a claim; `right` says whether the object claimed to be in sight is."""
    return Record(
        "factcheck",
        file_name(image),
        f"{OBJECTS[seen]} in sight and {FACTS[claimed]}",
        FACTS[told],
        TASKS["factcheck"].asked,
        VERDICTS,
        LETTERS[VERDICTS.index(verdict(right, claimed, told))],
        image,
    )


def ask_caption(image, objects, rng, near=NEAR):
    """A caption of three phrases, in a quarter of the cases without a wrong one."""
    phrases = [int(index) for index in rng.permutation(objects)[:3]]
    wrong = int(rng.integers(4))
    if wrong < 3:
        phrases[wrong] = foreign(rng, near, SCENE_OF[objects[0]], objects)
    return captioned(image, phrases, wrong)


def ask_claim(image, objects, rng, near=NEAR):
    """A claim and its context; the four verdicts are equally frequent."""
    verdict = VERDICTS[rng.integers(4)]
    right, same = bool(rng.integers(2)), bool(rng.integers(2))
    if verdict == "Partially True":
        same = not right
    elif verdict != "Not Verifiable":
        right = same = verdict == "True"
    seen = int(rng.choice(objects)) if right else foreign(rng, near, SCENE_OF[objects[0]], objects)
    return told(image, seen, right, same, verdict != "Not Verifiable", rng)


def told(image, seen, right, same, covered, rng):
    """A claim whose second part and context are drawn: whether the context covers it, and if so agrees with it."""
    fact = int(rng.integers(len(FACTS)))
    claimed = fact if same else fact ^ 1
    if not covered:
        claimed = (fact // 2 * 2 + int(rng.integers(2, len(FACTS)))) % len(FACTS)
    return checked(image, seen, right, claimed, fact)


ASK = {"hallucination": ask_caption, "factcheck": ask_claim}


def ask(track, contents, seed, near=NEAR, first=0):
    """One record of a track about each image.

    Args:
        track: one of TRACKS.
        contents: the objects in each image.
        seed: of the questions.
        near: share of wrong objects that belong to the scene.
        first: number of the first image.
    """
    rng = np.random.default_rng([seed, TRACKS.index(track)])
    return [ASK[track](image, objects, rng, near) for image, objects in enumerate(contents, first)]


def right_answer(record, objects):
    """The letter that an image of these objects and the record's texts demand."""
    seen = {OBJECTS[index] for index in objects}
    if record.task == "hallucination":
        right = next((name for name in record.options if name not in seen and name != NONE), NONE)
    else:
        name, claimed = record.statement.split(" in sight and ")
        right = verdict(name in seen, FACTS.index(claimed), FACTS.index(record.context))
    return LETTERS[record.options.index(right)]


def add_arguments(parser):
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first image, beside others in the folder")


def run(options):
    images, contents, _ = photos(options.questions, options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    for image, pixels in enumerate(images, options.first):
        Image.fromarray(pixels).save(options.folder / file_name(image))
    name = f"questions-{options.first}.json" if options.first else "questions.json"
    write(options.folder / name, ask(options.track, contents, options.seed, first=options.first))
    (options.folder / "swaps.json").write_text(json.dumps(SWAPS, indent=1) + "\n")  # for hkdfast hkd --swaps
