"""The pyramid as a trainer: a chain of models, two of them at a time."""

import copy
import gc
from functools import partial
from pathlib import Path

from .config import PyramidConfig
from .coupled import DONE, CoupledTrainer, finished, last_checkpoint, restore, save_model
from .family import check_family, load_model, trainable


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
            (both named), output_dir with stages of another run; at the first batch, a head that is not what it seems.
        OSError: before any work: no model or processor under a name.

    Each stage has a folder output_dir/stage-k: its checkpoints, and when it is finished "teacher" and "student", those
    that learn, as ordinary Hugging Face folders, or PEFT adapters with lora_r. train(resume_from_checkpoint=True) goes
    on where output_dir stands: finished stages are kept, the one that was stopped goes on from its last checkpoint, to
    the same losses bit for bit.

    Logged beside the loss, as means over answer positions, for each role: cross_entropy, entropy, divergence and
    agreement, e.g. student_divergence; and its grad_norm.
    """

    def __init__(
        self,
        models,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        callbacks=None,
        **others,
    ):
        args = PyramidConfig("pyramid") if args is None else args
        if not isinstance(args, PyramidConfig):
            raise TypeError(f"args must be a PyramidConfig, got {type(args).__name__}")
        if isinstance(models, str) or len(models) < 2:
            raise ValueError(f"a pyramid needs at least two models, from large to small, got {models!r}")
        if others.get("optimizers", (None, None)) != (None, None):
            raise ValueError("each stage has its own optimizer: pass optimizer_cls_and_kwargs instead of optimizers")
        objects = [id(model) for model in models if not isinstance(model, (str, Path))]
        if len(set(objects)) < len(objects):
            raise ValueError("a model stands twice in the chain: each place needs an object of its own, or a name")
        self.adapters = list(peft_config) if isinstance(peft_config, (list, tuple)) else [peft_config] * len(models)
        if len(self.adapters) != len(models):
            raise ValueError(f"peft_config must be one or {len(models)}, one per model, got {len(self.adapters)}")
        self.names = [str(model) if isinstance(model, (str, Path)) else None for model in models]
        processing_class = check_family([name for name in self.names if name], processing_class)
        self.given, self.args, self.stages = list(models), args, len(models) - 1
        self.data = {
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            **others,
        }
        self.processing_class, self.callbacks = processing_class, list(callbacks or ())
        self.history, self.model = [], None  # entries of the log; the last student, once trained

    def add_callback(self, callback):
        """Give all stages that are still to come a TrainerCallback, or a class of one."""
        self.callbacks.append(callback)

    def train(self, resume_from_checkpoint=False):
        """Run all stages, or with True those that are left.

        Returns:
            the last student.

        Raises:
            ValueError: if output_dir holds stages that are not to be resumed or are of another chain, or is to be
                resumed and does not exist.
        """
        if self.model is not None:
            raise ValueError("the chain has been trained: make a new trainer for more")
        done = self.standing(resume_from_checkpoint)
        self.history = [entry for about in done for entry in about["history"]]
        teacher = self.obtain(len(done), len(done))
        for stage in range(len(done) + 1, self.stages + 1):
            student = self.obtain(stage, stage - 1)
            self.history += self.run(stage, teacher, student, resume_from_checkpoint)
            teacher = student
            del student
            gc.collect()  # a Trainer and its parts hold each other, and the model before
        self.model = teacher
        return self.model

    def save_model(self, folder):
        """Save the last student and the processor."""
        if self.args.should_save:
            save_model(self.model, folder, self.processing_class)

    def folder(self, stage):
        return Path(self.args.output_dir) / f"stage-{stage}"

    def standing(self, resume):
        """What `finish` wrote of the stages that are finished, in their order."""
        if resume not in (True, False, None):
            raise ValueError(f"resume_from_checkpoint must be True or False, got {resume!r}: output_dir says how far")
        output_dir = Path(self.args.output_dir)
        begun = sorted(
            str(each.parent) for name in (DONE, "checkpoint-*") for each in output_dir.glob(f"stage-*/{name}")
        )
        if begun and not resume:
            raise ValueError(f"{begun[-1]} has been trained in: resume it, or name another output_dir")
        if resume and not output_dir.is_dir():
            raise ValueError(f"nothing to resume: no folder {output_dir}")
        done = []
        while len(done) < self.stages and (about := finished(self.folder(len(done) + 1))) is not None:
            done.append(about)
        chains = [about["models"] for about in done if about["models"] != self.names]
        if chains:
            raise ValueError(f"the stages in {self.args.output_dir} are of {chains[0]}, not of {self.names}")
        return done

    def obtain(self, place, done):
        """The model in this place of the chain, from 0, as the first `done` stages have left it."""
        if self.names[place]:
            model = load_model(self.names[place], self.args.dtype)
        else:
            model, self.given[place] = self.given[place], None  # so that nothing here outlives its stages
        if place or self.args.roles()["teacher"]:
            model = trainable(model, self.args, self.adapters[place])
        if place and place == done:
            restore(model, self.folder(done) / "student")
        return model

    def run(self, stage, teacher, student, resume):
        """Train one stage and save it. Returns what it logged."""
        args = copy.copy(self.args)
        args.output_dir, args.num_train_epochs = str(self.folder(stage)), self.args.epochs_of(stage)
        trainer = CoupledTrainer(
            {"teacher": teacher, "student": student},
            args,
            partial(args.loss, stage=stage),
            {"teacher": args.rate_of(stage - 1), "student": args.rate_of(stage)},
            title=f"pyramid, stage {stage} of {self.stages}",
            marks={"stage": stage},
            callbacks=[*self.callbacks],
            **self.data,
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir) if resume else None)
        trainer.finish(args.output_dir, stage=stage, models=self.names)
        trainer.accelerator.free_memory()
        return trainer.state.log_history
