"""What SEED, its ablations and its controls do to the base models, cell by cell.

A cell is one system on one base with one seed. It answers every question of the question sets and is kept as a file of
log-probabilities, so a stopped study goes on where it was. `table.py` makes the tables of it.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from hkdfast import Head, contrast, diffuse, purify
from hkdfast.hf import SeedConfig, SeedTrainer
from seed.bases import load
from world.questions import SPLITS, pope, prompts
from world.tinyllava import ask, make_processor, normalised, question

TUNING = 1001  # the one question set that anything may be chosen on
FRESH = (3311, 3312, 3313, 3314, 3315)  # never looked at before the study
IMAGES = 500  # of a question set
SIGMA, ALPHA = 1.2, 1.5

# Systems that decode the base as it is: how often they run it, and options of `contrasted`.
DECODED = {
    "base": (1, None),
    "contrast, 1 draw": (2, {"draws": 1, "alpha": ALPHA, "sigma": SIGMA}),
    "contrast, 8 draws": (9, {"draws": 8, "alpha": ALPHA, "sigma": SIGMA}),
    "VCD as published": (2, {"draws": 1, "alpha": 1.0, "step": 500, "plausibility": 0.1}),
}
# Systems that are trained, by what they change in the recipe.
RECIPE = {
    "per_device_train_batch_size": 96,
    "max_steps": 200,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "noise_sigma": SIGMA,
    "alpha": [ALPHA, 1.0],  # of two rounds
    "plausibility": 0.01,
}
TRAINED = {
    "SEED": {},
    "no plausibility": {"plausibility": 0.0},
    "sharpened teacher": {"plausibility": 0.0},
    "forward KL": {"divergence": "forward_kl"},
    "blind prompts": {},
    "Jensen-Shannon": {"divergence": "jensen_shannon"},
    "alpha 0": {"alpha": [0.0], "max_steps": 50},
}
TWICE = ("SEED", "no plausibility")  # whose second round is another system
SECOND = ", two rounds"  # added to the name
ALL = [*TRAINED, *(name + SECOND for name in TWICE)]


class Exam:
    """The questions of one set, each asked once however many splits hold it.

    Args:
        seed: of the images and questions.
        images: how many.
        device: where the images go.
    """

    def __init__(self, seed, images=IMAGES, device="cpu"):
        self.seed = seed
        self.images, self.splits = pope(images, seed)
        self.pixels = normalised(self.images).to(device)
        asked = np.concatenate([self.splits[split][:, :2] for split in SPLITS])
        asked, place = np.unique(asked, axis=0, return_inverse=True)
        self.asked, self.place = torch.from_numpy(asked), place.reshape(len(SPLITS), -1)

    def take(self, answer, words):
        """(splits, questions, 3) float32: log-probabilities of yes, of no, and of the likeliest other word.

        Args:
            answer: function of pixels, image, index that returns logits or log-probabilities, as `ask`.
            words: ids of yes and no.
        """
        log_p = answer(self.pixels, *self.asked.T).log_softmax(-1)
        yes_no = log_p[:, words]
        log_p[:, words] = -torch.inf
        return torch.cat([yes_no, log_p.amax(-1, keepdim=True)], 1).numpy()[self.place]


def yes_no(processor):
    return processor.tokenizer.convert_tokens_to_ids(["yes", "no"])


def contrasted(model, tokenizer, draws, alpha, sigma=None, step=500, plausibility=0.0, seed=0):
    """Contrastive decoding as an `answer` of `Exam.take`; noise is drawn per image, the draws' logits averaged."""

    def answer(pixels, image, index):
        generator = torch.Generator(pixels.device).manual_seed(seed)
        clean = ask(model, tokenizer, pixels, image, index)
        noisy = [
            ask(model, tokenizer, diffuse(pixels, step, sigma=sigma, generator=generator), image, index)
            for _ in range(draws)
        ]
        return contrast(purify(clean, noisy, alpha, plausibility=plausibility, outside="drop"))

    return answer


class Sharpened(SeedTrainer):
    """The control that sharpens and contrasts nothing: the disturbed branch is replaced by one that knows nothing, so
    the teacher is the softmax of (1 + alpha) log p_clean."""

    def purify(self, clean, *noisy):
        return super().purify(clean, Head(torch.zeros_like(clean.hidden), clean.weight))


