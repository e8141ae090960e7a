"""Train the chains of the picture world: three LLaVAs each, L > M > S, that share a tokenizer and a vision tower.

    python benchmarks/quality/run.py chains 1 2 3

The tower is that of bases/seed1, frozen. The language models learn an easy version of both tracks, whose wrong objects
may be of any scene, and to say whether an object is in sight. They differ in size and in how long they learn: that is
where the gap between them comes from. The weights are stored in chains/, the tower once for all; `run.py export`
writes ordinary model folders.
"""

import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hkdfast.choices import LETTERS, shuffle_options
from hkdfast.evaluate.choices import choice
from seed.bases import descend
from seed.bases import load as load_base
from world.scenes import OBJECTS
from world.tinyllava import load_model, make_model, make_processor, normalised, read, see, stored
from world.tracks import ASK, FACTS, TEMPLATES, TRACKS, foreign, photos

CHAINS = Path(__file__).parents[1] / "chains"
TOWER = CHAINS / "tower.safetensors"
SENTENCES = "user assistant : ? a b c d and in sight yes no true false partially not verifiable hallucination"
WORDS = [*SENTENCES.split(), *FACTS]
SIZES = {  # layers and width of the language model; images, steps and learning rate of its pretraining
    "L": {"layers": 4, "width": 96, "images": 12000, "steps": 2000, "lr": 3e-3},
    "M": {"layers": 3, "width": 64, "images": 4000, "steps": 1400, "lr": 3e-3},
    "S": {"layers": 3, "width": 40, "images": 1000, "steps": 1600, "lr": 3e-3},
}


def in_sight(image, objects, rng):
    """(text, answer): the name of an object, and behind it whether it is in sight."""
    there = rng.random() < 0.5
    index = rng.choice(objects) if there else foreign(rng, 0, 0, objects)
    return OBJECTS[index], "yes" if there else "no"


def told(track):
    def turn(image, objects, rng):
        """(text, answer): an easy question of the track without its options, and the first word of the right one."""
        record = ASK[track](image, objects, rng, near=0)
        asked = choice(record, TEMPLATES[track])
        return asked.stem, asked.options[LETTERS.index(record.answer)].split()[0]

    return turn


def lettered(track):
    def turn(image, objects, rng):
        """(text, answer): an easy question of the track, its options behind any letters."""
        record = ASK[track](image, objects, rng, near=0)
        asked, place = shuffle_options(
            choice(record, TEMPLATES[track]), LETTERS.index(record.answer), random.Random(int(rng.integers(2**32)))
        )
        return asking(asked.prompt()), LETTERS[place]

    return turn


def asking(text):
    """What follows the image in the prompt that the chat template makes of a text."""
    return f"{text} ASSISTANT:"


def packed(tokenizer, lines):
    """The texts about each image one after another: ids (n, length), turn and places (1, length), last (turns,)."""
    encoded = [tokenizer(texts, add_special_tokens=False) for texts in lines]
    ids = torch.tensor([sum(turns.input_ids, []) for turns in encoded])
    lengths = [len(turn) for turn in encoded[0].input_ids]
    turn = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))[None]
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, turn, places, torch.tensor(lengths).cumsum(0) - 1


def align(model, tokenizer, seen, places, rng, steps=600, batch=256, lr=3e-3):
    """Stage one of a LLaVA: what the projector makes of a quadrant becomes like the name of what is there."""
    names = torch.tensor(tokenizer.convert_tokens_to_ids(list(OBJECTS)))
    nothing = torch.zeros(1, model.config.text_config.hidden_size, requires_grad=True)
    embed, project = model.get_input_embeddings(), model.model.multi_modal_projector
    right = []

    def losses():
        while True:
            picked = rng.integers(len(seen), size=batch)
            quadrants = project(seen[picked].float()).view(batch, 2, 2, 2, 2, -1).mean((2, 4)).flatten(0, 2)
            logits = quadrants @ torch.cat([embed(names), nothing]).T
            truth = places[picked].flatten()
            right.append((logits.argmax(-1) == truth).float().mean())
            yield F.cross_entropy(logits, truth)

    descend([embed.weight, nothing, *project.parameters()], lr, steps, 0.01, losses(), "align")
    print(f"quadrants {100 * torch.stack(right[-100:]).mean():.1f} %")


CAPTION, CLAIM = (told(track) for track in TRACKS)
STAGES = {  # what is asked about each image, and for which share of the steps
    "words": ([in_sight] * 16 + [CAPTION] * 2 + [CLAIM] * 3, 0.4),
    "letters": ([in_sight] * 6 + [CAPTION, CLAIM] + [turn for turn in map(lettered, TRACKS) for _ in range(2)], 0.6),
}


