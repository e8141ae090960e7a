"""How a model of a chain is tuned on a track, alone or taught by others, and examined.

The losses and the inference are hkdfast's own: `pyramid.loss`, `ternary.loss`, `choices.answer`.
"""

import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hkd.chains import asking, load, packed
from hkdfast import Head, pyramid, ternary
from hkdfast.batch import IGNORE_INDEX, answer_rows
from hkdfast.choices import LETTERS, answer, shuffle_options
from hkdfast.data.augment import Augment, Color, Crop, Flip, Noise, RandomApply
from hkdfast.data.tasks import record_of
from hkdfast.evaluate.choices import choice, example
from world.tinyllava import normalised, read, see
from world.tracks import REWRITE, TEMPLATES, ask, number, photos, right_answer

SPLITS = {  # images and seed of each
    "train": (2800, 8101),
    "unlabelled": (16800, 8505),
    "dev": (1500, 8202),
    "test": (2400, 8606),
}
BATCH = 64  # labelled questions of a step, and unlabelled ones beside them
RATES = {  # learning rates of tuning directly
    "hallucination": {"L": 1e-3, "M": 1e-3, "S": 4e-3},
    "factcheck": {"L": 1e-3, "M": 1e-3, "S": 2e-3},
}
TAUGHT = {"S": 4e-3}  # where it learns from more than labelled questions
EPOCHS = {  # of tuning directly: where each has its plateau on the dev questions
    "hallucination": {"L": 6, "M": 6, "S": 16},
    "factcheck": {"L": 6, "M": 14, "S": 30},
}
TEACH = {"divergence_weight": 4.0, "temperature": 2.0, "t_squared": True}
RETOUCH = (RandomApply(Flip()), RandomApply(Crop()), RandomApply(Color()), Noise(0.25))
LAYOUTS = ("fixed", "shuffled")  # the options as the challenge orders them, or in an order drawn once a question


@dataclass(frozen=True)
class Stage:
    """One training run on a track.

    Args:
        size: of the model that is trained.
        epochs: how often it sees the labelled questions; None: EPOCHS.
        start: stage whose model it goes on with; None: the pretrained one.
        live: size and start of a teacher that is trained along, or None. It is known as "stage/live" afterwards.
        teachers: (size, stage) of frozen teachers.
        rewrites: how many rewritten questions go with each labelled one: answered by the teachers, or truly where there
            are none.
        views: how many versions of each labelled image there are: itself, and others by RETOUCH.
        shuffle: whether options change their letters.
        unlabelled: whether as many other questions go with the labelled ones, about images of their own, which the
            teachers alone answer.
    """

    size: str
    epochs: int | None = None
    start: str | None = None
    live: tuple | None = None
    teachers: tuple = ()
    rewrites: int = 0
    views: int = 1
    shuffle: bool = True
    unlabelled: bool = False


@cache
def pictures(split):
    """A split's images, and what they show."""
    return photos(*SPLITS[split])[:2]


@cache
def seen(split, view=0):
    """(images, patches, width): what the tower of all chains makes of a split's images, or of another view of them."""
    images, _ = pictures(split)
    if view:
        augment = Augment(RETOUCH, seed=view)
        made = ({"image": Image.fromarray(image), "text": ""} for image in images)
        images = np.stack([np.asarray(augment(one, index)["image"]) for index, one in enumerate(made)])
    return see(load(1, "S")[0], normalised(images)).half()


def truths(track):
    """(questions,) option numbers of the right answers of a track's test set."""
    records = ask(track, pictures("test")[1], SPLITS["test"][1])
    return np.array([LETTERS.index(record.answer) for record in records])


def place(letter):
    """Of the option that a letter names; None for no letter."""
    return None if letter is None else LETTERS.index(letter)


class Track:
    """A track's questions on one split of SPLITS, and their images as the tower sees them.

    Args:
        track: one of TRACKS.
        split: one of SPLITS. The answers of "unlabelled" are None.
        views: versions of each image, see Stage.
    """

    def __init__(self, track, split, views=1):
        self.name = track
        self.contents = pictures(split)[1]
        self.seen = torch.stack([seen(split, view) for view in range(views)])
        self.records = ask(track, self.contents, SPLITS[split][1])
        if split == "unlabelled":
            self.records = [replace(record, answer=None) for record in self.records]
        self.choices = [choice(record, TEMPLATES[track]) for record in self.records]
        self.answers = [place(record.answer) for record in self.records]


class Reader:
    """Makes batches of a track's prompts, and functions of such batches of models.

    Args:
        tokenizer: the chain's.
        track: Track.
    """

    def __init__(self, tokenizer, track):
        self.tokenizer, self.track = tokenizer, track
        self.letters = tokenizer.convert_tokens_to_ids([letter.lower() for letter in LETTERS[:4]])

    def __call__(self, prompts, abouts, answers=None):
        """A batch of prompts about images named as records name them; `encode` of `hkdfast.choices.answer`."""
        return self.batch([[asking(prompt)] for prompt in prompts], self.track.seen[0, [*map(number, abouts)]])

    def batch(self, lines, seen):
        ids, turn, places, last = packed(self.tokenizer, lines)
        return {"input_ids": ids, "turn": turn, "places": places, "last": last, "seen": seen.float()}

    def taught(self, lines, answers, seen):
        """A batch with the letters' tokens as labels; None is a question without a label."""
        batch = self.batch(lines, seen)
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        unknown = torch.zeros_like(labels, dtype=torch.bool)
        letters = [[IGNORE_INDEX if place is None else self.letters[place] for place in row] for row in answers]
        labels[:, batch["last"]] = torch.tensor(letters)
        unknown[:, batch["last"]] = torch.tensor(letters) == IGNORE_INDEX
        batch["shift_labels"] = labels
        return batch | {"distill_only": unknown} if unknown.any() else batch

    def rows(self, model):
        """The model as hkdfast takes it: a function of a batch that returns the head of its answer rows."""

        def head(batch):
            hidden = read(
                model, self.tokenizer, batch["seen"], *(batch[name] for name in ("input_ids", "turn", "places"))
            )
            return Head(hidden[answer_rows(batch)[0]], model.lm_head.weight)

        return head


