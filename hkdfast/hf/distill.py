"""Distillation from one teacher or several as a Trainer, and as a mixin for your own Trainer."""

from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from ..batch import answer_rows
from ..engine.loss_memory import loss_memory
from ..losses import distill_loss
from ..ops.objective import UNLABELED
from . import run_state, teachers
from .adapter import check_adapter
from .collator import QuestionCollator
from .distill_config import DistillArguments, DistillConfig
from .family import check_family, check_heads, load_model, model_names, prepare_for_training, set_attention
from .frozen import settle
from .head import LABELS, LanguageHead, loss_in_head, model_inputs
from .loading import fill_adapter
from .teachers import TEACHER_ID
from .text_collator import TextCollator
from .trainer import UNREAD, RowMeanMixin

COLUMNS = ("shift_labels", "distill_only", "attention_mask", "position_ids", TEACHER_ID)


class DistillMixin(RowMeanMixin):
    """Distillation for a subclass of Trainer: `class MyTrainer(DistillMixin, SFTTrainer)`.

    It replaces the loss, in training, evaluation and prediction, by hkdfast.distill_loss at the heads of student and
    teacher, with the options of its arguments; no logits are made. See `DistillTrainer` for batches and logs.

    Args:
        model: a Hugging Face model with a language-model head, or a PEFT model.
        args: with the options of DistillArguments, see there.
        teacher: a Hugging Face model; a folder or Hub name of one, or of a PEFT adapter; "self", the PEFT model without
            its adapter; or a dict of such, from which each example's "teacher_id" chooses one. Teachers are run in
            evaluation mode, and their weights are left without gradients.
        others: of the next class, by name.

    Raises:
        TypeError: args without the options of DistillArguments, an argument that no class has.
        ValueError, OSError: as DistillTrainer.
    """

    unread = {name: UNREAD[name] for name in ("model_init", "compute_loss_func")}

    def __init__(self, model: Any, args: Any, *, teacher: Any, **others: Any) -> None:
        if not isinstance(args, DistillArguments):
            raise TypeError(
                f"args must have the options of DistillArguments, as DistillConfig, got {type(args).__name__}"
            )
        given = teachers.given(teacher, args.dtype, args.attn_implementation)
        teachers.check(model, given, args.vocab)
        super().__init__(model, args, **others)
        self.head = LanguageHead(self.model)
        self.teachers = {
            name: teachers.BaseTeacher(self.model, self.head) if teachers.is_self(one) else teachers.Teacher(one)
            for name, one in given.items()
        }
        for one in self.teachers.values():
            one.move_to(self.args.device)
        self.data_collator = TeacherCollator(self.data_collator, list(self.teachers))

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]

    # the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        chosen = inputs.pop(TEACHER_ID, None)
        if self.model.training:
            settle(self.model)
        if not self.head.verified:
            self.head.verify(model, inputs)
        answers, labels = answer_rows(inputs)
        if labels is None:
            raise ValueError(
                "the batch has no labels: use a collator that sets them, e.g. DataCollatorForSeq2Seq, with -100 at "
                "positions without a loss; distill_only (B, T) bool marks positions whose next token is unknown"
            )
        rows = self.counted(answers)
        labels = labels[rows[answers]]
        taught = list(self.teach(model, inputs, rows, chosen))
        options = self.args.loss_options() | {"return_metrics": True, "num_items": num_items_in_batch}
        if num_items_in_batch is None and len(taught) > 1:
            options["num_items"] = len(labels)

        def loss(hidden):
            student, total, metrics = self.head.source(hidden), 0.0, {}
            for name, index, teacher, states in taught:
                part = student if index is None else replace(student, hidden=student.hidden[index])
                known = labels if index is None else labels[index]
                value, found = distill_loss(part, teacher.source(states), labels=known, **options)
                total = total + value
                del found["contrast_weight"]
                found["cross_entropy"] = found["cross_entropy"][known != UNLABELED]
                if name is not None:
                    found[f"divergence_{name}"] = found["divergence"]
                for metric, values in found.items():
                    metrics.setdefault(metric, []).append(values)
            return total, {metric: torch.cat(values) for metric, values in metrics.items()}

        with self.watched(self.model):
            value, metrics = loss_in_head(model, self.accelerator.unwrap_model(model), self.head, inputs, rows, loss)
        self.log_rows(metrics)
        value = self.scale_for_processes(value, num_items_in_batch)
        return (value, {"loss": value}) if return_outputs else value

    def loss_memory(self, rows, positions):
        """What the loss of a batch takes beside the models, in bytes, as `engine.loss_memory.LossMemory`.

        Args:
            rows: answer positions of the batch.
            positions: all of its positions, for which a loss from whole logits makes logits.
        """
        student, *others = (
            head.multiplied(torch.zeros(1, head.base().weight.shape[1], dtype=head.base().weight.dtype, device=place))
            for head, place in ((one.head, self.args.device) for one in (self, *self.teachers.values()))
        )
        student = replace(student, hidden=student.hidden.requires_grad_())
        options = self.args.loss_options() | {"return_metrics": True}
        with self.compute_loss_context_manager():
            found = [loss_memory(student, teacher, rows, positions, **options) for teacher in others]
        return max(found, key=lambda one: one.fused)

    def teach(self, model, inputs, rows, chosen):
        """What the teachers of a batch see at these rows.

        Args:
            model: the trained model as it is called.
            rows: (B, T) bool, N of them.
            chosen: (B,) number of each example's teacher, or (B, T) of each position's; None for a single one.

        Yields:
            (name, index of its rows among the N or None for all, teacher, hidden states at them).
        """
        batch = {name: x for name, x in inputs.items() if name not in LABELS}
        if chosen is None:
            ((name, teacher),) = self.teachers.items()
            yield name, None, teacher, teacher.states(model, batch, rows)
            return
        chosen = chosen.to(rows.device)
        chosen = (chosen if chosen.dim() == 2 else chosen[:, None]).expand(rows.shape)
        for number, (name, teacher) in enumerate(self.teachers.items()):
            own = rows & (chosen == number)
            examples = own.any(1)
            if not bool(examples.any()) and (number or bool(rows.any())):
                continue  # but the first teacher teaches a batch without answers, so that there is a loss
            part, kept = teachers.choose_examples(batch, examples) if bool(examples.any()) else (batch, slice(None))
            yield name, own[rows].nonzero()[:, 0], teacher, teacher.states(model, part, own[kept])

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, _, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        inputs = {name: x for name, x in self._prepare_inputs(inputs).items() if name != TEACHER_ID}
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**model_inputs(inputs)).logits
        return loss, logits, inputs.get("labels", inputs.get("shift_labels"))


