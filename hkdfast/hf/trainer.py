"""Base of the trainers: a loss that is a mean over answer rows, and its metrics."""

import inspect
import shutil
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..batch import answer_rows
from ..shell import nearest
from . import run_state
from .frozen import buffers_kept
from .loading import reading
from .progress import Progress

# arguments of Trainer that would be ignored
UNREAD = {
    "model_init": "it needs a model",
    "compute_loss_func": "the options of its config define the loss",
    "compute_metrics": "it makes no logits; it logs the means over answer positions that its docstring names",
    "preprocess_logits_for_metrics": "it makes no logits",
}


def check_parts(args, others, kind=Trainer, unread=UNREAD):
    """Refuse arguments that a trainer would ignore or does not have, before any work.

    Args:
        args: its config.
        others: {name: value} of the arguments for Trainer.
        kind: the class of the trainer.
        unread: {argument: reason} of the refused arguments.

    Raises:
        ValueError: naming the option or argument, with the reason.
        TypeError: an argument that no class of the trainer has.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: start one process per GPU with torchrun or accelerate launch"
        )
    args.check_unread()
    known = {name for base in kind.__mro__ if "__init__" in vars(base) for name in parameters(base.__init__)}
    for name in others:
        if name not in known:
            raise TypeError(f"{kind.__name__} has no argument {name!r}")
        if name in unread and others[name] is not None:
            raise ValueError(f"{name} is not used by this trainer: {unread[name]}")


def parameters(function):
    return inspect.signature(function).parameters


class RowMeanMixin:
    """Mixin for a subclass of Trainer whose loss is a mean over the answer rows of a step, over all processes.

    A subclass computes the loss, divided by num_items_in_batch if it is given, and passes per-row metrics to
    `log_rows`; their means are logged beside the loss. No logits are made: `predict` returns metrics, and None for
    predictions.
    """

    unread = UNREAD  # arguments of Trainer that are refused
    loss_is_scaled_for_ga = False  # set anew by every compute_loss
    watching = True  # until a training step has shown that no buffer changes which is not saved

    def __init__(self, model, args, **others):
        check_parts(args, others, type(self), self.unread)
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # pinning memory is for GPUs, and torch warns without one
        super().__init__(model, args, **others)
        if any(isinstance(each, Progress) for each in self.callback_handler.callbacks):
            for kind in (ProgressCallback, PrinterCallback):
                self.remove_callback(kind)
        self.sums = {"train": defaultdict(float), "eval": defaultdict(float)}

    @contextmanager
    def watched(self, *models):
        """Check the first training run of models: a change of an unsaved buffer is found before the first step."""
        if not (self.watching and self.model.training):
            yield
            return
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(buffers_kept(model))
            yield
        self.watching = False

    def scale_for_processes(self, value, num_items_in_batch):
        """Scale the loss of this process so that the mean over processes is the loss of the whole step."""
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            return value * (self.accelerator.num_processes // self.get_tp_size())
        return value

    def _get_num_items_in_batch(self, batch_samples, device):
        # Trainer counts labels only, and not for every model; here all answer rows are counted, labeled or not
        if not batch_samples:
            return None
        count = sum(answer_rows(batch)[0].sum() for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
        # Trainer's own would be a mean over batches, whatever their numbers of answers
        count = self.counted(answer_rows(inputs)[0]).sum()
        self._accumulate("loss", loss * count, count)
        return loss, None, None

    def counted(self, rows):
        """The (B, T) rows of a batch; in an evaluation without those of repeated examples.

        All processes get the same number of full batches: the last ones are filled with the first examples again.
        """
        state, size = self.accelerator.gradient_state, len(rows)
        single = self.accelerator.num_processes == 1
        if self.model.training or single or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        first = torch.arange(size, device=rows.device) + self.accelerator.process_index * size
        return rows & (first < state.remainder)[:, None]

    def evaluation_loop(self, *args, metric_key_prefix="eval", **others):
        sums = self.sums["eval"]
        sums.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **others)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in self.means(sums).items()})
        return output

    def log_rows(self, metrics):
        """Add {name: (n,) tensor} of some rows to what is logged next."""
        for name, rows in metrics.items():
            self._accumulate(name, rows.sum(), rows.new_tensor(rows.numel()))

    def _accumulate(self, name, total, count):
        """Add the sum of so many rows."""
        sums = self.sums["train" if self.model.training else "eval"]
        sums[name] = sums[name] + torch.stack([total.float(), count.float()])

    def means(self, sums):
        """{name: mean} over all processes; the sums are reset."""
        found = {}
        # a process may have no row of some kind, but all must reduce the same names
        for name in sorted(set(gather_object(list(sums)))):
            total = sums.get(name, torch.zeros(2, device=self.args.device))
            value, count = self.accelerator.reduce(total, "sum").tolist()
            found[name] = value / count if count else float("nan")
        sums.clear()
        return found

    def log(self, logs, *rest):
        if "loss" in logs:
            logs |= self.means(self.sums["train"])
        super().log(logs, *rest)

    def check_room(self):
        """Check before any work that the disk has room for a checkpoint; OSError if not."""
        if self.args.save_strategy == "no" or not self.args.should_save:
            return
        copies = 3 if self.args.optim.startswith("adamw_torch") else 1  # the weights, and two moments of each
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        size = copies * sum(parameter.numel() * parameter.element_size() for parameter in trained)
        free = shutil.disk_usage(nearest(self.args.output_dir)).free
        if free < size:
            raise OSError(
                f"{self.args.output_dir}: a checkpoint takes {size / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
            )

    def _save_checkpoint(self, model, trial=None):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # a checkpoint that is overwritten is incomplete until its state is written
            (folder / run_state.STATE).unlink(missing_ok=True)
        with run_state.writing(f"checkpoint {folder}"):
            super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        with reading("checkpoint", checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def restore_if_finished(self, checkpoint):
        """Load a checkpoint if it is at the end of its training; else return False."""
        if not run_state.is_at_end(checkpoint):
            whole = self.is_fsdp_enabled or self.is_deepspeed_enabled or (Path(checkpoint) / OPTIMIZER_NAME).is_file()
            if not whole:  # Trainer would begin with a new one
                raise ValueError(
                    f"{checkpoint} has no {OPTIMIZER_NAME}, so training cannot be resumed from it: it was saved with "
                    "save_only_model, or it is damaged"
                )
            return False
        self._load_from_checkpoint(checkpoint)
        self.state = type(self.state).load_from_json(str(Path(checkpoint) / run_state.STATE))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()
        return True


class RowMeanTrainer(RowMeanMixin, Trainer):
    """Trainer of a loss that is a mean over answer rows."""
