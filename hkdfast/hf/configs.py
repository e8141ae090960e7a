"""The options of SEED, of the pyramid and of the ternary refinement as a Trainer's arguments."""

import copy
import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .. import DIVERGENCES, Head, pyramid, ternary
from ..contrastive import WORDS, purify
from ..data.generation import DTYPES
from ..engine.tile_loop import TILES
from ..losses import distill_loss
from ..noise import diffuse
from ..ops.dispatch import MODULES
from ..ops.dispatch import check as check_backend
from .options import own

# options of numbers for one model, stage or source after the other; one number may stand for its list
NUMBERS = ("hard_weight", "learning_rates", "stage_weights", "stage_epochs", "teacher_weights")
LAW = ("confidence", "threshold", "mode", "plausibility", "outside")  # handed to purify as they are
LOSS = (
    "divergence",
    "beta",
    "temperature",
    "hard_weight",
    "teacher_floor",
    "precision",
    "tile_memory",
    "backend",
)  # to distill_loss
# of TrainingArguments: those that change what is learned
DECISIVE = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "optim",
    "optim_args",
    "average_tokens_across_devices",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "load_best_model_at_end",
)
NEUTRAL = ("tile_memory", "backend", "keep_checkpoints", "yes_rate")  # of our own: those that do not
NO_LOGITS = "no logits are made, and what is logged are means over answer positions"
CASTS = "it casts the model's weights in place, a teacher's too: load the model in that dtype"
# of TrainingArguments: those that nothing would read, or that would not do what they say, unless they are as by default
UNREAD = {
    "label_smoothing_factor": "distributions of teachers are what smooths",
    "neftune_noise_alpha": "a frozen embedding gets no noise, and a teacher would not see that of its student",
    "use_liger_kernel": "it replaces the forward in which the loss is computed",
    "use_cache": "sequences are run as a whole",
    "include_for_metrics": NO_LOGITS,
    "batch_eval_metrics": NO_LOGITS,
    "eval_do_concat_batches": NO_LOGITS,
    "bf16_full_eval": CASTS,
    "fp16_full_eval": CASTS,
    "auto_find_batch_size": "it would begin again with weights that have been trained: set per_device_train_batch_size",
    "remove_unused_columns": "it takes away columns that the collator and the loss read",
}
FUSED = ("lomo", "adalomo")  # optimizers that keep no gradient
LABELS = ("labels", "shift_labels")  # the columns that label_names may name


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
    teacher_floor: float | None = option(
        None, "Least log-probability (nats) of a teacher for a word, needed by reverse_kl to one that drops words."
    )
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "The adapter's product is scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout before the adapter of a model that learns.")
    lora_targets: list[str] | None = option(
        None, "Layers to adapt, by the last part of their name; by default every linear layer of the language model."
    )
    precision: str = option("float32", "How logits are multiplied out, tile by tile.", TILES)
    tile_memory: int | None = option(None, "Bytes for tiles; by default as in distill_loss.")
    backend: str | None = option(None, "What computes the loss; by default the fastest that is built here.", MODULES)
    learning_rate: float = option(2e-4, "The largest learning rate.")
    num_train_epochs: float = option(1.0, "Passes over the data in each round or stage, unless max_steps says.")
    logging_steps: float = option(10, "Log every so many steps.")
    logging_nan_inf_filter: bool = option(False, "Log a loss that is not finite as the mean of those before it.")
    remove_unused_columns: bool = option(False, "Datasets keep the columns that only the collator reads.")

    def of(self, names):
        return {name: getattr(self, name) for name in names}

    def check_unread(self):
        """Refuse options of TrainingArguments that would be taken and then ignored.

        Raises:
            ValueError: naming the option, with the reason.
        """
        for name, reason in UNREAD.items():
            if getattr(self, name, None) not in (type(self).__dataclass_fields__[name].default, None, []):
                raise ValueError(f"{name} cannot be used here: {reason}")
        if not set(self.label_names or ()) <= set(LABELS):
            raise ValueError(f"label_names must be among {', '.join(LABELS)}, got {self.label_names}")

    def decisive(self):
        """{name: value} of the options that change what is learned, for `run_state.enter`."""
        return self.of(name for name in (*own(type(self)), *DECISIVE) if name not in NEUTRAL)


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
    alpha_schedule: str = option(
        "constant",
        "How a row's strength follows its confidence c: alpha, alpha (1 - c), or alpha where c < threshold.",
        WORDS["schedule"],
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
    noise_sigma: float | None = option(None, "Add noise of this standard deviation in normalized pixels instead.")
    noise_draws: int = option(1, "Noise draws per step whose logits are averaged, one forward each. Fresh every step.")
    rounds: int = option(1, "Self-evolving rounds: after each, the adapted model, merged, is the next teacher.")
    yes_rate: bool = option(False, "Log how many answers lean to yes rather than no; for questions of that kind.")

    def __post_init__(self):
        super().__post_init__()
        self.check_unread()
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
            distill_loss(
                head, purify(head, head, alpha, **self.contrast_options()), labels=torch.tensor([0]), **options
            )

    def contrast_options(self):
        """The options of `purify` but for alpha."""
        return {"schedule": self.alpha_schedule, **self.of(LAW)}

    def alpha_of(self, number):
        """Strength of the contrast in round `number`, from 1."""
        return nth(self.alpha, number - 1)


@dataclass
class CoupledConfig(Shared, TrainingArguments):
    """Options that PyramidTrainer and TernaryTrainer share."""

    divergence: str = option("forward_kl", "What a model minimises against those it learns from.", DIVERGENCES)
    hard_weight: list[float] = option(
        [1.0],
        "Times the cross entropy on the labels: one number per model, the last holds on; not read of those that do not "
        "learn.",
    )
    detach: bool = option(True, "A source is a constant to who learns from it; else both get the gradient.")
    unlabeled_weight: float = option(1.0, "Times the loss of answers that are not known, which are distilled alone.")
    t_squared: bool = option(False, "Multiply divergences by temperature ** 2.")
    vocab: str | None = option(
        "common", "Words to compare where heads are padded to different sizes; None asks for one size.", ["common"]
    )
    learning_rates: list[float] | None = option(
        None, "The largest learning rate of each model, the last holds on; by default learning_rate for all."
    )
    lora_r: int | None = option(None, "Train adapters of this rank; by default all weights are trained.")
    freeze: list[str] | None = option(
        None,
        "Weights that stay as they are, and get no adapter that is trained: those with one of these texts in their "
        "name, e.g. vision_tower.",
    )
    dtype: str = option("auto", "Of the models that are loaded; auto: as they are saved.", DTYPES)
    keep_checkpoints: bool = option(
        False, "Keep the checkpoints of a training that is finished; by default they go once its models are saved."
    )
    learning_rate: float = option(2e-5, "The largest learning rate; with lora_r ten times this is usual.")

    def __post_init__(self):
        super().__post_init__()
        self.check_unread()
        for name in NUMBERS:
            value = getattr(self, name, None)
            if isinstance(value, (int, float)):
                value = [float(value)]
                setattr(self, name, value)
            if value is not None and (not value or not all(0 <= number < math.inf for number in value)):
                raise ValueError(f"{name} must be numbers that are not negative, at least one, got {value}")
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1, got {self.lora_r}")
        if self.push_to_hub:
            raise ValueError("push_to_hub would leave the models out, which have a folder each: upload what is saved")
        if self.optim in FUSED or self.optim.endswith("layerwise"):
            raise ValueError(
                f"optim {self.optim.value!r} steps in the backward pass: no rate or norm of one model can be kept to"
            )
        check_backend(self.backend)

    def loss_options(self):
        """What every coupling is told."""
        names = (
            "beta",
            "detach",
            "divergence",
            "teacher_floor",
            "tile_memory",
            "t_squared",
            "temperature",
            "precision",
            "vocab",
        )
        return self.of((*names, "backend", "unlabeled_weight")) | {"hard_weight": self.hard_weights()}

    def hard_weights(self):
        """Weight of the cross entropy of each role."""
        return [nth(self.hard_weight, place) for place in range(len(self.roles()))]

    def rate_of(self, place):
        """Learning rate of the model in this place, from 0."""
        return nth(self.learning_rates, place) if self.learning_rates else self.learning_rate

    def check_places(self, count):
        """Refuse more numbers than there are models, or stages, of which there is one less."""
        model, stage = ("model", count), ("stage", count - 1)
        limits = {"hard_weight": model, "learning_rates": model, "stage_weights": stage, "stage_epochs": stage}
        for name, (what, most) in limits.items():
            value = getattr(self, name, None)
            if value is not None and len(value) > most:
                raise ValueError(f"{name} must be one number per {what} at most, got {value} for {most} {what}s")

    def decisive(self):
        rates = [self.rate_of(place) for place in range(len(self.roles()))]
        told = super().decisive() | {"hard_weight": self.hard_weights(), "learning_rates": rates}
        return {name: value for name, value in told.items() if name != "learning_rate"}  # those of the models say it

    def rehearse(self):
        """Let the loss say what is wrong with its options, before any work."""
        batch = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "labels": torch.zeros(1, 2, dtype=torch.int64)}
        head = Head(torch.zeros(1, 1), torch.zeros(2, 1))
        backend, self.backend = self.backend, "reference"
        try:
            self.loss([lambda batch: head] * len(self.roles()), batch)
        finally:
            self.backend = backend