class TeacherCollator:
    """A data collator that turns the "teacher_id" of examples, the name of a teacher, into its number (B,) int64.

    Args:
        collator: makes batches of examples without it; or makes "teacher_id" (B,) or (B, T) by itself.
        names: of the teachers; [None] for a single one, which needs no "teacher_id".

    Raises:
        ValueError: while batching, an example without a teacher among several, or with one that is unknown.
    """

    def __init__(self, collator, names):
        self.collator, self.names = collator, names

    def __call__(self, examples):
        named = [TEACHER_ID in each if hasattr(each, "keys") else False for each in examples]
        if self.names == [None] and any(named):
            raise ValueError("an example has a teacher_id, but there is a single teacher: pass a dict of teachers")
        if not any(named):
            batch = self.collator(examples)
            if self.names != [None] and TEACHER_ID not in batch:
                raise ValueError(f"the examples have no teacher_id, expected one of {self.names} for each")
            return batch
        numbers = [self.number_of(place, each) for place, each in enumerate(examples)]
        batch = self.collator([{k: x for k, x in each.items() if k != TEACHER_ID} for each in examples])
        batch[TEACHER_ID] = torch.tensor(numbers)
        return batch

    def number_of(self, place, example):
        name = example.get(TEACHER_ID)
        if name not in self.names:
            raise ValueError(f"example {place} of the batch: teacher_id is {name!r}, expected one of {self.names}")
        return self.names.index(name)


