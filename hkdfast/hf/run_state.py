"""The state of a training in its folder: its manifest, its checkpoints, and whether it is finished."""

import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..data import jsonl

RUN = "run.json"  # the manifest: all that determines the result, written before the first step
DONE = "done.json"  # the log of a finished training, written last
STATE = "trainer_state.json"  # of a checkpoint: Trainer's own, written last


def write_manifest(folder, manifest):
    """Write the manifest of a training into its folder, which is created if necessary.

    Args:
        manifest: {name: value} of all that determines the result; values of JSON, nested dicts, or sets, which become
            sorted lists.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    write(Path(folder) / RUN, manifest)


def check_manifest(folder, manifest):
    """Check that the training in a folder has this manifest.

    Raises:
        ValueError: naming the first difference with both values, or a folder without a manifest.
    """
    stored = read(Path(folder) / RUN)
    if stored is None:
        raise ValueError(f"{folder} cannot be resumed: it has no {RUN}, which describes the run")
    for name, old, new in differences(stored, json.loads(as_json(manifest))):
        raise ValueError(f"{folder} is another run: {name} was {old!r} and is {new!r} now; choose another folder")


def start_or_resume(folder, manifest, checkpoint=None, save=True):
    """Start a training in a folder, or check that the checkpoint to resume belongs to it.

    Args:
        folder: of this training.
        manifest: as in `write_manifest`.
        checkpoint: to resume from, in this folder or another; None for a new training.
        save: whether this process writes.

    Raises:
        ValueError: a checkpoint of another training; or a folder that already has checkpoints or a finished training.
    """
    if checkpoint is not None:
        check_manifest(run_folder(checkpoint), manifest)
    if has_training(folder):
        if checkpoint is None:
            raise ValueError(
                f"{folder} already holds a training run: pass resume_from_checkpoint=True or choose another output_dir"
            )
        check_manifest(folder, manifest)
    if save:
        sweep(folder)
        write_manifest(folder, manifest)


def run_folder(checkpoint):
    """The folder of the training to which a checkpoint belongs; the training may have rounds."""
    folder = Path(checkpoint).absolute().parent
    return folder.parent if re.fullmatch(r"round-\d+", folder.name) else folder


def has_training(folder):
    """Whether a folder has a complete checkpoint or a finished training."""
    return read_done(folder) is not None or last_checkpoint(folder) is not None


def differences(old, new, name=""):
    """(name, old, new) of all values that differ between two dicts of dicts."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new | old:
            yield from differences(old.get(key), new.get(key), f"{name}, {key}" if name else key)
    elif old != new:
        yield name, old, new


def mark_done(folder, results):
    """Mark the training in a folder as finished."""
    write(Path(folder) / DONE, results)


def read_done(folder):
    """What `mark_done` wrote, or None."""
    return read(Path(folder) / DONE)


def checkpoints(folder):
    """The checkpoints of a training, or of its rounds, in the order in which they were written."""
    folder, found = Path(folder), {}
    for one in (*folder.glob("checkpoint-*"), *folder.glob("round-*/checkpoint-*")):
        number = re.fullmatch(r"(?:round-(\d+)/)?checkpoint-(\d+)", one.relative_to(folder).as_posix())
        if number:
            found[int(number[1] or 0), int(number[2])] = one
    return [found[place] for place in sorted(found)]


def rotate(folder, limit):
    """Delete all but the last `limit` checkpoints of a training, or of its rounds. A limit of None or 0 deletes none.
    The last complete checkpoint is always kept, because a resumed training needs it."""
    if limit is None or limit <= 0:
        return
    kept = {last_checkpoint(folder), *map(str, checkpoints(folder)[-limit:])}
    for one in checkpoints(folder):
        if str(one) not in kept:
            shutil.rmtree(one, ignore_errors=True)


def sweep(folder):
    """Delete incomplete checkpoints that a stopped run left: `rotate` would count them."""
    for one in checkpoints(folder):
        if not is_whole(one):
            shutil.rmtree(one, ignore_errors=True)


def kept(folder):
    """What a stopped command has kept in its folder, as text; None if nothing."""
    folder, found = Path(folder), []
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    for home in dict.fromkeys((folder, *sorted(folder.glob("pyramid/stage-*")), folder / "ternary")):
        checkpoint = last_checkpoint(home)
        if read_done(home) is not None:
            found.append(f"{home.relative_to(folder)}, finished")
        elif checkpoint is not None:
            found.append(Path(checkpoint).relative_to(folder).as_posix())
    return f"kept in {folder}: {', '.join(found)}" if found else f"no checkpoint in {folder} yet"


def last_checkpoint(folder):
    """The last complete checkpoint in a folder, or None. Trainer writes the state of a checkpoint last."""
    return next((str(one) for one in reversed(checkpoints(folder)) if is_whole(one)), None)


def checkpoint_of(folder, asked):
    """The checkpoint to resume from: the given one, or with True the last one in the folder; None for a new training.

    Raises:
        ValueError: a checkpoint that is incomplete or missing; with True, a folder without a complete checkpoint.
    """
    if not asked:
        return None
    checkpoint, where = (last_checkpoint(folder), f"in {folder}") if asked is True else (asked, asked)
    if checkpoint is None or not is_whole(Path(checkpoint)):
        raise ValueError(f"no complete checkpoint {where}")
    return checkpoint


def is_whole(checkpoint):
    try:
        return read(checkpoint / STATE) is not None
    except ValueError:
        return False


def is_at_end(checkpoint):
    """Whether a checkpoint is at the end of its training: Trainer would train one more step from there."""
    state = read(Path(checkpoint) / STATE)
    return state["global_step"] >= state["max_steps"]


def as_json(content):
    return json.dumps(content, default=lambda x: sorted(x) if isinstance(x, (set, frozenset)) else str(x))


@contextmanager
def writing(what):
    """Turn the errors that libraries raise for a full or failing disk into one OSError that names the file."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"{what} cannot be written: {reason}; earlier files are complete") from error


def digest(file):
    """The digest of a file's content, for a manifest."""
    return "sha256 " + hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()


def save_whole(trainer, folder, what):
    """Save the model and the processor of a trainer into a folder. An existing file is replaced only by a complete one.

    Args:
        what: name of the result in error messages.
    """
    draft = Path(folder) / "saving"
    with writing(f"{what} in {folder}"):
        trainer.save_model(str(draft))
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            move(draft, folder)


def move(draft, folder):
    """Move the files of a draft into a folder. Each replaces an existing file atomically."""
    draft = Path(draft)
    for file in sorted(each for each in draft.rglob("*") if each.is_file()):
        place = Path(folder) / file.relative_to(draft)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(draft)


def write(file, content):
    """Write JSON completely or not at all."""
    part = file.with_name(f"{file.name}.partial")
    part.write_text(as_json(content))
    os.replace(part, file)


def read(file):
    """The JSON value of a file, None if there is no file. ValueError, naming the file, if it is damaged."""
    return jsonl.parse(file, file.read_bytes()) if file.is_file() else None
