"""The options of SEED, of the pyramid and of the ternary refinement as a Trainer's arguments."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .. import DIVERGENCES, Head
from ..backends import MODULES
from ..backends import check as check_backend
from ..contrast import WORDS, purify
from ..distill import distill_loss
from ..noise import diffuse
from ..tiles import TILES

LAW = ("weight", "confidence", "threshold", "mode", "plausibility", "outside")  # handed to purify as they are
LOSS = ("divergence", "beta", "temperature", "hard_weight", "floor", "tiles", "memory", "backend")  # to distill_loss


def option(default, text, choices=None):
    metadata = {"help": text} | ({"choices": list(choices)} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Shared:
    """Options that mean the same to every trainer, and its own defaults of TrainingArguments."""

    beta: float = option(0.5, "Weight of the teacher in the mixture, for jensen_shannon, skew_kl and skew_reverse_kl.")
    temperature: float = option(1.0, "Divides the logits of all sides.")
    floor: float | None = option(
        None, "Least log-probability (nats) of a teacher for a word, needed by reverse_kl to one that drops words."
    )
    lora_r: int | None = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "The adapter's product is scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout before the adapter, in the student only.")
    lora_targets: list[str] | None = option(
        None, "Layers to adapt, by the last part of their name; by default every linear layer of the language model."
    )
    tiles: str = option("float32", "How logits are multiplied out, tile by tile.", TILES)
    memory: int | None = option(None, "Bytes for tiles; by default as in distill_loss.")
    backend: str | None = option(None, "What computes the loss; by default the fastest that is built here.", MODULES)
    learning_rate: float = option(2e-4, "The largest learning rate.")
    num_train_epochs: float = option(1.0, "Passes over the data in each round or stage, unless max_steps says.")
    logging_steps: float = option(10, "Log every so many steps.")
    remove_unused_columns: bool = option(False, "Datasets keep the columns that only the collator reads.")

    def of(self, names):
        return {name: getattr(self, name) for name in names}


@dataclass
class SeedConfig(Shared, TrainingArguments):
    """Options of SeedTrainer; those of TrainingArguments hold for each round."""

    divergence: str = option(
        "reverse_kl",
        "What the student minimises against the purified teacher; reverse_kl seeks its modes.",
        DIVERGENCES,
    )
    hard_weight: float = option(0.0, "The cross entropy on the labels is added this many times; needs labels.")
    alpha: list[float] = option(
        [1.5, 1.0], "Strength of the contrast (1 + a) clean - a noisy, one number per round; the last holds on."
    )
    weight: str = option(
        "constant",
        "How a row's strength follows its confidence c: alpha, alpha (1 - c), or alpha where c < threshold.",
        WORDS["weight"],
    )
    confidence: str = option("max_prob", "What is taken for confidence.", WORDS["confidence"])
    threshold: float = option(0.5, "The gate opens below this confidence.")
    mode: str = option("extrapolate", "(1 + a) clean - a noisy, or clean - a noisy.", WORDS["mode"])
    plausibility: float = option(
        0.01,
        "Contrast only words of at least this times the largest probability, lest it lift words that both branches "
        "find all but impossible; 0 contrasts all.",
    )
    outside: str = option(
        "clean", "What becomes of the other words: their clean probability, or none.", WORDS["outside"]
    )
    noise_step: int = option(500, "Noise on the images: step 0 to 999 of VCD's schedule. Not read with noise_sigma.")
    noise_sigma: float | None = option(None, "Add noise of this standard deviation in normalised pixels instead.")
    noise_draws: int = option(1, "Noise draws per step whose logits are averaged, one forward each. Fresh every step.")
    rounds: int = option(1, "Self-evolving rounds: after each, the adapted model, merged, is the next teacher.")
    yes_rate: bool = option(False, "Log how many answers lean to yes rather than no; for questions of that kind.")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.alpha, (int, float)):
            self.alpha = [float(self.alpha)]
        for name in ("rounds", "noise_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.alpha:
            raise ValueError("alpha must be one number per round, got none")
        self.rehearse()
        if self.rounds > 1 and self.load_best_model_at_end:
            raise ValueError("load_best_model_at_end compares checkpoints of one round: use rounds=1")

    def rehearse(self):
        """Let the functions that the options are for say what is wrong with them, before any work."""
        check_backend(self.backend)
        head = Head(torch.zeros(1, 1), torch.zeros(2, 1))
        diffuse(torch.zeros(1), self.noise_step, sigma=self.noise_sigma)
        options = self.of(LOSS) | {"backend": "reference"}
        for alpha in self.alpha:
            distill_loss(head, purify(head, head, alpha, **self.of(LAW)), labels=torch.tensor([0]), **options)

    def alpha_of(self, number):
        """Strength of the contrast in round `number`, from 1."""
        return self.alpha[min(number, len(self.alpha)) - 1]