@dataclass
class PyramidConfig(CoupledConfig):
    """Options of PyramidTrainer; those of TrainingArguments hold for each stage."""

    mode: str = option(
        "concurrent",
        "How a stage's teacher takes part: it learns by its own cross entropy, mutually from the student too, or not.",
        pyramid.MODES,
    )
    stage_weights: list[float] = option([1.0], "Times the divergence: one number per stage, the last holds on.")
    stage_epochs: list[float] | None = option(
        None, "Passes over the data: one number per stage, the last holds on; by default num_train_epochs."
    )

    def __post_init__(self):
        super().__post_init__()
        for stage in range(1, len(self.stage_weights) + 1):
            self.of_stage(stage).rehearse()

    def roles(self):
        """{role: whether it learns} of a stage."""
        return {role: role == "student" or self.mode != "frozen" for role in pyramid.ROLES}

    def of_stage(self, stage):
        """These options as stage `stage`, from 1, has them: those of its two models, its weight and its epochs."""
        config, places = copy.copy(self), (stage - 1, stage)
        config.hard_weight = [nth(self.hard_weight, place) for place in places]
        config.learning_rates = [self.rate_of(place) for place in places]
        config.stage_weights = [nth(self.stage_weights, stage - 1)]
        if self.stage_epochs:
            config.num_train_epochs, config.stage_epochs = nth(self.stage_epochs, stage - 1), None
        return config

    def loss(self, models, batch, num_items=None):
        """`pyramid.loss` with these options: those of a stage, else of the first."""
        options = self.loss_options() | {"mode": self.mode, "divergence_weight": self.stage_weights[0]}
        return pyramid.loss(models, batch, num_items=num_items, **options)


