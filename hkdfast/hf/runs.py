"""The folder of a training: what was begun in it, and how far it came."""

import json
import os
from pathlib import Path

RUN = "run.json"  # what decides the result, written before the first step
DONE = "done.json"  # what a finished training logged, written last


def begin(folder, about):
    """Write into a folder, which is made if need be, what decides the result of the training that begins there.

    Args:
        about: {name: what JSON can hold, or a dict of the same kind}; sets become sorted lists.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    write(Path(folder) / RUN, about)


def compare(folder, about):
    """See that the training that was begun in a folder is this one.

    Raises:
        ValueError: naming the first difference with both values, or that the folder does not say what was begun there.
    """
    stored = read(Path(folder) / RUN)
    if stored is None:
        raise ValueError(f"{folder} cannot be resumed: it has no {RUN} to say what was begun there")
    for name, old, new in differences(stored, json.loads(as_json(about))):
        raise ValueError(f"{folder} is another run, {name} was {old!r} and is {new!r} now: begin in another folder")


def differences(old, new, name=""):
    """(name, old, new) of all values that differ between two dicts of dicts."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new | old:
            yield from differences(old.get(key), new.get(key), f"{name}, {key}" if name else key)
    elif old != new:
        yield name, old, new


def finish(folder, about):
    """Write that the training in a folder is finished."""
    write(Path(folder) / DONE, about)


def finished(folder):
    """What `finish` wrote, or None."""
    return read(Path(folder) / DONE)


def checkpoints(folder):
    return list(Path(folder).glob("checkpoint-*"))


def last_checkpoint(folder):
    """The last checkpoint in a folder that is whole: Trainer writes its state last. None if there is none."""
    whole = [one for one in checkpoints(folder) if is_whole(one)]
    return str(max(whole, key=lambda one: int(one.name.removeprefix("checkpoint-")))) if whole else None


def is_whole(checkpoint):
    try:
        return read(checkpoint / "trainer_state.json") is not None
    except json.JSONDecodeError:
        return False


def as_json(about):
    return json.dumps(about, default=lambda x: sorted(x) if isinstance(x, (set, frozenset)) else str(x))


def write(file, about):
    """As a whole or not at all."""
    part = file.with_name(f"{file.name}.partial")
    part.write_text(as_json(about))
    os.replace(part, file)


def read(file):
    return json.loads(file.read_text()) if file.is_file() else None
