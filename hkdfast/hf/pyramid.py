"""The pyramid as a trainer: a chain of models, two of them at a time."""

import gc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from . import run_state
from .configs import PyramidConfig
from .coupled import CoupledTrainer, restore, save_model
from .family import (
    absolute_names,
    adapters_of,
    check_apart,
    check_family,
    check_heads,
    load_model,
    meta_model,
    model_names,
    prepare_for_training,
    set_attention,
)
from .frozen import flags_kept
from .trainer import check_parts


class PyramidTrainer:
    """Trains a chain of models, large to small, stage by stage: reconstruction of HKD4VLM's pyramid-like progressive
    online distillation (arXiv:2506.13038).

    Stage k couples the models k and k + 1 of the chain as teacher and student, in the mode of its PyramidConfig; its
    student is the teacher of stage k + 1. Only the two models of a stage are in memory, if the chain is given by names.

    Args:
        models: list of at least two, from the largest to the smallest: folders or Hub names of models or PEFT adapters,
            loaded when their stage comes; or Hugging Face models, whose weights change.
        args: PyramidConfig. Those of TrainingArguments hold for each stage.
        data_collator: default: QuestionCollator(processing_class, answers=True).
        train_dataset, eval_dataset, callbacks, ...: as in Trainer, for every stage.
        processing_class: the processor of the batches, saved with each model; default: that of the first name.
        peft_config: an adapter of the caller's own making for all models, or a list with one or None for each.

    Raises:
        ValueError: before any work: a chain of one model, a model twice, tokenizers or image processors that differ
            (both named), a head with fewer words than the tokenizer, weights to freeze or layers to adapt that a model
            does not have, models that share a weight, one that is trained outside an adapter and not saved with it, an
            option or argument that would be ignored, output_dir with stages of another run (the first difference
            named); at the first batch, a head that is not what it seems, or a buffer that training changes and an
            adapter does not save.
        OSError: before any work: no model or processor under a name.

    Modules without a trained parameter run in evaluation mode, dropout and running statistics included.

    Each stage has a folder output_dir/stage-k: what it is (run.json), its checkpoints, and when it is finished in their
    place "teacher" and "student", those that learn, as ordinary Hugging Face folders, or PEFT adapters with lora_r.
    train(resume_from_checkpoint=True) resumes from output_dir: finished stages are kept, the one that was
    stopped resumes from its last checkpoint, to the same losses bit for bit. That the data is the same is not checked.

    Logged beside the loss, as means over answer positions, for each role: cross_entropy, entropy, divergence and
    agreement, e.g. student_divergence; and its grad_norm.
    """

    def __init__(
        self,
        models: Sequence[Any],
        args: PyramidConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Iterable[Any] | None = None,
        **others: Any,
    ) -> None:
        args = PyramidConfig("pyramid") if args is None else args
        if not isinstance(args, PyramidConfig):
            raise TypeError(f"args must be a PyramidConfig, got {type(args).__name__}")
        check_parts(args, others)
        if isinstance(models, str) or len(models) < 2:
            raise ValueError(f"a pyramid needs at least two models, from large to small, got {models!r}")
        if others.get("optimizers", (None, None)) != (None, None):
            raise ValueError("each stage has its own optimizer: pass optimizer_cls_and_kwargs instead of optimizers")
        objects = [id(model) for model in models if not isinstance(model, (str, Path))]
        if len(set(objects)) < len(objects):
            raise ValueError("a model occurs twice in the chain: pass different objects, or names")
        check_apart({f"model {place}": model for place, model in enumerate(models, 1)})
        args.check_places(len(models))
        self.adapters, self.names = adapters_of(peft_config, len(models)), model_names(models)
        processing_class = check_family([name for name in self.names if name], processing_class)
        self.sizes = []  # weights of each model
        for place, (model, name) in enumerate(zip(models, self.names, strict=True)):
            outline = meta_model(name) if name else model
            set_attention(outline, args.attn_implementation)
            self.sizes.append(sum(parameter.numel() for parameter in outline.parameters()))
            check_heads({f"model {place + 1}": outline}, processing_class)
            if self.is_trained(place, args) and (name or isinstance(model, PeftModel)):  # another would get its adapter
                with flags_kept(outline):
                    prepare_for_training(outline, args, self.adapters[place])
        self.given, self.args, self.stages = list(models), args, len(models) - 1
        self.data = {
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            **others,
        }
        self.processing_class, self.callbacks = processing_class, list(callbacks or ())
        self.history: list[dict[str, Any]] = []  # entries of the log
        self.model: Any = None  # the last student, once trained

    def add_callback(self, callback: Any) -> None:
        """Give all stages that are still to come a TrainerCallback, or a class of one."""
        self.callbacks.append(callback)

    def train(self, resume_from_checkpoint: bool | None = False) -> Any:
        """Run all stages, or with True those that are left.

        Returns:
            the last student.

        Raises:
            ValueError: if output_dir holds stages that are not to be resumed or are of another chain or other options,
                or is to be resumed and does not exist.
        """
        if self.model is not None:
            raise ValueError("the chain has been trained: make a new trainer for more")
        done = self.finished_stages(resume_from_checkpoint)
        self.history = [entry for stage in done for entry in stage["history"]]
        teacher = self.load_stage_model(len(done), len(done))
        for stage in range(len(done) + 1, self.stages + 1):
            student = self.load_stage_model(stage, stage - 1)
            self.history += self.run(stage, teacher, student, resume_from_checkpoint)
            teacher = student
            del student
            gc.collect()  # a Trainer and its parts refer to each other, and keep the last model alive
        self.model = teacher
        return self.model

    def save_model(self, folder: str | Path) -> None:
        """Save the last student and the processor."""
        if self.args.should_save:
            save_model(self.model, folder, self.processing_class)

    def folder(self, stage: int) -> Path:
        return Path(str(self.args.output_dir)) / f"stage-{stage}"

    def finished_stages(self, resume: bool | None) -> list[dict[str, Any]]:
        """What `finish` wrote of the stages that are finished, in their order."""
        if resume not in (True, False, None):
            raise ValueError(
                f"resume_from_checkpoint must be True or False, got {resume!r}: a pyramid resumes from its output_dir"
            )
        output_dir = Path(str(self.args.output_dir))
        begun = [str(folder) for folder in sorted(output_dir.glob("stage-*")) if run_state.has_training(folder)]
        if begun and not resume:
            raise ValueError(
                f"{begun[-1]} already holds a training run: pass resume_from_checkpoint=True or choose another "
                "output_dir"
            )
        if resume and not output_dir.is_dir():
            raise ValueError(f"nothing to resume: no folder {output_dir}")
        for stage in range(1, self.stages + 1):
            if run_state.has_training(self.folder(stage)):
                run_state.check_manifest(self.folder(stage), self.manifest(stage))
        done: list[dict[str, Any]] = []
        while len(done) < self.stages and (found := run_state.read_done(self.folder(len(done) + 1))) is not None:
            done.append(found)
        late = [
            self.folder(stage)
            for stage in range(len(done) + 2, self.stages + 1)
            if run_state.has_training(self.folder(stage))
        ]
        if late:
            missing = self.folder(len(done) + 1)
            raise ValueError(
                f"{late[0]} already holds a training run, but {missing} is not finished: choose another output_dir"
            )
        return done

    def manifest(self, stage: int) -> dict[str, Any]:
        """All that determines the result of a stage, for `run_state.start_or_resume`."""
        adapters = [adapter and adapter.to_dict() for adapter in self.adapters]
        chain = {"stage": stage, "models": absolute_names(self.names), "peft_config": adapters}
        return chain | self.args.of_stage(stage).fingerprint()

    @staticmethod
    def is_trained(place: int, args: PyramidConfig) -> bool:
        """Whether the model in this place of the chain, from 0, is trained in some stage."""
        return bool(place) or args.roles()["teacher"]

    def load_stage_model(self, place: int, done: int) -> Any:
        """The model at this index of the chain, after the first `done` stages."""
        if self.names[place]:
            model = load_model(self.names[place], self.args.dtype)
        else:
            model, self.given[place] = self.given[place], None  # no model is kept longer than its stages
        set_attention(model, self.args.attn_implementation)
        if self.is_trained(place, self.args):
            model = prepare_for_training(model, self.args, self.adapters[place])
        if place and place == done:
            restore(model, self.folder(done) / "student")
        return model

    def run(self, stage: int, teacher: Any, student: Any, resume: bool | None) -> list[dict[str, Any]]:
        """Train one stage and save it. Returns what it logged."""
        args = self.args.of_stage(stage)
        args.output_dir = str(self.folder(stage))
        trainer = CoupledTrainer(
            {"teacher": teacher, "student": student},
            args,
            args.loss,
            {"teacher": args.rate_of(0), "student": args.rate_of(1)},
            title=f"pyramid, stage {stage} of {self.stages}",
            log_extra={"stage": stage},
            manifest=self.manifest(stage),
            callbacks=[*self.callbacks],
            **self.data,
        )
        trainer.train(resume_from_checkpoint=run_state.last_checkpoint(args.output_dir) if resume else None)
        trainer.finish()
        trainer.accelerator.free_memory()
        return trainer.state.log_history