def learn(model, tokenizer, seen, contents, rng, steps, lr, stage, batch=32):
    """Pretrain the language model on the pool; prints how often each kind of question is answered right."""
    words = tokenizer.get_vocab()
    right, start = [], time.time()
    turns, share = STAGES[stage]
    kinds = list(dict.fromkeys(turns))

    def losses():
        while True:
            picked = rng.integers(len(contents), size=batch)
            lessons = [[ask(image, contents[image], rng) for ask in turns] for image in picked]
            ids, turn, places, last = packed(tokenizer, [[text for text, _ in asked] for asked in lessons])
            truth = torch.tensor([[words[answer.lower()] for _, answer in asked] for asked in lessons])
            logits = model.lm_head(read(model, tokenizer, seen[picked].float(), ids, turn, places)[:, last])
            right.append((logits.argmax(-1) == truth).float().mean(0))
            if len(right) % 100 == 0:
                mean = torch.stack(right[-100:]).mean(0)
                told = [mean[[t is kind for t in turns]].mean() for kind in kinds]
                told = " ".join(f"{100 * part:.0f} %" for part in told)
                print(f"{stage} {len(right)} right {told} {time.time() - start:.0f} s", flush=True)
            yield F.cross_entropy(logits.flatten(0, 1), truth.flatten())

    descend([p for p in model.parameters() if p.requires_grad], lr, int(share * steps), 0.01, losses(), stage)


def processor():
    """The processor of every chain."""
    return make_processor(WORDS, silent=".,")


def sizes(size):
    """Options of `make_model` for a size."""
    recipe = SIZES[size]
    return {"layers": recipe["layers"], "width": recipe["width"], "spread": recipe["width"] ** -0.5}


def weights_file(seed, size):
    """Where a model's weights are stored, but for the tower."""
    return CHAINS / f"seed{seed}" / f"{size}.safetensors"


def tower():
    """The state of the vision tower of bases/seed1."""
    return load_base("seed1")[0].model.vision_tower.state_dict()


def train(seed, size, work):
    """A pretrained model of a chain; what is done is kept under `work`."""
    tokenizer, rng = processor().tokenizer, np.random.default_rng([seed, list(SIZES).index(size)])
    torch.manual_seed(1000 * seed + list(SIZES).index(size))
    recipe = SIZES[size]
    model = make_model(tokenizer, **sizes(size))
    model.model.vision_tower.load_state_dict(tower())
    model.model.vision_tower.requires_grad_(False)
    done = work / f"seed{seed}-{size}.pt"
    if done.exists():
        model.load_state_dict(torch.load(done))
        return model.eval()
    print(
        f"chain {seed}, {size}: {sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e3:.0f} k", flush=True
    )
    seen, contents, places = pool(model, seed, work)
    some = slice(recipe["images"])
    seen, contents, places = seen[some], contents[some], places[some]
    align(model, tokenizer, seen, places, rng)
    for stage in STAGES:
        learn(model, tokenizer, seen, contents, rng, recipe["steps"], recipe["lr"], stage)
    torch.save(model.state_dict(), done)
    return model.eval()


def pool(model, seed, work):
    """The images of a chain's pretraining as the tower sees them, what is in them, and where."""
    file = work / f"pool{seed}.pt"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        images, contents, places = photos(max(recipe["images"] for recipe in SIZES.values()), 7000 + seed)
        torch.save((see(model, normalised(images)).half(), contents, torch.from_numpy(places)), file)
    return torch.load(file)


def save(model, seed, size):
    """Store a model in half the bytes, its tower in one file for all."""
    weights = stored(model)
    shared = {name: weight for name, weight in weights.items() if "vision_tower" in name}
    file = weights_file(seed, size)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(shared, TOWER, {"format": "pt"})
    save_file({name: weights[name] for name in weights.keys() - shared}, file, {"format": "pt"})


def load(seed, size):
    """The model that chains/ stores, its tower frozen, and its tokenizer."""
    tokenizer = processor().tokenizer
    model = load_model([TOWER, weights_file(seed, size)], tokenizer, **sizes(size))
    model.model.vision_tower.requires_grad_(False)
    return model, tokenizer


def add_arguments(parser):
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--work", type=Path, default=Path("/tmp/hkdfast-chains"), help="where finished models are kept")
    parser.add_argument("--threads", type=int, default=1)


def run(options):
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for size in options.sizes:
            save(train(seed, size, options.work), seed, size)
