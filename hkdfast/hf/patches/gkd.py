"""GKDTrainer and GOLDTrainer of trl.experimental, where teacher and student read the same tokens."""

import torch

from ...batch import answer_rows
from .loss import HeadLoss, generalized_jsd
from .patch import Kind


def replacement(trainer, request, configured, others):
    """compute_loss at the heads.

    Args:
        configured: as in HeadLoss.
        others: function from a step's inputs to what the models are given beside input_ids and attention_mask.
    """
    loss = HeadLoss(trainer.model, trainer.accelerator.unwrap_model(trainer.teacher_model), request, configured)

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")} | others(inputs)
        rows, labels = answer_rows(batch | {"labels": inputs["labels"]})
        trainer.teacher_model.eval()
        with torch.no_grad():
            teacher = loss.teach(trainer.teacher_model, batch, rows)
        value, _ = loss(model, batch, rows, teacher, labels=labels, num_items=num_items_in_batch)
        # outputs are wanted for their logits, which the loss did not make
        return (value, model(**batch)) if return_outputs else value

    return {"compute_loss": compute_loss}


def prepare_gkd(trainer, request):
    # its temperature is that of generation: the loss has none
    return replacement(trainer, request, lambda: generalized_jsd(trainer.beta), lambda inputs: {})


def prepare_gold(trainer, request):
    if trainer.use_uld_loss and trainer.teacher_tokenizer is not None:
        raise ValueError(
            "use_uld_loss=True compares the words of two tokenizers, which hkdfast does not: expected False"
        )
    return replacement(
        trainer,
        request,
        lambda: generalized_jsd(trainer.beta) | {"temperature": trainer.temperature},
        trainer._get_model_forward_kwargs,
    )


METHODS = {"compute_loss": "self, model, inputs, return_outputs, num_items_in_batch"}
GKD = Kind(METHODS, prepare_gkd)
GOLD = Kind(METHODS, prepare_gold, reads={"_get_model_forward_kwargs": "self, inputs, exclude"})
