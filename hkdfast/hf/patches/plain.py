"""transformers.Trainer itself, with a teacher."""

from types import MethodType

import torch

from ...batch import answer_rows
from ..head import evaluating
from ..trainer import RowMeanTrainer
from .loss import HeadLoss
from .patch import Kind


def check(trainer):
    """Refuse what would be ignored, or is not known to be right."""
    args, parallel = trainer.args, getattr(trainer.accelerator, "parallelism_config", None)
    if trainer.label_smoother is not None:
        raise ValueError(f"label_smoothing_factor={args.label_smoothing_factor} is not read by this loss: expected 0")
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func is not read any more: the loss is the divergence, expected None")
    for name in ("cp", "sp"):
        if parallel is not None and getattr(parallel, f"{name}_enabled", False):
            raise ValueError(f"{name}_size={getattr(parallel, f'{name}_size')} splits the sequences: expected 1")


def prepare(trainer, request):
    teacher = request.teacher
    if teacher is None:
        raise ValueError("transformers.Trainer has no teacher of its own: apply(trainer, teacher=model)")
    if teacher is trainer.model:
        raise ValueError("the teacher is the student itself: nothing would be learned")
    check(trainer)
    loss = HeadLoss(trainer.model, teacher, request, dict)
    original = trainer.prediction_step

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        rows, labels = answer_rows(inputs)
        # the Trainer has not prepared the teacher: it runs in the student's precision
        with evaluating(teacher), trainer.accelerator.autocast():
            taught = loss.teach(teacher, inputs, rows)
        inner = trainer.accelerator.unwrap_model(model)
        value, _ = loss(model, inputs, rows, taught, inner=inner, labels=labels, num_items=num_items_in_batch)
        value = RowMeanTrainer.scale_for_processes(trainer, value, num_items_in_batch)
        # outputs are wanted for their logits, which the loss did not make
        return (value, model(**inputs)) if return_outputs else value

    def prediction_step(model, inputs, prediction_loss_only, ignore_keys=None):
        if not prediction_loss_only:
            return original(model, inputs, prediction_loss_only, ignore_keys)
        inputs = trainer._prepare_inputs(inputs)
        count = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return compute_loss(model, inputs, num_items_in_batch=count).detach(), None, None

    trainer._set_signature_columns_if_needed()
    return {
        "compute_loss": compute_loss,
        "prediction_step": prediction_step,
        # Trainer counts labels only, and not for every model
        "_get_num_items_in_batch": MethodType(RowMeanTrainer._get_num_items_in_batch, trainer),
        "loss_is_scaled_for_ga": False,  # set anew by every compute_loss
        # columns that no model knows, which Trainer would take out of a dataset
        "_signature_columns": [*trainer._signature_columns, "shift_labels", "distill_only"],
    }


TRAINER = Kind(
    methods={
        "compute_loss": "self, model, inputs, return_outputs, num_items_in_batch",
        "prediction_step": "self, model, inputs, prediction_loss_only, ignore_keys",
        "_get_num_items_in_batch": "self, batch_samples, device",
    },
    prepare=prepare,
    reads={
        "_prepare_inputs": "self, inputs",
        "_set_signature_columns_if_needed": "self",
        "compute_loss_context_manager": "self",
        "get_tp_size": "self",
    },
)
