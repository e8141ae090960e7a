"""SDFTTrainer and SDPOTrainer of trl.experimental, whose teacher is the student with another prompt."""

from dataclasses import dataclass, replace

import torch

from ...losses import coupled_loss, distill_loss
from ..head import hidden_states
from .loss import HeadLoss, completion_rows, generalized_jsd, refuse_labels
from .patch import Kind

MODE = "full_logits"  # the distillation_mode whose loss is over the whole vocabulary


@dataclass(frozen=True)
class Deferred:
    """In the place of a student's logits: what it will be run on, with the loss in its head."""

    model: torch.nn.Module
    batch: dict


def prepare(trainer, request):
    args = trainer.args
    if args.distillation_mode != MODE:
        raise ValueError(f"distillation_mode={args.distillation_mode!r} reads few words only: expected {MODE!r}")
    if getattr(args, "distillation_weight", 1.0) == 0:
        raise ValueError("distillation_weight=0.0 leaves no divergence to compute: expected more, up to 1.0")
    refuse_labels(request.options)
    loss = HeadLoss(
        trainer.model,
        trainer.accelerator.unwrap_model(trainer.teacher_model),
        request,
        lambda: generalized_jsd(args.distillation_alpha) | {"temperature": trainer.temperature},
    )
    original, forward_logits = trainer._compute_teacher_student_logits, trainer._forward_logits
    teacher_ids = None  # while a step's logits are computed, if they can be done without

    def _compute_teacher_student_logits(model, teacher_model, inputs):
        nonlocal teacher_ids
        if getattr(args, "distillation_weight", 1.0) == 1:  # else SDPO's policy loss reads logits too
            teacher_ids = inputs["teacher_input_ids"]
        try:
            return original(model, teacher_model, inputs)
        finally:
            teacher_ids = None

    def _forward_logits(model, input_ids, attention_mask, logits_to_keep):
        if teacher_ids is None:
            return forward_logits(model, input_ids, attention_mask, logits_to_keep)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if input_ids is not teacher_ids:
            return Deferred(model, batch)
        # here the adapters are those of the teacher
        every = torch.ones(len(input_ids), logits_to_keep, device=input_ids.device)
        hidden = hidden_states(model, loss.teacher, batch, completion_rows(input_ids.shape[1], every))
        return loss.teacher.source(hidden.view(len(input_ids), logits_to_keep, -1))

    def _compute_self_distillation_loss(model, inputs, distillation_logits):
        mask, ids = distillation_logits.loss_mask, distillation_logits.completion_ids
        rows = mask != 0
        share = mask / mask.sum(-1, keepdim=True).clamp(min=1.0)  # of the mean of a sequence
        clip, before = args.distillation_is_clip, inputs.get("old_per_token_logps")
        ratio = torch.ones_like(share)

        def weigh(student):
            """(N,) weights of the rows: how much more probable the student's tokens are now, and their share."""
            if clip is not None and before is not None:
                change = token_logps(student, ids[rows]) - before[rows]
                ratio[rows] = change.clamp(-20, 20).exp().clamp(max=clip)
            return (ratio * share)[rows] / len(mask)

        student, teacher = distillation_logits.student_logits, distillation_logits.teacher_logits
        if isinstance(student, Deferred):
            value, metrics = loss(
                student.model,
                student.batch,
                completion_rows(student.batch["input_ids"].shape[1], mask),
                replace(teacher, hidden=teacher.hidden[rows]),
                reduction="sum",
                weigh=lambda head: weigh(scaled(head, 1 / trainer.temperature)),
            )
        else:
            sources = [logits[rows] for logits in (student, teacher)]
            weights = weigh(sources[0])
            if trainer.temperature != 1:  # by which they are divided
                sources = [logits * trainer.temperature for logits in sources]
            value, metrics = distill_loss(
                *sources, row_weight=weights, reduction="sum", return_metrics=True, **loss.arguments()
            )
        every = metrics["divergence"] * loss.factor() * (ratio * mask)[rows]
        mean = every.sum() / mask.sum().clamp(min=1.0)
        mode = "train" if model.training else "eval"
        trainer._log_self_distillation_metric(mode, trainer.accelerator.gather(mean).mean().item())
        return value

    return {
        "_compute_teacher_student_logits": _compute_teacher_student_logits,
        "_forward_logits": _forward_logits,
        "_compute_self_distillation_loss": _compute_self_distillation_loss,
    }


def scaled(head, factor):
    """The Head whose logits are so many times those of another."""
    softcap = None if head.softcap is None else head.softcap * factor
    return replace(head, scale=head.scale * factor, softcap=softcap)


@torch.no_grad()
def token_logps(source, tokens):
    """(N,) log-probabilities of tokens (N,) under logits (N, V) or a Head of N rows."""
    return -coupled_loss([source], [[None]], labels=tokens, hard_weight=1.0, reduction="none")


SELF_DISTILLATION = Kind(
    methods={
        "_compute_teacher_student_logits": "self, model, teacher_model, inputs",
        "_forward_logits": "self, model, input_ids, attention_mask, logits_to_keep",
        "_compute_self_distillation_loss": "self, model, inputs, distillation_logits",
    },
    prepare=prepare,
    reads={"_log_self_distillation_metric": "self, mode, value"},
)