class DistillTrainer(DistillMixin, Trainer):
    """Trainer that distills a teacher, or several, into a language model or vision-language model.

    The loss is hkdfast.distill_loss, divergence_weight * divergence + hard_weight * cross entropy, as a mean over the
    answer positions of a step. Logits exist only as tiles, in training and evaluation.

    Args:
        model: the student: a Hugging Face model, a PEFT model, or a folder or Hub name of either.
        teacher: a model; a folder or Hub name of one, or of a PEFT adapter; "self" for the student without its
            adapter; or a dict of such, of which each example chooses one by its "teacher_id". Put into evaluation mode,
            and its weights are left without gradients.
        args: DistillConfig.
        data_collator: default: for a processor QuestionCollator(answers=True), else TextCollator, which takes examples
            of text, prompt and completion, messages, or input_ids with labels. Those of transformers work too.
        train_dataset, eval_dataset, compute_metrics, callbacks, optimizers, ...: as in Trainer.
        processing_class: the tokenizer or processor, saved with the model; default: that of the model's name.
        peft_config: an adapter of the caller's own making instead of LoRA of rank args.lora_r.

    Batches need "labels" or "shift_labels" (B, T); positions that "distill_only" (B, T) bool marks have no label and
    learn from the teacher alone. Packed batches (1, T) with "position_ids" are understood. With several teachers
    "teacher_id" is (B,) int64, the number of each example's teacher in the dict, or (B, T) of each position's; in text
    each teacher runs on its own examples, with images on all.

    Raises:
        ValueError: before any work: no head, teachers that are the model itself or share weights with it, tokenizers
            that differ, vocabularies of different sizes with vocab=None, an option or argument that would be ignored.
            At the first batch: a head that no probe explains, no labels, an unknown teacher_id.
        OSError: before any work: no model or tokenizer under a name.

    evaluate and predict give the loss and the means below; with compute_metrics, and in predict, the logits are made
    and kept as in Trainer. train(resume_from_checkpoint=...) continues to the same losses bit for bit.

    Logged beside the loss, as means over answer positions: divergence, cross_entropy (of labeled positions),
    student_entropy, teacher_entropy, confidence, agreement; with several teachers divergence_NAME.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any,
        args: DistillConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        args = DistillConfig("distill") if args is None else args
        named = dict(teacher) if isinstance(teacher, dict) else {None: teacher}
        names = [name for name in model_names([model, *named.values()]) if name and name != teachers.SELF]
        processing_class = check_family(names, processing_class)
        if data_collator is not None and getattr(args, "max_length", None) is not None:
            raise ValueError("max_length is used by the default text collator only: truncate in your data_collator")
        if isinstance(args, DistillArguments):
            if model_names([model])[0]:
                model = load_model(model, args.dtype)
            set_attention(model, args.attn_implementation)
            model = prepare_for_training(model, args, peft_config, shared=any(map(teachers.is_self, named.values())))
        super().__init__(
            model,
            args,
            teacher=teacher,
            data_collator=data_collator or default_collator(processing_class, args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **others,
        )
        heads = {"teacher" if name is None else f"teacher {name!r}": one.model for name, one in self.teachers.items()}
        check_heads({"the model": self.model} | heads, processing_class)

    def train(self, resume_from_checkpoint: Any = None, **others: Any) -> Any:
        """Trainer.train. resume_from_checkpoint=True resumes from the last complete checkpoint. A checkpoint at the end
        of its training is loaded without further training, and None is returned."""
        if isinstance(self.model, PeftModel):
            shared = any(isinstance(one, teachers.BaseTeacher) for one in self.teachers.values())
            check_adapter(self.model, shared=shared)  # the caller may have changed requires_grad
        checkpoint = run_state.checkpoint_of(self.args.output_dir, resume_from_checkpoint)
        self.check_room()
        if checkpoint and self.restore_if_finished(checkpoint):
            return None
        return super().train(resume_from_checkpoint=checkpoint, **others)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if isinstance(self.model, PeftModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            fill_adapter(self.model, resume_from_checkpoint)  # Trainer warns of weights that fit nothing and continues
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def default_collator(processing_class, args):
    """The collator of examples for a tokenizer or processor; None, for Trainer's own, without either."""
    if hasattr(processing_class, "tokenizer"):
        return QuestionCollator(processing_class, answers=True)
    return None if processing_class is None else TextCollator(processing_class, getattr(args, "max_length", None))
