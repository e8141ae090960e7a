"""The folder of a training: what was begun in it, and how far it came."""

import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..data import jsonl

RUN = "run.json"  # what decides the result, written before the first step
DONE = "done.json"  # what a finished training logged, written last
STATE = "trainer_state.json"  # of a checkpoint: Trainer's own, written last


def write_manifest(folder, manifest):
    """Write into a folder, which is made if need be, what decides the result of the training that begins there.

    Args:
        manifest: {name: what JSON can hold, or a dict of the same kind}; sets become sorted lists.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    write(Path(folder) / RUN, manifest)


def check_manifest(folder, manifest):
    """See that the training that was begun in a folder is this one.

    Raises:
        ValueError: naming the first difference with both values, or that the folder does not say what was begun there.
    """
    stored = read(Path(folder) / RUN)
    if stored is None:
        raise ValueError(f"{folder} cannot be resumed: it has no {RUN} to say what was begun there")
    for name, old, new in differences(stored, json.loads(as_json(manifest))):
        raise ValueError(f"{folder} is another run, {name} was {old!r} and is {new!r} now: begin in another folder")


def start_or_resume(folder, manifest, checkpoint=None, save=True):
    """Start a training in a folder, or check that the checkpoint to resume belongs to it.

    Args:
        folder: of this training.
        manifest: as in `write_manifest`.
        checkpoint: to resume from, in this folder or another; None for a fresh training.
        save: whether this process writes.

    Raises:
        ValueError: a checkpoint of another training; or one where another has left in the folder what would be taken
            for its own, checkpoints or a finished training.
    """
    if checkpoint is not None:
        check_manifest(run_folder(checkpoint), manifest)
    if has_training(folder):
        if checkpoint is None:
            raise ValueError(f"{folder} has been trained in: resume it, or name another output_dir")
        check_manifest(folder, manifest)
    if save:
        sweep(folder)
        write_manifest(folder, manifest)


def run_folder(checkpoint):
    """The folder of the training that a checkpoint belongs to, which may have rounds."""
    folder = Path(checkpoint).absolute().parent
    return folder.parent if re.fullmatch(r"round-\d+", folder.name) else folder


def has_training(folder):
    """Whether a folder holds something to resume from."""
    return read_done(folder) is not None or last_checkpoint(folder) is not None


def differences(old, new, name=""):
    """(name, old, new) of all values that differ between two dicts of dicts."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new | old:
            yield from differences(old.get(key), new.get(key), f"{name}, {key}" if name else key)
    elif old != new:
        yield name, old, new


def mark_done(folder, results):
    """Write that the training in a folder is finished."""
    write(Path(folder) / DONE, results)


def read_done(folder):
    """What `mark_done` wrote, or None."""
    return read(Path(folder) / DONE)


def checkpoints(folder):
    """Those of a training, or of its rounds, in the order in which they were made."""
    folder, found = Path(folder), {}
    for one in (*folder.glob("checkpoint-*"), *folder.glob("round-*/checkpoint-*")):
        number = re.fullmatch(r"(?:round-(\d+)/)?checkpoint-(\d+)", one.relative_to(folder).as_posix())
        if number:
            found[int(number[1] or 0), int(number[2])] = one
    return [found[place] for place in sorted(found)]


def rotate(folder, limit):
    """Remove all checkpoints of a training, or of its rounds, but so many of the last; none for a limit that is None
    or not above 0. The last one that is whole stays, and with it all that a resumed training reads."""
    if limit is None or limit <= 0:
        return
    kept = {last_checkpoint(folder), *map(str, checkpoints(folder)[-limit:])}
    for one in checkpoints(folder):
        if str(one) not in kept:
            shutil.rmtree(one, ignore_errors=True)


def sweep(folder):
    """Remove checkpoints that a stop has left half written or half removed: they would be counted among the last."""
    for one in checkpoints(folder):
        if not is_whole(one):
            shutil.rmtree(one, ignore_errors=True)


def kept(folder):
    """What a stopped command has left in its folder, as text; None where there is nothing."""
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
    """The last checkpoint in a folder that is whole: Trainer writes its state last. None if there is none."""
    return next((str(one) for one in reversed(checkpoints(folder)) if is_whole(one)), None)


def checkpoint_of(folder, asked):
    """The checkpoint to resume from: the given one, or with True the last one in the folder; None for neither.

    Raises:
        ValueError: one that is not whole or not there; with True, none in the folder that is whole.
    """
    if not asked:
        return None
    checkpoint, where = (last_checkpoint(folder), f"in {folder}") if asked is True else (asked, asked)
    if checkpoint is None or not is_whole(Path(checkpoint)):
        raise ValueError(f"no whole checkpoint {where}")
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
    """What a full or failing disk raises in whichever library, as one OSError that says what could not be written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"{what} cannot be written: {reason}; what was saved before it is whole") from error


def digest(file):
    """What a manifest holds of a file: its content's digest, wherever it lies."""
    return "sha256 " + hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()


def save_whole(trainer, folder, what):
    """Save the model and the processor of a trainer into a folder, each file as a whole: what is there stays as it is
    until another is written.

    Args:
        what: what an error calls it.
    """
    draft = Path(folder) / "saving"
    with writing(f"{what} in {folder}"):
        trainer.save_model(str(draft))
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            move(draft, folder)


def move(draft, folder):
    """Let the files of a draft take the places of those in a folder, each as a whole."""
    draft = Path(draft)
    for file in sorted(each for each in draft.rglob("*") if each.is_file()):
        place = Path(folder) / file.relative_to(draft)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(draft)


def write(file, content):
    """As a whole or not at all."""
    part = file.with_name(f"{file.name}.partial")
    part.write_text(as_json(content))
    os.replace(part, file)


def read(file):
    """What JSON a file holds; None where there is none. ValueError for a damaged one, naming it."""
    return jsonl.parse(file, file.read_bytes()) if file.is_file() else None
