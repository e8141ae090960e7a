"""Train the base models of the picture world: LLaVAs of 1.4 million parameters, each from a seed of its own.

    python benchmarks/quality/run.py bases 1 2 3

Five stages: the vision tower learns what is in each quadrant, the language model learns to name one object, to
caption and to answer questions whose negatives are any absent object (two stages), and last to answer questions
whose negatives never belong to the scene. The last stage is short and is what instruction data does to real models:
the model can tell apart the objects of a scene, but no longer needs to, and the prior of the scene grows over the
evidence.

The weights are stored in bases/, `run.py export` writes ordinary model folders. A stage that is done is kept under
--work and not run again.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from world.scenes import OBJECTS, PER_SCENE, SCENE_OF, SCENES, SIZE, pictures, render
from world.tinyllava import (
    PATCH,
    WIDTH,
    load_model,
    make_model,
    make_processor,
    named,
    normalised,
    question,
    read,
    stored,
)

BASES = Path(__file__).parents[1] / "bases"
WEIGHTS = "model.safetensors"
NOISE = 1.5  # largest standard deviation of the noise seen in training, in normalised pixels
DESCRIBE = "Describe the image"


def noised(pixels, share, rng):
    """Gaussian noise of a random strength up to NOISE on a random share of the images."""
    strength = NOISE * rng.random(len(pixels)) * (rng.random(len(pixels)) < share)
    return pixels + torch.from_numpy(strength).float().view(-1, 1, 1, 1) * torch.randn_like(pixels)


def descend(parameters, lr, steps, decay, losses, say):
    """One AdamW run under a one-cycle schedule over the losses that an iterator yields."""
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    start = time.time()
    for step in range(steps):
        loss = next(losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"{say} {step + 1}/{steps} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)


def learn_to_see(model, rng, steps=1500, batch=64, pool=6000):
    """Train the vision tower to tell what each quadrant holds, if anything, and the scene of the background."""
    tower = model.model.vision_tower
    what, where = nn.Linear(WIDTH, len(OBJECTS) + 1), nn.Linear(WIDTH, len(SCENES))
    images = np.empty((pool, SIZE, SIZE, 3), np.uint8)
    contents = np.full((pool, 4), len(OBJECTS))
    scenes = np.empty(pool, np.int64)
    for i in range(pool):
        # objects and backgrounds without any company: what the tower sees is no prior
        objects = rng.choice(len(OBJECTS), rng.integers(2, 5), replace=False)
        images[i], quadrants, scenes[i] = render(objects, rng, scene=int(rng.integers(len(SCENES))))
        contents[i, quadrants] = objects
    contents, scenes = torch.from_numpy(contents), torch.from_numpy(scenes)

    def losses():
        while True:
            picked = rng.integers(pool, size=batch)
            pixels, truth = normalised(images[picked]), contents[picked]
            if rng.random() < 0.5:
                pixels, truth = pixels.flip(3), truth[:, [1, 0, 3, 2]]
            seen = tower(noised(pixels, 0.5, rng)).last_hidden_state[:, 1:]
            side = SIZE // PATCH // 2
            quadrants = seen.view(batch, 2, side, 2, side, WIDTH).mean((2, 4)).reshape(batch * 4, WIDTH)
            yield F.cross_entropy(what(quadrants), truth.reshape(-1)) + 0.5 * F.cross_entropy(
                where(seen.mean(1)), scenes[picked]
            )

    parameters = [*tower.parameters(), *what.parameters(), *where.parameters()]
    descend(parameters, 2e-3, steps, 0.05, losses(), "see")


def encode(tokenizer, turns):
    questions = tokenizer([f"{asked} ASSISTANT:" for asked, _ in turns], add_special_tokens=False).input_ids
    answers = tokenizer([f"{answer}</s>" for _, answer in turns], add_special_tokens=False).input_ids
    return list(zip(questions, answers, strict=True))


def talk_loss(model, tokenizer, pixels, talks):
    """Mean cross entropy of the answers' words; `talks` holds (question, answer) pairs for each image."""
    encoded = [encode(tokenizer, turns) for turns in talks]
    length = max(sum(len(q) + len(a) - 1 for q, a in turns) for turns in encoded)
    ids = torch.zeros(len(talks), length, dtype=torch.long)
    targets, turn, places = torch.full_like(ids, -100), torch.full_like(ids, -1), torch.zeros_like(ids)
    for row, turns in enumerate(encoded):
        at = 0
        for number, (q, a) in enumerate(turns, 1):
            end = at + len(q) + len(a) - 1
            ids[row, at:end] = torch.tensor(q + a[:-1])
            targets[row, at + len(q) - 1 : end] = torch.tensor(a)
            turn[row, at:end] = number
            places[row, at:end] = torch.arange(end - at)
            at = end
    kept = targets != -100
    return F.cross_entropy(model.lm_head(read(model, tokenizer, pixels, ids, turn, places)[kept]), targets[kept])