def epochs(track, stage):
    """How often a stage sees the labelled questions of a track."""
    return stage.epochs or EPOCHS[track][stage.size]


def rates(track, stage):
    """The largest learning rates of the model that a stage trains, and of its live teacher."""
    taught = TAUGHT if stage.teachers or stage.live or stage.rewrites else {}
    own = taught.get(stage.size, RATES[track][stage.size])
    return [own, RATES[track][stage.live[0]]] if stage.live else [own]


def drawn(track, stage, steps, seed, views=1):
    """For each step, BATCH questions: texts (each question and its rewrites), places of their answers, images seen."""
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    # views draw from a generator of their own: the labelled questions are the same with and without augmentation
    looks = np.random.default_rng([seed, 1])
    taught = bool(stage.teachers or stage.live)
    order = np.empty(0, np.int64)
    for step in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(len(track.records))
        picked, order = order[:BATCH], order[BATCH:]
        rewrite, texts, answers = Augment(REWRITE, seed, step), [], []
        for i in picked:
            asked, right = track.choices[i], track.answers[i]
            if stage.shuffle:
                asked, right = shuffle_options(asked, right, draw)
            text, rights = [asked.prompt()], [right]
            for copy in range(stage.rewrites):
                told = example(track.records[i], template=TEMPLATES[track.name])
                made = rewrite(told, i * stage.rewrites + copy)
                text.append(made["text"])
                letter = made["answer"]  # None where the words have changed
                if letter is None and not taught:
                    letter = right_answer(record_of(made), track.contents[i])
                rights.append(place(letter))
            texts.append([asking(line) for line in text])
            answers.append(rights)
        yield texts, answers, track.seen[looks.integers(views, size=BATCH), picked]


def lessons(reader, stage, steps, seed, unlabelled=None):
    """Batches of a stage: a question and its rewrites are one sequence about their image.

    Args:
        unlabelled: Track of questions that go with the labelled ones, or None.
    """
    pools = [drawn(reader.track, stage, steps, seed, stage.views)]
    if unlabelled:
        pools.append(drawn(unlabelled, stage, steps, seed + 100))  # other draws than those of any chain
    for parts in zip(*pools, strict=True):
        texts, answers, seen = zip(*parts, strict=True)
        yield reader.taught(sum(texts, []), sum(answers, []), torch.cat(seen))


def fit(stage, student, teachers, reader, seed, teach=TEACH, live=None, unlabelled=None, step=None):
    """Train a stage's student, and its live teacher, in place.

    Args:
        stage: Stage.
        student, teachers: models.
        reader: Reader of the training questions.
        seed: of batches, layouts and rewrites.
        teach: options of `pyramid.loss` and `ternary.loss`.
        live: model that teaches while it learns, or None.
        unlabelled: as in `lessons`.
        step: function that is called after each step with the share of the steps that are done, or None.
    """
    name, questions = reader.track.name, len(reader.track.records)
    steps = epochs(name, stage) * (questions // BATCH)
    runs = []
    for model, peak in zip([student, *([live] if live else [])], rates(name, stage), strict=True):
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, peak, weight_decay=0.02, betas=(0.9, 0.98))
        runs.append((weights, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.1)))
    sources = [reader.rows(model) for model in (*teachers, *([live] if live else []), student)]
    for done, batch in enumerate(lessons(reader, stage, steps, seed, unlabelled), 1):
        if len(sources) == 1:
            head = sources[0](batch)
            loss = F.cross_entropy(F.linear(head.hidden, head.weight), answer_rows(batch)[1])
        elif len(sources) == 2:
            loss = pyramid.loss(sources, batch, "concurrent" if live else "frozen", **teach)[0]
        else:
            loss = ternary.loss(sources, batch, "two_teachers", **teach)[0]
        loss.backward()
        for weights, optimizer, schedule in runs:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step:
            step(done / steps)


def examine(model, reader):
    """What the model answers to every question, as option numbers in the record's own order.

    Returns:
        (layouts, 2, questions) int8: for each layout without and with the four cyclic shifts.
    """
    track, rows = reader.track, []
    model.eval()
    for layout in LAYOUTS:
        orders = [list(range(4)) for _ in track.choices]
        questions = track.choices
        if layout == "shuffled":
            draw = random.Random(5)
            orders = [draw.sample(range(4), 4) for _ in track.choices]
            questions = [
                replace(one, options=[one.options[i] for i in order])
                for one, order in zip(track.choices, orders, strict=True)
            ]
        found = answer(reader.rows(model), reader, questions, batch_size=64, tokens=reader.letters)
        back = torch.tensor(orders)
        for chosen in (torch.stack([one[0].argmax() for one in found.by_shift]), found.choice):
            rows.append(back.gather(1, chosen[:, None])[:, 0])
    return torch.stack(rows).view(len(LAYOUTS), 2, -1).to(torch.int8).numpy()
