"""Self-evolving rounds: a Trainer whose adapted model, merged, is the teacher of its next round."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import set_seed

from . import run_state
from .adapter import adapter_state, check_adapter, merge_and_reset, save_adapter
from .loading import fill_adapter, reading
from .trainer import RowMeanTrainer

ROUNDS = "rounds"  # folder beside a saved adapter with the adapter of each round, if there was more than one
HISTORY = "history.json"  # in it: the log of earlier rounds


class RoundsTrainer(RowMeanTrainer):
    """Trainer of a PEFT model that runs `args.rounds` trainings, each with its own optimizer, schedule and checkpoints.

    Between rounds the adapter is merged into the base weights and reset. The saved adapter is the sum of all rounds:
    one PEFT adapter on the original model.
    """

    round = 1  # the one that is trained

    def __init__(self, *args, **others):
        super().__init__(*args, **others)
        self.states, self.history = [], []  # adapters and logs of earlier rounds
        if self.args.rounds > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(f"rounds={self.args.rounds} merges whole weights, which FSDP and DeepSpeed shard: use DDP")

    def train(self, resume_from_checkpoint=None, **others):
        """Train all rounds, or from a checkpoint on those that are left.

        Args:
            resume_from_checkpoint: folder of a checkpoint; True for the last one under output_dir that is whole.
            others: as in Trainer.train.

        Returns:
            TrainOutput of the last round; None if the checkpoint is at its end.

        Raises:
            ValueError: no complete checkpoint to resume from, a checkpoint of another run (the first difference is
                named), or a new training in a folder with checkpoints.
        """
        if self.states:
            raise ValueError("all rounds have been trained: make a new trainer for more")
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # they shard the weights
            check_adapter(self.model, self.args.rounds)  # the caller may have changed requires_grad
        output_dir, result = self.args.output_dir, None
        checkpoint = run_state.checkpoint_of(output_dir, resume_from_checkpoint)
        self.check_room()
        run_state.start_or_resume(output_dir, self.args.fingerprint(), checkpoint, self.args.should_save)
        set_seed(self.args.seed)
        if self.args.rounds == 1:
            return self.train_round(checkpoint, others)
        resumed = round_of(checkpoint)
        try:
            for number, folder in enumerate(folders(output_dir, self.args.rounds), 1):
                self.round = number
                if number < resumed:
                    self.load_round(checkpoint)
                else:
                    self.args.output_dir = folder
                    self.optimizer = self.lr_scheduler = None
                    result = self.train_round(checkpoint if number == resumed else None, others)
                if number < self.args.rounds:
                    self.next_round()
        finally:
            self.args.output_dir = output_dir
        self.state.log_history = self.history + self.state.log_history
        return result

    def train_round(self, checkpoint, others):
        if checkpoint is not None:
            self.history = read_history(checkpoint)
            if self.restore_if_finished(checkpoint):
                return None
        return super().train(resume_from_checkpoint=checkpoint, **others)

    def next_round(self):
        """The student becomes the next teacher, with a new adapter."""
        self.states.append(adapter_state(self.model))
        self.history = self.history + self.state.log_history
        set_seed(self.args.seed + self.round)  # the adapter starts with the same weights in every process and every run
        merge_and_reset(self.model)

    def load_round(self, checkpoint):
        folder = Path(checkpoint) / ROUNDS
        with reading("checkpoint", folder):
            state = load_file(folder / f"{self.round}.safetensors")
        fill_adapter(self.model, folder, state)

    # Trainer has no public hook for the content of a checkpoint, hence these overrides.

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if round_of(resume_from_checkpoint) > 1:
            self.load_round(resume_from_checkpoint)
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they shard the weights
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:  # Trainer only warns of unexpected weights
            fill_adapter(self.model, resume_from_checkpoint)

    def _save_checkpoint(self, model, trial=None):
        super()._save_checkpoint(model, trial)
        if self.args.rounds > 1 and self.args.should_save:  # Trainer rotates within a round only
            run_state.rotate(Path(self.args.output_dir).parent, self.args.save_total_limit)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if not self.states or not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        states = [*self.states, adapter_state(self.model)]
        save_adapter(self.model, states, folder)
        (folder / ROUNDS).mkdir(exist_ok=True)
        for number, state in enumerate(states, 1):
            save_file(state, folder / ROUNDS / f"{number}.safetensors")
        (folder / ROUNDS / HISTORY).write_text(json.dumps(self.history))


def folders(output_dir, rounds):
    """The output_dir of each round."""
    return [str(output_dir)] if rounds == 1 else [str(Path(output_dir) / f"round-{n}") for n in range(1, rounds + 1)]


def round_of(checkpoint):
    """The round of a checkpoint; 1 for None."""
    return max(1, len(list((Path(checkpoint) / ROUNDS).glob("*.safetensors")))) if checkpoint else 1


def read_history(checkpoint):
    return run_state.read(Path(checkpoint) / ROUNDS / HISTORY) or []
