"""Distillation in transformers.Trainer: one method, compute_loss.

    python examples/trainer_compute_loss.py

The student's backbone gives the hidden states; `distill_loss` does the rest, so that no logits are made. Gradient
accumulation is right, because the loss is divided by the Trainer's own count of labels. It runs on one device: the
head's weight is read outside the model's forward, where DDP and FSDP do not look. On several, give `distill_loss` the
logits of both models instead.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from hkdfast import Head, distill_loss

VOCABULARY = 1000


class DistillTrainer(Trainer):
    def __init__(self, *args, teacher, **others):
        super().__init__(*args, **others)
        mode = self.args.parallel_mode
        if mode != ParallelMode.NOT_PARALLEL:
            raise ValueError(f"DistillTrainer runs on one device, this is {mode}: set CUDA_VISIBLE_DEVICES=0")
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # what comes next
        with torch.no_grad():
            teacher = head_of(self.teacher, inputs)
        student = head_of(model, inputs)
        loss = distill_loss(
            student,
            teacher,
            "forward_kl",
            labels=labels,
            hard_weight=0.5,
            temperature=2.0,
            t_squared=True,
            num_items=num_items_in_batch,
        )
        return (loss, {"loss": loss}) if return_outputs else loss


def head_of(model, inputs):
    """The model's LM head on its last hidden states, not multiplied out."""
    hidden = model.model(inputs["input_ids"], attention_mask=inputs.get("attention_mask")).last_hidden_state
    return Head(hidden, model.lm_head.weight)


def tiny(width, layers):
    """A model from a configuration. Yours: AutoModelForCausalLM.from_pretrained(name)."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def main(steps=30):
    torch.manual_seed(0)
    teacher, student = tiny(64, 2), tiny(32, 1)
    torch.nn.init.normal_(teacher.lm_head.weight, std=0.3)  # an untrained teacher has little to say
    examples = [{"input_ids": ids, "labels": ids} for ids in torch.randint(VOCABULARY, (32, 16))]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        trainer = DistillTrainer(student, args, train_dataset=examples, teacher=teacher)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
