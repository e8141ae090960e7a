"""Train several models together: the common part of the pyramid's stages and the ternary refinement."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import set_seed
from transformers.trainer_callback import ProgressCallback

from ..batch import IGNORE_INDEX
from . import run_state
from .adapter import check_adapter
from .collator import QuestionCollator
from .configs import CoupledConfig
from .family import check_apart, check_heads
from .frozen import settle
from .head import LanguageHead, head_fn
from .loading import fill_adapter, load_weights
from .trainer import RowMeanTrainer


class CoupledModels(torch.nn.Module):
    """Models and their loss as one module, so that a wrapper (DDP, autocast) sees all parameters that are used.

    Args:
        models: {role: model}, in the order of the loss's models.
        is_trained: {role: whether the model is trained}. The others are run in eval mode, their weights not trainable.
        loss: function from (functions of a batch, batch, num_items) to (scalar, dict of per-row metrics).
    """

    def __init__(self, models, is_trained, loss):
        super().__init__()
        self.models: Any = torch.nn.ModuleDict(models)
        self.learning = [role for role in models if is_trained[role]]
        self.loss = loss
        self.heads = [LanguageHead(model) for model in models.values()]
        self.functions = [head_fn(model, head=head) for model, head in zip(models.values(), self.heads, strict=True)]
        for role, model in models.items():
            if role not in self.learning:
                model.requires_grad_(False)

    def forward(self, batch, num_items=None):
        return self.loss(self.functions, batch, num_items)

    def verify(self, batch):
        """Verify the heads. Not in forward: autocast would cache weights that it casts without gradient."""
        for model, head in zip(self.models.values(), self.heads, strict=True):
            if not head.verified:
                head.verify(model, batch)

    def train(self, mode=True):
        super().train(mode)
        for role, model in self.models.items():
            if role not in self.learning:
                model.eval()
            elif mode:
                settle(model)
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **others):
        for role in self.learning:
            model = self.models[role]
            model.activation_checkpointing_enable(activation_checkpointing_kwargs, **others)
            if isinstance(model, PeftModel) and (activation_checkpointing_kwargs or {}).get("use_reentrant"):
                model.enable_input_require_grads()


class CoupledTrainer(RowMeanTrainer):
    """Trainer of CoupledModels: a learning rate, a gradient norm and a folder for each trained model.

    Args:
        models: {role: model}.
        args: CoupledConfig.
        loss: as CoupledModels takes it.
        rates: {role: learning rate}.
        title: of the progress bar.
        log_extra: dict that is added to every entry of the log.
        manifest: all that determines the result, for `run_state.start_or_resume`; None: output_dir is not checked.
        data_collator: default: QuestionCollator(processing_class, answers=True), if that is a processor.
        others: as in Trainer.

    Raises:
        ValueError: on a model that occurs twice, a head with fewer tokens than the tokenizer, FSDP or DeepSpeed.
    """

    model: CoupledModels
    args: CoupledConfig

    def __init__(
        self,
        models,
        args,
        loss,
        rates,
        *,
        title=None,
        log_extra=None,
        manifest=None,
        data_collator=None,
        processing_class=None,
        **others,
    ):
        if len({id(model) for model in models.values()}) < len(models):
            raise ValueError(f"the models {', '.join(models)} must be different objects: one occurs twice")
        check_apart(models, args.roles())
        if args.learning_rates and others.get("optimizers", (None, None))[0] is not None:
            raise ValueError("learning_rates are ignored with your own optimizer: set the rates of its groups")
        if data_collator is None and hasattr(processing_class, "tokenizer"):
            data_collator = QuestionCollator(processing_class, answers=True)
        check_heads(models, processing_class)
        self.rates, self.log_extra, self.manifest, self.grad_norms = rates, log_extra or {}, manifest, {}
        module = CoupledModels(models, args.roles(), loss)
        super().__init__(module, args, data_collator=data_collator, processing_class=processing_class, **others)
        if title and self.pop_callback(ProgressCallback):
            self.add_callback(TitledBar(title))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP and DeepSpeed shard weights that the coupled loss needs whole: use DDP")

    def train(self, resume_from_checkpoint=None, **others):
        """Trainer.train. resume_from_checkpoint=True resumes from the last complete checkpoint. A checkpoint at the end
        of its training is loaded without further training, and None is returned. ValueError if the checkpoint belongs
        to another run, or a new run finds checkpoints of another run in its output_dir."""
        for role in self.model.learning:
            if isinstance(self.model.models[role], PeftModel):
                check_adapter(self.model.models[role], shared=False)  # the caller may have changed requires_grad
        checkpoint = run_state.checkpoint_of(self.args.output_dir, resume_from_checkpoint)
        self.check_room()
        if self.manifest is not None:
            run_state.start_or_resume(self.args.output_dir, self.manifest, checkpoint, self.args.should_save)
        if checkpoint and self.restore_if_finished(checkpoint):
            return None
        set_seed(self.args.seed)
        return super().train(resume_from_checkpoint=checkpoint, **others)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.model.verify(inputs)
        if not self.model.training:
            inputs = self.without_copies(inputs)
        with self.watched(*self.model.models.values()):
            value, metrics = model(inputs, num_items_in_batch)
        self.log_rows(metrics)
        value = self.scale_for_processes(value, num_items_in_batch)
        return (value, {"loss": value}) if return_outputs else value

    def without_copies(self, inputs):
        """The batch without labels at the rows of repeated examples, see `counted`."""
        out = ~self.counted(torch.ones_like(inputs["input_ids"], dtype=torch.bool))
        nothing = {"labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX, "distill_only": False}
        masked = {name: inputs[name].masked_fill(out, x) for name, x in nothing.items() if inputs.get(name) is not None}
        return dict(inputs) | masked

    def log(self, logs, *rest):
        if "grad_norm" in logs:
            logs |= {f"{role}_grad_norm": norm.item() for role, norm in self.grad_norms.items()}
        logs |= self.log_extra
        super().log(logs, *rest)

    # each model its own optimization

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            groups, optimizer.param_groups = optimizer.param_groups, []
            for group in groups:
                for role in self.model.learning:
                    own = {id(parameter) for parameter in self.model.models[role].parameters()}
                    chosen = [parameter for parameter in group["params"] if id(parameter) in own]
                    if chosen:
                        optimizer.add_param_group(group | {"params": chosen, "lr": self.rates[role]})
        return self.optimizer

    def _clip_grad_norm(self, model):
        return self.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        return self.clip(float("inf")) if grad_norm is None else grad_norm

    def clip(self, largest):
        """Clip the gradient of each model separately, so that none scales another. Returns the total norm."""
        self.accelerator.unscale_gradients()
        for role in self.model.learning:
            norm = torch.nn.utils.clip_grad_norm_(self.model.models[role].parameters(), largest)
            self.grad_norms[role] = norm.to(self.args.device)  # without gradients it is on the CPU
        return torch.stack(list(self.grad_norms.values())).norm()

    # each model has its own folder. Trainer has no public hook for the content of a checkpoint, hence these overrides.

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            self.save_models(output_dir or self.args.output_dir)

    def save_models(self, folder):
        """Save every trained model, with the processor, as an ordinary Hugging Face folder named by its role."""
        for role in self.model.learning:
            save_model(self.model.models[role], Path(folder) / role, self.processing_class)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        for role in self.model.learning:
            restore(self.model.models[role], Path(resume_from_checkpoint) / role)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def finish(self):
        """Save the models in output_dir, mark the training as finished, and delete checkpoints unless they are kept."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.save_models(self.args.output_dir)
            run_state.mark_done(self.args.output_dir, self.log_extra | {"history": self.state.log_history})
            for checkpoint in () if self.args.keep_checkpoints else run_state.checkpoints(self.args.output_dir):
                shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()


class TitledBar(ProgressCallback):
    """Trainer's progress bar, with a name."""

    def __init__(self, title):
        super().__init__()
        self.title = title

    def on_train_begin(self, args, state, control, **others):
        super().on_train_begin(args, state, control, **others)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)


def save_model(model, folder, processor=None):
    """An ordinary Hugging Face folder, or a PEFT adapter, with the processor."""
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def restore(model, folder):
    """Load the weights of a folder that `save_model` wrote into a model of the same kind."""
    if isinstance(model, PeftModel):
        fill_adapter(model, folder)
    else:
        model.load_state_dict(load_weights(folder, model.dtype, type(model)).state_dict())