def entropy_matched(model, tokenizer, images, asked):
    """The alpha at which `Sharpened` gives its teacher the mean entropy that the purified teacher has."""
    device = model.device
    image, index = torch.from_numpy(asked[:4000]).T
    pixels = normalised(images[: int(image.max()) + 1]).to(device)
    target = contrasted(model, tokenizer, 1, ALPHA, SIGMA)(pixels, image, index)
    clean = ask(model, tokenizer, pixels, image, index)

    def entropy(log_p):
        return -(log_p.exp() * log_p).sum(-1).mean()

    low, high = 0.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        too_flat = entropy((clean * (1 + middle)).log_softmax(-1)) > entropy(target)
        low, high = (middle, high) if too_flat else (low, middle)
    return low


class AfterRound(TrainerCallback):
    """Calls a function with the number of the round and the model when a round ends."""

    def __init__(self, call):
        self.call, self.round = call, 0

    def on_train_end(self, args, state, control, model, **others):
        self.round += 1
        model.eval()
        self.call(self.round, model)


def trainer_folder(base, system, seed):
    """The output_dir of a training, where no weights are saved."""
    return f"out/quality/trainer/{base}/{cell_file('', '', system, seed).stem}"


def train(base, system, seed, after, device="cpu", callbacks=(), **options):
    """Train one system of TRAINED.

    Args:
        base: name of a folder in bases/.
        seed: of the prompts, the adapter and the noise.
        after: called with the round and the model, a PEFT model, when a round ends.
        device: "cpu" or "cuda".
        callbacks: of the trainer.
        options: of SeedConfig, instead of the system's own.

    Returns:
        the trainer.
    """
    model, processor = load(base, device)
    images, asked = prompts(model, processor.tokenizer, 2000, 5000 + seed, device=device)
    options = RECIPE | TRAINED[system] | options
    kind = SeedTrainer
    if system == "sharpened teacher":
        kind = Sharpened
        options["alpha"] = [entropy_matched(model, processor.tokenizer, images, asked)]
    elif system == "blind prompts":
        asked = asked.reshape(-1, 8, 2)[:, 4:].reshape(-1, 2)
    pictures = [Image.fromarray(image) for image in images]
    config = SeedConfig(
        trainer_folder(base, system, seed),
        seed=seed,
        report_to=[],
        save_strategy="no",
        use_cpu=device == "cpu",
        logging_steps=50,
        **options,
    )
    trainer = kind(
        model,
        config,
        train_dataset=[{"image": pictures[image], "text": question(index)} for image, index in asked],
        processing_class=processor,
        callbacks=[*callbacks, AfterRound(after)],
    )
    trainer.train()
    return trainer


def cell_file(work, base, system, seed=None):
    name = system if seed is None else f"{system}-{seed}"
    return Path(work) / base / f"{name.replace(' ', '_').replace(',', '')}.npz"


def keep(file, exams, answer, words):
    """Answer all exams and write the cell, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft.npz")
    np.savez_compressed(draft, **{str(exam.seed): exam.take(answer, words) for exam in exams})
    draft.replace(file)


def decode(base, system, exams, work, device="cpu"):
    """Make the cell of a system of DECODED, unless it is there."""
    file = cell_file(work, base, system)
    if file.exists():
        return
    model, processor = load(base, device)
    options = DECODED[system][1]
    answer = partial(ask, model, processor.tokenizer)
    if options:
        answer = contrasted(model, processor.tokenizer, **options)
    keep(file, exams, answer, yes_no(processor))


def round_files(base, system, seed, work, rounds):
    """The cells of a system of TRAINED, one per round."""
    return [cell_file(work, base, name, seed) for name in (system, system + SECOND)[:rounds]]


def distill(base, system, seed, exams, work, device="cpu", rounds=1, callbacks=()):
    """Make the cells of a system of TRAINED, unless they are there."""
    files = round_files(base, system, seed, work, rounds)
    if all(file.exists() for file in files):
        return
    processor = make_processor()

    def after(round_, model):
        answer = partial(ask, model.get_base_model(), processor.tokenizer)
        keep(files[round_ - 1], exams, answer, yes_no(processor))

    train(base, system, seed, after, device, callbacks, rounds=rounds)
