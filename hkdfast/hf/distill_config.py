"""The options of DistillTrainer as a Trainer's arguments."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from .. import DIVERGENCES, Head
from ..engine.renamed import CONFIG, refuses
from ..losses import distill_loss
from .configs import UNREAD, StudentArguments, arg

# read by DistillTrainer, which keeps logits for compute_metrics and the columns that its loss reads
READ = ("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "remove_unused_columns")


@dataclass
class DistillArguments(StudentArguments):
    """Options of DistillMixin, to be mixed into the arguments of a trainer of one's own:

    @dataclass
    class MyConfig(DistillArguments, SFTConfig): ...
    """

    divergence: str = arg("forward_kl", "Divergence of the student from its teacher.", DIVERGENCES)
    divergence_weight: float = arg(1.0, "Weight of the divergence beside the cross-entropy on the labels.")
    hard_weight: float = arg(0.0, "Weight of the cross-entropy on the labels.")
    max_length: int | None = arg(
        None, "Cut sequences after so many tokens; None: never. Read by the default collator of text."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {self.max_length}")
        options = self.loss_options() | {"backend": "reference"}
        head = Head(torch.zeros(1, 1), torch.zeros(2, 1))
        distill_loss(head, head, labels=torch.tensor([0]), **options)

    def unread(self) -> dict[str, str]:
        return {name: reason for name, reason in UNREAD.items() if name not in READ}


@refuses(CONFIG)
@dataclass
class DistillConfig(DistillArguments, TrainingArguments):
    """Options of DistillTrainer: those of `hkdfast.distill_loss`, and of TrainingArguments."""
