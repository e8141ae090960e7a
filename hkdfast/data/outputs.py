"""Files that a command writes: none of its inputs, whole or not at all, and known to be possible before the work."""

import os
import shutil
import stat
import sys
from contextlib import contextmanager
from pathlib import Path

from .. import shell


@contextmanager
def replacing(path):
    """A text file to write that takes the place of `path` only once the block has ended without an exception.

    Where `path` is a link, the file that it leads to is replaced; a device or a pipe is written as it is.
    """
    path = Path(path).expanduser()
    if special(path):
        with opened(path) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside its target, so that the rename stays within one file system
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            yield file
        if path.exists():
            shutil.copymode(path, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def special(path):
    """Whether something stands under a path that cannot be replaced: a device, a pipe, or this process's own output."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode) or own_output(found) is not None


def own_output(found):
    """The stream of this process that goes into the file, by its `os.stat`, or None. /dev/stdout may be a file."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if os.path.samestat(found, os.fstat(stream.fileno())):
                return stream
        except (OSError, ValueError, AttributeError):  # no stream, or one without a file
            continue
    return None


def opened(path):
    """A device or a pipe to write to. One that is this process's own output goes on where that is."""
    stream = own_output(os.stat(path))
    if stream is None:
        return path.open("w", encoding="utf-8")
    stream.flush()
    return open(os.dup(stream.fileno()), "w", encoding="utf-8")


def check(option, path, inputs=()):
    """See that a file can be written, before the work that makes what it is to hold. Nothing is left there.

    Args:
        option: name of the option whose value the path is, for messages.
        path: the file, which may not exist yet; None is fine.
        inputs: files that the command reads.

    Raises:
        ValueError: a folder, or one of the inputs, by whatever link or spelling.
        OSError: it cannot be written; names option and path.
    """
    if path is None:
        return
    where, text = f"{option} {path}", os.fspath(path)
    path = Path(path).expanduser()
    if os.path.isdir(path) or text.endswith(os.sep):
        raise ValueError(f"{where} is a folder, expected a file")
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise OSError(f"{where} cannot be written: {error.strerror}") from error
    if found is not None:
        if stat.S_ISREG(found.st_mode):
            check_apart(where, found, inputs)
        # root may write what nobody may: the mode says what its owner meant
        if not found.st_mode & 0o222 or not os.access(path, os.W_OK):
            raise OSError(f"{where} cannot be written: it is read-only")
    if not special(path):
        shell.check_writable(where, Path(os.path.realpath(path)).parent)


def check_apart(where, found, inputs):
    """See that a file, by its `os.stat`, is none of the inputs."""
    for name in inputs:
        try:
            same = os.path.samestat(found, os.stat(Path(name).expanduser()))
        except OSError:  # not there, or not to be read: whoever reads it says so
            continue
        if same:
            raise ValueError(f"{where} is also read, as {name}: name another file")