@dataclass
class TernaryConfig(CoupledConfig):
    """Options of TernaryTrainer."""

    form: str = option(
        "two_teachers",
        "What is coupled: two teachers and a student, three models, or one pair by three terms.",
        ternary.FORMS,
    )
    teachers: str = option("frozen", "Whether teachers learn too, by their own cross entropy.", ternary.TEACHERS)
    teacher_weights: list[float] = option(
        [1.0], "Times the divergences: one number for all, or one per source (one_pair: forward and reverse)."
    )
    teacher_coupling: float = option(0.0, "Times the divergences between two trained teachers.")

    def __post_init__(self):
        super().__post_init__()
        self.check_places(len(self.roles()))
        self.rehearse()

    def roles(self):
        """{role: whether it learns}, in the order of the models."""
        live = self.form == "mutual" or self.teachers == "trained"
        return {role: live or role == "student" for role in ternary.roles(self.form)}

    def loss(self, models, batch, num_items=None):
        """`ternary.loss` with these options."""
        weight = self.teacher_weights[0] if len(self.teacher_weights) == 1 else self.teacher_weights
        options = (
            self.loss_options() | {"divergence_weight": weight} | self.of(("form", "teachers", "teacher_coupling"))
        )
        return ternary.loss(models, batch, num_items=num_items, **options)


def nth(numbers, place):
    """The number in this place, from 0; the last holds on."""
    return numbers[min(place, len(numbers) - 1)]
