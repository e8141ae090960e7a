"""SEED as a Trainer: one copy of the weights, the frozen model teaches the model with the adapter."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import set_seed

from ..batch import answer_rows, derive_seed
from ..contrastive import purify
from ..heads import Head, Purified
from ..losses import Metrics, distill_loss
from ..seed import isolate
from .adapter import adapted, check_adapter, seed_lora_config
from .collator import QuestionCollator
from .configs import SeedConfig
from .family import set_attention
from .frozen import settle
from .head import LanguageHead, as_teacher, hidden_states, loss_in_head, unwrap_peft
from .rounds import RoundsTrainer
from .trainer import check_parts


class SeedTrainer(RoundsTrainer):
    """Trainer that purges a vision-language model of hallucinations it can find by itself: reconstruction of SEED
    (arXiv:2507.04680).

    At every answer position the frozen model is run on the image and on a noised image; the second is subtracted from
    the first, and the model with its adapter learns what is left. Batches need "pixel_values". With labels the answer
    positions are the labeled ones; without, the last token of each prompt, so that unlabeled questions suffice.

    Args:
        model: a Hugging Face model with vision and a language-model head, which gets a LoRA adapter on its language
            model; or a PEFT model with a trainable adapter of its own. With rounds > 1 its weights change.
        args: SeedConfig.
        train_dataset, eval_dataset, callbacks, optimizers, ...: as in Trainer.
        data_collator: default: QuestionCollator(processing_class), if that is a processor.
        processing_class: the processor, saved with the adapter.
        peft_config: an adapter of the caller's own making instead of the default LoRA.

    Raises:
        ValueError: before any work, if the model has no head, the adapter cannot be used, a weight outside it would be
            trained, or an option or argument would be ignored; at the first batch, if the head's scale or softcap
            cannot be told apart, the batch has no images, or training changes a buffer that is not saved.

    The adapter alone is trained. To train more of the model, name it in modules_to_save of peft_config, e.g.
    ["multi_modal_projector"]: then a copy is trained and saved with the adapter, and the teacher keeps the original.
    Modules without a trained parameter run in evaluation mode, so that student and teacher see the same features of a
    frozen vision tower. Frozen layers stay checkpointed if transformers checkpoints layer by layer
    (GradientCheckpointingLayer); in the few models that do it otherwise frozen parts are not.

    The result is one ordinary PEFT adapter on the original model, whatever the number of rounds: save it with
    save_model(folder), load it with PeftModel.from_pretrained(model, folder). Round n's product stands beside the
    others' in it, at n times the rank. Checkpoints are such adapters too, under output_dir/round-n when there are
    several rounds, and train(resume_from_checkpoint=...) resumes from any of them, to the same losses bit for bit.
    run.json in output_dir records the options of the run, beside its checkpoints: one of other options is not resumed
    (ValueError, naming the first difference), nor is a fresh one begun where another has left checkpoints. That model
    and data are the same is not checked.

    Logged beside the loss, as means over answer positions: divergence, confidence, contrast_weight, agreement,
    student_entropy, teacher_entropy; with labels cross_entropy; with SeedConfig.yes_rate yes_rate.
    """

    args: SeedConfig
    model: PeftModel

    def __init__(
        self,
        model: Any,
        args: SeedConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        args = SeedConfig("seed") if args is None else args
        if not isinstance(args, SeedConfig):
            raise TypeError(f"args must be a SeedConfig, got {type(args).__name__}")
        check_parts(args, others)
        if args.rounds > 1 and others.get("optimizers", (None, None)) != (None, None):
            raise ValueError("each round has its own optimizer: pass optimizer_cls_and_kwargs instead of optimizers")
        LanguageHead(model)
        set_attention(model, args.attn_implementation)
        if not isinstance(model, PeftModel):
            set_seed(args.seed)
            model = adapted(model, peft_config or default_adapter(model, args), args.rounds)
        elif peft_config is not None:
            raise ValueError("the model has an adapter already: pass either the bare model or no peft_config")
        else:
            check_adapter(model, args.rounds)
        if data_collator is None and hasattr(processing_class, "tokenizer"):
            data_collator = QuestionCollator(processing_class)
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **others,
        )
        self.head = LanguageHead(self.model)
        self.yes_no = yes_no_tokens(processing_class) if args.yes_rate else None
        # ((round, step), batches of it so far): which noise comes next
        self.places: dict[str, Any] = {"train": None, "eval": None}
        checkpointing: Any = args.activation_checkpointing_kwargs or {}
        if args.activation_checkpointing and checkpointing.get("use_reentrant"):
            self.model.enable_input_require_grads()

    def train(self, *args: Any, **others: Any) -> Any:
        self.places["train"] = None
        return super().train(*args, **others)

    # the loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if inputs.get("distill_only") is not None:
            raise ValueError("an example has no answer: SEED learns with all answers or, by a collator without, none")
        if self.model.training:
            settle(self.model)
        if not self.head.verified:
            self.head.verify(model, inputs)
        answers, labels = answer_rows(inputs)
        rows = self.counted(answers)
        labels = labels if labels is None else labels[rows[answers]]
        noise = self.next_noise(len(rows))
        with as_teacher(self.model):
            clean = hidden_states(model, self.head, inputs, rows)
            noisy = isolate(
                lambda batch: hidden_states(model, self.head, batch, rows),
                inputs,
                step=self.args.noise_step,
                sigma=self.args.noise_sigma,
                draws=self.args.noise_draws,
                placeholders=placeholders(unwrap_peft(self.model).config),
                **noise,
            )

        def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
            student = self.head.source(hidden)
            teacher = [self.head.source(x, adapted=False) for x in (clean, *noisy)]
            value, metrics = distill_loss(
                student, self.purify(*teacher), labels=labels, num_items=num_items_in_batch, return_metrics=True,
                **self.args.loss_options(),
            )  # fmt: skip
            return value, metrics | self.yes_rows(student, labels)

        with self.watched(self.model):
            value, metrics = loss_in_head(model, self.accelerator.unwrap_model(model), self.head, inputs, rows, loss)
        self.log_rows({name: rows for name, rows in metrics.items() if name != "cross_entropy" or labels is not None})
        value = self.scale_for_processes(value, num_items_in_batch)
        return (value, {"loss": value}) if return_outputs else value

    def purify(self, clean: Head, *noisy: Head) -> Purified:
        return purify(clean, list(noisy), self.args.alpha_of(self.round), **self.args.contrast_options())

    def next_noise(self, examples: int) -> dict[str, int]:
        """Seed and index of a batch's first example. They follow from the place of the example in its step alone, not
        from how the step is split over batches and processes, nor from what ran before it."""
        mode = "train" if self.model.training else "eval"
        step = (self.round, self.state.global_step) if mode == "train" else ()
        # the processes take the step's examples by turns, a batch of this size each; only the last may be smaller
        size = max(self._train_batch_size if mode == "train" else self.args.eval_batch_size, examples)
        last = self.places[mode]
        batch = last[1] + 1 if last and last[0] == step else 0
        self.places[mode] = (step, batch)
        return {
            "seed": derive_seed(self.args.seed, mode, *step),
            "first": (batch * self.accelerator.num_processes + self.accelerator.process_index) * size,
        }

    @torch.no_grad()
    def yes_rows(self, student: Head, labels: torch.Tensor | None) -> Metrics:
        """Per row, whether the student's logits are higher for yes than for no; nothing for rows of other words."""
        if self.yes_no is None:
            return {}
        yes, no = (torch.tensor(words, device=student.hidden.device) for words in self.yes_no)
        tops = []
        for words in (yes, no):
            logits = student.hidden @ student.weight[words].T.to(student.hidden.dtype)
            tops.append((logits if student.bias is None else logits + student.bias[words]).amax(-1))
        said = (tops[0] > tops[1]).float()
        return {"yes_rate": said if labels is None else said[torch.isin(labels, torch.cat([yes, no]))]}

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        if self.args.rounds > 1:
            logs["round"] = self.round
        super().log(logs, *rest)

    def evaluation_loop(self, *args: Any, **others: Any) -> Any:
        self.places["eval"] = None  # each evaluation under the same noise
        return super().evaluation_loop(*args, **others)


