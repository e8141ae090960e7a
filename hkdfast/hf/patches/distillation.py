"""trl.DistillationTrainer: its divergence over hidden states, with heads that are what the models compute."""

import torch

from .loss import HeadLoss, completion_rows, generalized_jsd, refuse_labels
from .patch import Kind

# what a step's inputs may hold for a model that sees
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def model_batch(inputs):
    """What both models are run on: prompts and completions, and the images."""
    seen = {name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None}
    if "pixel_values" not in seen:
        seen.pop("image_grid_thw", None)
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    return {"input_ids": ids, "attention_mask": mask} | seen


def prepare(trainer, request):
    if trainer.teacher_model is None:
        raise ValueError(f"this {type(trainer).__name__} has no teacher_model")
    refuse_labels(request.options)
    unwrap = trainer.accelerator.unwrap_model
    loss = HeadLoss(
        trainer.model,
        unwrap(trainer.teacher_model),
        request,
        lambda: generalized_jsd(trainer.beta) | {"temperature": trainer.temperature},
    )
    original = trainer.compute_loss

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        # here and not below: the models' wrappers are around it, and no forward is under way
        loss.verify(model, trainer.teacher_model, model_batch(inputs))
        return original(model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(unwrapped_student, inputs, num_items_in_batch):
        batch, mask = model_batch(inputs), inputs["completion_mask"]
        rows = completion_rows(batch["input_ids"].shape[1], mask * inputs.get("tool_mask", 1))
        trainer.teacher_model.eval()
        with torch.no_grad():
            teacher = loss.teach(trainer.teacher_model, batch, rows)
        # its forward itself: the hooks of its wrapper have run around this
        value, metrics = loss(
            lambda **inputs: unwrapped_student.forward(**inputs),
            batch,
            rows,
            teacher,
            inner=unwrapped_student,
            num_items=num_items_in_batch,
        )
        return value, metrics["student_entropy"].sum(), rows.sum()

    return {"compute_loss": compute_loss, "_compute_loss": _compute_loss}


DISTILLATION = Kind(
    methods={
        "compute_loss": "self, model, inputs, return_outputs, num_items_in_batch",
        "_compute_loss": "self, unwrapped_student, inputs, num_items_in_batch",
    },
    prepare=prepare,
)
