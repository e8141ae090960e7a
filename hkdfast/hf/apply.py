"""`apply`: hkdfast in a trainer that exists already, by one line."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from .family import check_words
from .patches.distillation import DISTILLATION
from .patches.gkd import GKD, GOLD
from .patches.loss import check_options
from .patches.patch import MARK, Kind, Patch, Request
from .patches.plain import TRAINER
from .patches.self_distillation import SELF_DISTILLATION

# {(package, class): Kind}, by name, because TRL may not be installed
KINDS = {
    ("trl", "DistillationTrainer"): DISTILLATION,
    ("trl", "GKDTrainer"): GKD,
    ("trl", "GOLDTrainer"): GOLD,
    ("trl", "SDFTTrainer"): SELF_DISTILLATION,
    ("trl", "SDPOTrainer"): SELF_DISTILLATION,
    ("transformers", "Trainer"): TRAINER,
}


def apply(
    trainer: Trainer,
    divergence: str | None = None,
    *,
    teacher: PreTrainedModel | PeftModel | None = None,
    teacher_tokenizer: Any = None,
    **options: Any,
) -> Patch:
    """Let a trainer compute its distillation loss by hkdfast: from hidden states and heads, without logits.

        hkdfast.hf.apply(trainer)  # trl.DistillationTrainer, GKDTrainer, GOLDTrainer, SDFTTrainer, SDPOTrainer
        hkdfast.hf.apply(trainer, "reverse_kl", teacher=teacher)  # transformers.Trainer
        trainer.train()

    TRL's trainers compute the loss that they did before, unless divergence or an option says otherwise: their `beta`
    or `distillation_alpha` (0 is forward_kl, 1 is reverse_kl, between them it is jensen_shannon's) and the temperature
    of their loss are read at every batch. Scale and softcap of the logits are found by a probe at the first batch, not
    in the configuration; LoRA on the head is understood.

    Args:
        trainer: a `trl.DistillationTrainer`; a `GKDTrainer`, `GOLDTrainer` (with use_uld_loss=False), `SDFTTrainer` or
            `SDPOTrainer` (with distillation_mode="full_logits") of trl.experimental; a `transformers.Trainer` of a
            model with a language-model head. Or one of a subclass that has the methods which are replaced from these.
            Its object is changed, not its class. If SDPO mixes in its policy loss (distillation_weight below 1), the
            logits are made, for that loss reads them too.
        divergence: as in `hkdfast.distill_loss`. None: what the trainer's config says (forward_kl for
            transformers.Trainer).
        teacher: for transformers.Trainer alone: a model on the student's device, which is not trained. Labels of -100
            are left out, "shift_labels" are used as they are, packed batches (1, T) are understood.
        teacher_tokenizer: the teacher's tokenizer or processor. If given, the trainer's own must number the same words
            the same way.
        options: of `hkdfast.distill_loss`: beta, temperature, t_squared, hard_weight, vocab, teacher_floor, precision,
            tile_memory, backend, ....

    Returns:
        A Patch, whose `undo()` restores the trainer; so does the end of a `with` block.

    Raises:
        TypeError: on a trainer or an option that is not known.
        ValueError: on a trainer that is patched already, has methods of its own in the place of those that are
            replaced, or is of a version where they take other arguments; on an option out of range; if the heads of
            student and teacher are on two devices or have vocabularies of two sizes (see vocab); on tokenizers that
            differ; on settings of the trainer that would be ignored. At the first batch, if a model changes its logits
            behind its head in another way than by scale and softcap.
    """
    owner, kind = kind_of(trainer)
    if vars(trainer).get(MARK) is not None:
        raise ValueError(f"hkdfast is applied to this {type(trainer).__name__} already: undo() that first")
    kind.check(owner, trainer)
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs in one process: start one process each, by torchrun or accelerate launch"
        )
    check_options(divergence, options)
    if teacher is not None and kind is not TRAINER:
        raise ValueError(f"{type(trainer).__name__} has its teacher: teacher is of transformers.Trainer alone")
    if teacher_tokenizer is not None:
        if trainer.processing_class is None:
            raise ValueError("teacher_tokenizer is compared with the trainer's processing_class, which is None")
        check_words(("student", trainer.processing_class), ("teacher", teacher_tokenizer))
    values = kind.prepare(trainer, Request(divergence, options, teacher))
    return Patch(trainer, values, tuple(kind.methods))


def kind_of(trainer: Trainer) -> tuple[type, Kind]:
    """(class, Kind) of the known class that a trainer is of."""
    for owner in type(trainer).__mro__:
        kind = KINDS.get((owner.__module__.partition(".")[0], owner.__name__))
        if kind is not None:
            return owner, kind
    known = ", ".join(f"{package}.{name}" for package, name in KINDS)
    raise TypeError(f"unknown trainer {type(trainer).__name__}, expected one of {known}")