def default_adapter(model: Any, args: SeedConfig) -> Any:
    return seed_lora_config(
        model, r=args.lora_r, alpha=args.lora_alpha, dropout=args.lora_dropout, targets=args.lora_targets
    )


def placeholders(config: Any) -> dict[str, int | None]:
    """The tokens that the model replaces by what it sees, as `noised` takes them."""
    found = {}
    for kind in ("image", "video"):
        ids = (getattr(config, f"{kind}_token_{end}", None) for end in ("id", "index"))
        found[kind] = next((token for token in ids if token is not None), None)
    return found


def yes_no_tokens(processor: Any) -> list[list[int]]:
    """The tokens that an answer beginning with yes, and one beginning with no, may start with.

    Raises:
        ValueError: if there is no tokenizer, or the two words have the same first token.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None:
        raise ValueError("yes_rate needs the processor: pass processing_class")
    found = []
    for word in ("yes", "no"):
        starts: set[int] = set()
        for text in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
            for token in tokenizer(text, add_special_tokens=False).input_ids:
                start = tokenizer.decode([token]).strip().lower()
                if start:
                    starts |= {token} if word.startswith(start) else set()
                    break
        found.append(starts)
    if not all(found) or found[0] & found[1]:
        raise ValueError("yes_rate: yes and no have the same first token in this tokenizer")
    return [sorted(starts) for starts in found]
