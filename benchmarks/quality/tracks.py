"""The two tracks of the Responsible-AI challenge, asked about the picture world.

    python benchmarks/quality/tracks.py hallucination 7 out/track --questions 500
    hkdfast evaluate choices --task hallucination --data out/track/questions.json --images out/track \\
        --model benchmarks/quality/chains/seed1/L --template $'{statement}?\\n{options}' --output out/choices.json

"hallucination": which phrase of a caption is not in the image, A to D, D being "No hallucination". "factcheck": a claim
of two parts. The first names an object in sight, and the image decides. The second says when or where the photo was
taken, and the context decides, unless it tells of something else: then the claim is not verifiable. Otherwise it is
true, partially true or false as two, one or none of its parts are right.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from world import OBJECTS, PER_SCENE, SCENE_OF, render, sample

from hkdfast.choices import LETTERS, MARK
from hkdfast.evaluate.choices import NONE, TASKS, Record, write

TRACKS = ("hallucination", "factcheck")
VERDICTS = TASKS["factcheck"].options
FACTS = ("morning", "evening", "summer", "winter", "monday", "sunday", "berlin", "tokyo")  # by twos: one or the other
TEMPLATES = {  # of the prompts: few words, all of this world
    "hallucination": f"{{statement}}?\n{MARK}",
    "factcheck": f"{{context}}. {{statement}}?\n{MARK}",
}
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


def checked(image, seen, right, claimed, told):
    """The record of a claim; `right` says whether the object claimed to be in sight is."""
    verdict = ("False", "Partially True", "True")[right + (claimed == told)]
    verdict = verdict if claimed // 2 == told // 2 else "Not Verifiable"
    return Record(
        "factcheck",
        file_name(image),
        f"{OBJECTS[seen]} in sight and {FACTS[claimed]}",
        FACTS[told],
        TASKS["factcheck"].asked,
        VERDICTS,
        LETTERS[VERDICTS.index(verdict)],
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


def ask(track, contents, seed, near=NEAR):
    """One record of a track about each image.

    Args:
        track: one of TRACKS.
        contents: the objects in each image.
        seed: of the questions.
        near: share of wrong objects that belong to the scene.
    """
    rng = np.random.default_rng([seed, TRACKS.index(track)])
    return [ASK[track](image, objects, rng, near) for image, objects in enumerate(contents)]


def rewritten(record, objects, rng):
    """Another caption or claim about the same image, made without a look at it.

    A caption is shuffled, and in three cases of four a phrase is replaced: the one that is known to be wrong, or any.
    A claim names another object in sight half the time and has its second part and its context drawn anew.

    Args:
        record: what is rewritten.
        objects: what the image shows. Decides the answer of the result and nothing else.
        rng: numpy generator.
    """
    image = number(record.image)
    if record.task == "hallucination":
        phrases, wrong = [OBJECTS.index(name) for name in record.options[:3]], LETTERS.index(record.answer)
        if rng.random() < 0.75:
            scene = SCENE_OF[phrases[(wrong + 1) % 3]]
            wrong = wrong if wrong < 3 else int(rng.integers(3))
            phrases[wrong] = foreign(rng, NEAR, scene, phrases)
        order = [int(place) for place in rng.permutation(3)]
        wrong = 3 if wrong == 3 or phrases[wrong] in objects else order.index(wrong)
        return captioned(image, [phrases[place] for place in order], wrong)
    seen = OBJECTS.index(record.statement.split()[0])
    if rng.random() < 0.5:
        seen = foreign(rng, NEAR, SCENE_OF[seen], (seen,))
    same, covered = bool(rng.integers(2)), rng.random() < 0.75
    return told(image, seen, seen in objects, same, covered, rng)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    options = parser.parse_args()
    images, contents, _ = photos(options.questions, options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    for image, pixels in enumerate(images):
        Image.fromarray(pixels).save(options.folder / file_name(image))
    write(options.folder / "questions.json", ask(options.track, contents, options.seed))
