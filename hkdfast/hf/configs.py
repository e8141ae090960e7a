"""The options of SEED, of the pyramid and of the ternary refinement as a Trainer's arguments."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from .. import DIVERGENCES, Head, pyramid, ternary
from ..batch import Batch, Model
from ..contrastive import WORDS, purify
from ..data.generation import DTYPES
from ..engine.options import PRECISIONS, LossOptions
from ..engine.renamed import CONFIG, refuses
from ..losses import Metrics, distill_loss
from ..noise import diffuse
from ..ops.dispatch import MODULES
from ..ops.dispatch import validate as check_backend
from .options import own

# options that are lists of numbers, one per model, stage or source; a single number is accepted for all
LIST_FIELDS = ("hard_weight", "learning_rates", "stage_weights", "stage_epochs", "teacher_weights")
LAW = ("confidence", "threshold", "mode", "plausibility", "outside")  # passed to purify unchanged
LOSS = ("divergence", "beta", "divergence_weight", "hard_weight", *LossOptions.__dataclass_fields__)
# options of TrainingArguments that change the result of a training
FINGERPRINT = (
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
# our own options that do not
NOT_IN_FINGERPRINT = ("tile_memory", "backend", "keep_checkpoints", "yes_rate", "attn_implementation")
NO_LOGITS = "no logits exist, and the logged metrics are means over answer positions"
CASTS = "it casts the model's weights in place, a teacher's too: load the model in that dtype"
# options of TrainingArguments that would be ignored or do not work: refused unless they have their default value
UNREAD = {
    "label_smoothing_factor": "the distributions of the teachers already smooth the target",
    "neftune_noise_alpha": "a frozen embedding gets no noise, and the teacher would not see the noise of the student",
    "use_liger_kernel": "it replaces the forward pass in which the loss is computed",
    "use_cache": "every sequence runs through the model at once",
    "include_for_metrics": NO_LOGITS,
    "batch_eval_metrics": NO_LOGITS,
    "eval_do_concat_batches": NO_LOGITS,
    "bf16_full_eval": CASTS,
    "fp16_full_eval": CASTS,
    "auto_find_batch_size": "it would restart with weights that are already trained: set per_device_train_batch_size",
    "remove_unused_columns": "it removes columns that the collator and the loss read",
}
FUSED = ("lomo", "adalomo")  # optimizers that keep no gradient
LABELS = ("labels", "shift_labels")  # the columns that label_names may name


def arg(default: Any, text: str, choices: Iterable[str] | None = None) -> Any:
    metadata: dict[str, Any] = {"help": text} | ({"choices": list(choices)} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class SharedArguments:
    """Options that mean the same to every trainer, and its own defaults of TrainingArguments."""

    beta: float = arg(0.5, "Weight of the teacher in the mixture of jensen_shannon, skew_kl and skew_reverse_kl.")
    temperature: float = arg(1.0, "Divides the logits of all models.")
    teacher_floor: float | None = arg(
        None,
        "Lower limit of the teacher's log-probabilities, in nats; reverse_kl needs it if the teacher drops tokens.",
    )
    lora_r: int = arg(16, "Rank of the adapter.")
    lora_alpha: int = arg(32, "The LoRA product is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = arg(0.0, "Dropout before the LoRA layers of a trained model.")
    lora_targets: list[str] | None = arg(
        None, "Layers to adapt, by the last part of their name; by default every linear layer of the language model."
    )
    precision: str = arg("float32", "Precision of the logits of a tile.", PRECISIONS)
    tile_memory: int | None = arg(None, "Memory budget for tiles, in bytes; by default as in distill_loss.")
    backend: str | None = arg(None, "Implementation of the loss; by default the fastest one available.", MODULES)
    attn_implementation: str | None = arg(
        None,
        "Attention of all models, e.g. sdpa, eager or flash_attention_2 (of the extra flash); by default the one that "
        "transformers chooses.",
    )
    learning_rate: float = arg(2e-4, "The largest learning rate.")
    num_train_epochs: float = arg(1.0, "Passes over the data in each round or stage; max_steps overrides it.")
    logging_steps: float = arg(10, "Log every this many steps.")
    logging_nan_inf_filter: bool = arg(False, "Log a loss that is not finite as the mean of the losses before it.")
    remove_unused_columns: bool = arg(
        False, "Remove columns that the model does not read; the collator needs them, so False."
    )

    def select(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def loss_options(self) -> dict[str, Any]:
        """The options of `hkdfast.distill_loss` among the fields: those of LOSS that the config has."""
        return self.select(name for name in LOSS if name in type(self).__dataclass_fields__)

    def check_unread(self) -> None:
        """Refuse options of TrainingArguments that would be accepted and then ignored.

        Raises:
            ValueError: naming the option, with the reason.
        """
        for name, reason in self.unread().items():
            if getattr(self, name, None) not in (type(self).__dataclass_fields__[name].default, None, []):
                raise ValueError(f"{name} cannot be used here: {reason}")
        label_names = getattr(self, "label_names", None)
        if not set(label_names or ()) <= set(LABELS):
            raise ValueError(f"label_names must be among {', '.join(LABELS)}, got {label_names}")

    def unread(self) -> dict[str, str]:
        """{name: reason} of the options of TrainingArguments that `check_unread` refuses."""
        return UNREAD

    def fingerprint(self) -> dict[str, Any]:
        """{name: value} of the options that change the result, for `run_state.start_or_resume`."""
        return self.select(name for name in (*own(type(self)), *FINGERPRINT) if name not in NOT_IN_FINGERPRINT)


@refuses(CONFIG)
@dataclass
class SeedConfig(SharedArguments, TrainingArguments):
    """Options of SeedTrainer; those of TrainingArguments hold for each round."""

    divergence: str = arg(
        "reverse_kl",
        "Divergence of the student from the purified teacher; reverse_kl is mode-seeking.",
        DIVERGENCES,
    )
    hard_weight: float = arg(0.0, "Weight of the cross-entropy on the labels; needs labels.")
    alpha: list[float] = arg(
        [1.5, 1.0],
        "Strength a of the contrast (1 + a) clean - a noisy, one number per round; the last one is repeated.",
    )
    alpha_schedule: str = arg(
        "constant",
        "Strength of a row by its confidence c: alpha, alpha (1 - c), or alpha where c < threshold.",
        WORDS["schedule"],
    )
    confidence: str = arg("max_prob", "Measure of confidence.", WORDS["confidence"])
    threshold: float = arg(0.5, "The gate opens below this confidence.")
    mode: str = arg("extrapolate", "(1 + a) clean - a noisy, or clean - a noisy.", WORDS["mode"])
    plausibility: float = arg(
        0.01,
        "Apply the contrast only to tokens with at least this fraction of the largest probability (the plausibility "
        "constraint of VCD); 0 applies it to all. Without it the contrast can raise near-impossible tokens.",
    )
    outside: str = arg("clean", "The other tokens keep their clean probability, or get none.", WORDS["outside"])
    noise_step: int = arg(
        500, "Noise on the images: step 0 to 999 of the schedule of VCD. Ignored if noise_sigma is given."
    )
    noise_sigma: float | None = arg(None, "Add noise of this standard deviation in normalized pixels instead.")
    noise_draws: int = arg(
        1, "Noise samples per step, one forward pass each; their logits are averaged. New in every step."
    )
    rounds: int = arg(1, "Self-evolving rounds: after each one the merged model becomes the next teacher.")
    yes_rate: bool = arg(False, "Log the fraction of answers that prefer yes to no; for yes-no questions.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_unread()
        if isinstance(self.alpha, (int, float)):
            self.alpha = [float(self.alpha)]
        for name in ("rounds", "noise_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.alpha:
            raise ValueError("alpha must be one number per round, got none")
        self.validate()
        if self.rounds > 1 and self.load_best_model_at_end:
            raise ValueError("load_best_model_at_end compares checkpoints of one round: use rounds=1")

    def validate(self) -> None:
        """Check the options by the functions that take them, before any work."""
        check_backend(self.backend)
        head = Head(torch.zeros(1, 1), torch.zeros(2, 1))
        diffuse(torch.zeros(1), self.noise_step, sigma=self.noise_sigma)
        options = self.loss_options() | {"backend": "reference"}
        for alpha in self.alpha:
            distill_loss(
                head, purify(head, head, alpha, **self.contrast_options()), labels=torch.tensor([0]), **options
            )

    def contrast_options(self) -> dict[str, Any]:
        """The options of `purify` except alpha."""
        return {"schedule": self.alpha_schedule, **self.select(LAW)}

    def alpha_of(self, number: int) -> float:
        """Strength of the contrast in round `number`, from 1."""
        return at_or_last(self.alpha, number - 1)


@dataclass
class StudentArguments(SharedArguments):
    """Options of trainers whose teachers are models of their own."""

    t_squared: bool = arg(False, "Multiply divergences by temperature ** 2.")
    vocab: str | None = arg(
        "common", "Vocabulary to compare if heads are padded to different sizes; None requires one size.", ["common"]
    )
    lora_r: int | None = arg(  # type: ignore[assignment]  # SEED has no other way than an adapter
        None, "Train adapters of this rank; by default all weights are trained."
    )
    freeze: list[str] | None = arg(
        None,
        "Do not train parameters whose name contains one of these texts, e.g. vision_tower; they get no adapter.",
    )
    dtype: str = arg("auto", "Data type of the loaded models; auto: as saved.", DTYPES)
    learning_rate: float = arg(2e-5, "The largest learning rate; with lora_r, ten times as much is usual.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # of TrainingArguments, into which this is mixed
        self.check_unread()
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1, got {self.lora_r}")
        check_backend(self.backend)


@dataclass
class CoupledConfig(StudentArguments, TrainingArguments):
    """Options that PyramidTrainer and TernaryTrainer share."""

    divergence: str = arg("forward_kl", "Divergence of a model from the models it learns from.", DIVERGENCES)
    hard_weight: list[float] = arg(
        [1.0],
        "Weight of the cross-entropy on the labels, one value per model (the last is repeated). Ignored for models "
        "that are not trained.",
    )
    detach: bool = arg(
        True, "Detach the teacher, so that only the student receives the gradient; with --no-detach both do."
    )
    unlabeled_weight: float = arg(1.0, "Weight of answers without a label, which are only distilled.")
    learning_rates: list[float] | None = arg(
        None, "Largest learning rate of each model (the last is repeated); by default learning_rate for all."
    )
    keep_checkpoints: bool = arg(
        False, "Keep the checkpoints of a finished training; by default they are deleted once its models are saved."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in LIST_FIELDS:
            value = getattr(self, name, None)
            if isinstance(value, (int, float)):
                value = [float(value)]
                setattr(self, name, value)
            if value is not None and (not value or not all(0 <= number < math.inf for number in value)):
                raise ValueError(f"{name} must be numbers that are not negative, at least one, got {value}")
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub would not upload the models, which have a folder each: upload the saved folders"
            )
        if self.optim in FUSED or self.optim.endswith("layerwise"):
            raise ValueError(
                f"optim {OptimizerNames(self.optim).value!r} steps in the backward pass: it allows no learning rate or "
                "gradient norm per model"
            )

    def roles(self) -> dict[str, bool]:
        """{role: whether it is trained}, in the order of the models."""
        raise NotImplementedError

    def loss(
        self, models: Sequence[Model], batch: Batch, num_items: float | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Metrics]:
        """The loss of the models on a batch, with these options."""
        raise NotImplementedError

    def loss_options(self) -> dict[str, Any]:
        """The options that `pyramid.loss` and `ternary.loss` share."""
        own = self.select(("detach", "unlabeled_weight")) | {"hard_weight": self.hard_weights()}
        return super().loss_options() | own

    def hard_weights(self) -> list[float]:
        """Weight of the cross entropy of each role."""
        return [at_or_last(self.hard_weight, place) for place in range(len(self.roles()))]

    def rate_of(self, place: int) -> float:
        """Learning rate of the model at this index."""
        return at_or_last(self.learning_rates, place) if self.learning_rates else self.learning_rate

    def check_places(self, count: int) -> None:
        """Refuse lists that are longer than the number of models, or of stages (one less)."""
        model, stage = ("model", count), ("stage", count - 1)
        limits = {"hard_weight": model, "learning_rates": model, "stage_weights": stage, "stage_epochs": stage}
        for name, (what, most) in limits.items():
            value = getattr(self, name, None)
            if value is not None and len(value) > most:
                raise ValueError(f"{name} must be one number per {what} at most, got {value} for {most} {what}s")

    def fingerprint(self) -> dict[str, Any]:
        rates = [self.rate_of(place) for place in range(len(self.roles()))]
        found = super().fingerprint() | {"hard_weight": self.hard_weights(), "learning_rates": rates}
        return {name: value for name, value in found.items() if name != "learning_rate"}  # the list replaces it

    def validate(self) -> None:
        """Check the options by computing a tiny loss, before any work."""
        batch = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "labels": torch.zeros(1, 2, dtype=torch.int64)}
        head = Head(torch.zeros(1, 1), torch.zeros(2, 1))
        backend, self.backend = self.backend, "reference"
        try:
            self.loss([lambda batch: head] * len(self.roles()), batch)
        finally:
            self.backend = backend


@refuses(CONFIG)
@dataclass
class PyramidConfig(CoupledConfig):
    """Options of PyramidTrainer; those of TrainingArguments hold for each stage."""

    mode: str = arg(
        "concurrent",
        "Teacher of a stage: trained by its own cross-entropy, also trained by the student, or frozen.",
        pyramid.MODES,
    )
    stage_weights: list[float] = arg([1.0], "Weight of the divergence, one number per stage (the last is repeated).")
    stage_epochs: list[float] | None = arg(
        None, "Passes over the data, one number per stage (the last is repeated); by default num_train_epochs."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for stage in range(1, len(self.stage_weights) + 1):
            self.of_stage(stage).validate()

    def roles(self) -> dict[str, bool]:
        """{role: whether it is trained} of a stage."""
        return {role: role == "student" or self.mode != "frozen" for role in pyramid.ROLES}

    def of_stage(self, stage: int) -> "PyramidConfig":
        """The options of stage `stage`, from 1: those of its two models, its weight and its epochs."""
        config, places = copy.copy(self), (stage - 1, stage)
        config.hard_weight = [at_or_last(self.hard_weight, place) for place in places]
        config.learning_rates = [self.rate_of(place) for place in places]
        config.stage_weights = [at_or_last(self.stage_weights, stage - 1)]
        if self.stage_epochs:
            config.num_train_epochs, config.stage_epochs = at_or_last(self.stage_epochs, stage - 1), None
        return config

    def loss(
        self, models: Sequence[Model], batch: Batch, num_items: float | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Metrics]:
        """`pyramid.loss` with these options: those of a stage, by default of the first."""
        options = self.loss_options() | {"mode": self.mode, "divergence_weight": self.stage_weights[0]}
        return pyramid.loss(models, batch, num_items=num_items, **options)


@refuses(CONFIG)
@dataclass
class TernaryConfig(CoupledConfig):
    """Options of TernaryTrainer."""

    form: str = arg(
        "two_teachers",
        "What is coupled: two teachers and a student, three models, or one pair with three terms.",
        ternary.FORMS,
    )
    teachers: str = arg("frozen", "Whether the teachers are trained too, by their own cross-entropy.", ternary.TEACHERS)
    teacher_weights: list[float] = arg(
        [1.0], "Weights of the divergences: one number, or one per teacher (one_pair: forward and reverse)."
    )
    teacher_coupling: float = arg(0.0, "Weight of the divergences between two trained teachers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_places(len(self.roles()))
        self.validate()

    def roles(self) -> dict[str, bool]:
        """{role: whether it is trained}, in the order of the models."""
        trained = self.form == "mutual" or self.teachers == "trained"
        return {role: trained or role == "student" for role in ternary.roles(self.form)}

    def loss(
        self, models: Sequence[Model], batch: Batch, num_items: float | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Metrics]:
        """`ternary.loss` with these options."""
        weight = self.teacher_weights[0] if len(self.teacher_weights) == 1 else self.teacher_weights
        options = (
            self.loss_options() | {"divergence_weight": weight} | self.select(("form", "teachers", "teacher_coupling"))
        )
        return ternary.loss(models, batch, num_items=num_items, **options)


def at_or_last(numbers: Sequence[float], place: int) -> float:
    """numbers[place], or the last number if there are fewer."""
    return numbers[min(place, len(numbers) - 1)]
