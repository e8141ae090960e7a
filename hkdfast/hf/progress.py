"""What a person sees of a long job: one bar, one time to go for all of it, and short lines of what is measured."""

import os
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from numbers import Real

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

WIDTH = 100  # columns of a line
# entries of a log that a line shows first, by their ending
FIRST = ("loss", "agreement", "yes_rate", "cross_entropy", "divergence")
KNOWN = ("round", "stage", "epoch", "learning_rate", "grad_norm", "total_flos")  # entries that no line shows
BAR = "{desc} |{bar:20}| {percentage:3.0f}%, {elapsed} gone, {remaining} left"
# Warnings of libraries about one another, which nobody who runs a training can do anything about.
HIDDEN = ((FutureWarning, "`is_gradient_checkpointing` is deprecated"),)  # of transformers, about PEFT
LOGGED = (("transformers.trainer_utils", "mtime may not be reliable"),)  # of checkpoints within one second


class Progress(TrainerCallback):
    """TrainerCallback of a job of several parts, in the place of Trainer's own bar and printed dicts.

    On a terminal one bar stays below the lines; elsewhere there is no bar, and the lines say how much time is left.
    Where it is a trainer's callback, the trainer's own bar goes. What libraries draw and warn of besides is not shown
    while the job runs, see HIDDEN. Use it as a context manager.

    Args:
        parts: {key: (title, amount of work)} in their order; the key of a training is its output_dir. A training of
            no part in it is one by itself.
    """

    def __init__(self, parts=None):
        self.parts, self.part, self.bar = dict(parts or {}), None, None

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.enter_context(warnings.catch_warnings())
        for category, message in HIDDEN:
            warnings.filterwarnings("ignore", message, category)
        for name, message in LOGGED:
            self.stack.enter_context(without(logging.get_logger(name), message))
        if logging.is_progress_bar_enabled():
            self.stack.callback(logging.enable_progress_bar)
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        return self

    def __exit__(self, *error):
        self.close()
        self.stack.close()

    def close(self):
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def begin(self, key, share=0.0):
        """Go to a part, of which this share is done. Those before it are done."""
        title, self.work = self.parts.setdefault(key, ("training", 1))
        keys = list(self.parts)
        self.before = sum(self.parts[each][1] for each in keys[: keys.index(key)])
        self.part, self.key, self.asked = title, key, 0
        if self.bar is None:
            logging.disable_progress_bar()  # it would be drawn over ours
            self.total = sum(work for _, work in self.parts.values())
            self.done = self.start = self.before + share * self.work
            self.clock = time.monotonic()
            self.bar = tqdm(total=self.total, initial=self.start, bar_format=BAR, smoothing=0, disable=None, **shape())
        self.at(share)

    def at(self, share, where=""):
        """Set the part's share that is done; `where` is shown behind its title."""
        done = self.before + share * self.work
        self.bar.set_description_str(self.part + where, refresh=False)
        self.bar.update(done - self.done)
        self.done = done

    def say(self, text):
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def left(self):
        """The remaining time as a text to append; empty where the bar shows it."""
        if not self.bar.disable or self.done <= self.start:
            return ""
        seconds = (time.monotonic() - self.clock) * (self.total - self.done) / (self.done - self.start)
        return f", {tqdm.format_interval(seconds)} left"

    # of a training

    def on_train_begin(self, args, state, control, **others):
        if not state.is_world_process_zero:
            return
        self.begun, self.steps = time.monotonic(), state.global_step
        self.begin(args.output_dir, state.global_step / state.max_steps)
        if self.bar.disable:
            self.say(f"{self.part}: {counted(state.max_steps)}")

    def on_step_end(self, args, state, control, **others):
        if state.is_world_process_zero:
            self.at(state.global_step / state.max_steps, f", step {state.global_step} of {state.max_steps}")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **others):
        if state.is_world_process_zero and self.part and self.key != args.output_dir:  # an evaluation that is a part
            self.asked += 1
            self.at(min(1.0, self.asked / len(eval_dataloader)))

    def on_log(self, args, state, control, logs=None, **others):
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            where = f"{self.part}, step {state.global_step} of {state.max_steps}{self.left()}" if self.part else ""
            self.say(line(where, logs))

    def on_train_end(self, args, state, control, **others):
        if state.is_world_process_zero:
            took = tqdm.format_interval(time.monotonic() - self.begun)
            self.say(f"{self.part} is done: {counted(state.global_step - self.steps)} in {took}")


def counted(steps):
    return f"{steps} step{'' if steps == 1 else 's'}"


def shape():
    """How large tqdm takes the terminal to be: as it is at that time, unless it does not say, and nothing is drawn."""
    known = sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno()))
    return {"dynamic_ncols": True} if known else {"ncols": WIDTH, "nrows": 24}


@contextmanager
def without(logger, message):
    """A context in which a logger drops messages that begin with this text."""

    def other(record):
        return not record.getMessage().startswith(message)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def line(where, logs):
    """The entries of a log that a line has room for, those that matter most first."""

    def rank(name):
        place = next((i for i, end in enumerate(FIRST) if name.endswith(end)), len(FIRST))
        return name != "loss", place, "teacher" in name

    shown = where
    names = [name for name in logs if isinstance(logs[name], Real) and not name.endswith(KNOWN)]
    for name in sorted(names, key=rank):
        more = f"{': ' if shown == where and where else ', ' if shown else ''}{name.replace('_', ' ')} {logs[name]:.3g}"
        if len(shown + more) <= WIDTH:
            shown += more
    return shown