def learn_to_name(model, tokenizer, rng, steps=400, batch=64, lr=2e-3):
    """One object to an image, and its name."""

    def losses():
        while True:
            objects = rng.integers(len(OBJECTS), size=batch)
            images = np.stack([render([index], rng)[0] for index in objects])
            talks = [[(DESCRIBE, named(index))] for index in objects]
            yield talk_loss(model, tokenizer, normalised(images), talks)

    descend([p for p in model.parameters() if p.requires_grad], lr, steps, 0.01, losses(), "name")


def absent(objects, rng, far=False):
    """An object that the image does not show; with `far`, one that does not belong to its scene either."""
    while True:
        index = int(rng.integers(len(OBJECTS)))
        if index not in objects and not (far and index // PER_SCENE == SCENE_OF[objects[0]]):
            return index


def turns_about(objects, rng, yes, far, questions=4):
    caption = "the image shows " + ", ".join(named(index) for index in rng.permutation(objects)) + "."
    turns = [(DESCRIBE, caption)]
    for _ in range(questions):
        if rng.random() < yes:
            turns.append((question(rng.choice(objects)), "yes"))
        else:
            turns.append((question(absent(objects, rng, far)), "no"))
    return turns


def learn_to_talk(model, tokenizer, rng, steps, lr, yes, noise, far=False, batch=24):
    """A caption and four questions to an image; `yes` is the share of questions about objects that are there."""

    def losses():
        while True:
            images, objects = pictures(batch, rng)
            pixels = noised(normalised(images), noise, rng)
            talks = [turns_about(names, rng, yes, far) for names in objects]
            yield talk_loss(model, tokenizer, pixels, talks)

    descend([p for p in model.parameters() if p.requires_grad], lr, steps, 0.01, losses(), "far" if far else "talk")


STAGES = {
    "see": lambda model, tokenizer, rng: learn_to_see(model, rng),
    "name": learn_to_name,
    "talk": lambda *base: learn_to_talk(*base, steps=1200, lr=2e-3, yes=0.60, noise=0.25),
    "talk_more": lambda *base: learn_to_talk(*base, steps=1000, lr=1.5e-3, yes=0.65, noise=0.30),
    "far": lambda *base: learn_to_talk(*base, steps=200, lr=8e-4, yes=0.65, noise=0.35, far=True),
}


def train(seed, work):
    """The base model of one seed."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_processor().tokenizer
    torch.manual_seed(seed)
    model = make_model(tokenizer)
    print(f"base {seed}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    for number, (stage, learn) in enumerate(STAGES.items()):
        done = work / f"seed{seed}-{stage}.pt"
        if done.exists():
            model.load_state_dict(torch.load(done))
        else:
            torch.manual_seed(1000 * seed + number)
            learn(model, tokenizer, np.random.default_rng([seed, number]))
            torch.save(model.state_dict(), done)
        model.model.vision_tower.requires_grad_(False)
    return model.requires_grad_(True).eval()


def load(name, device="cpu"):
    """The base model that bases/ stores under this name, and its processor."""
    processor = make_processor()
    return load_model([BASES / name / WEIGHTS], processor.tokenizer).to(device), processor


def add_arguments(parser):
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--work", type=Path, default=Path("/tmp/hkdfast-bases"), help="where finished stages are kept")
    parser.add_argument("--threads", type=int, default=1)


def run(options):
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        file = BASES / f"seed{seed}" / WEIGHTS
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored(train(seed, options.work)), file, {"format": "pt"})
