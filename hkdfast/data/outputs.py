"""Output files of commands: never one of the inputs, written completely or not at all, checked before the work."""

import os
import shutil
import stat
import sys
from contextlib import contextmanager
from pathlib import Path

from .. import shell


@contextmanager
def replacing(path):
    """A text file to write. It replaces `path` only if the block ends without an exception.

    If `path` is a link, its target is replaced. A device or a pipe is written directly.
    """
    path = Path(path).expanduser()
    if special(path):
        with opened(path) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the folder of its target, so that the rename stays within one file system
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
    """Whether a path is something that cannot be replaced: a device, a pipe, or the output of this process."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode) or own_output(found) is not None


def own_output(found):
    """The stream of this process that writes to the file with this `os.stat`, or None. /dev/stdout may be a file."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if os.path.samestat(found, os.fstat(stream.fileno())):
                return stream
        except (OSError, ValueError, AttributeError):  # no stream, or one without a file
            continue
    return None


def opened(path):
    """A device or a pipe to write to. If it is this process's own output, writing continues at its position."""
    stream = own_output(os.stat(path))
    if stream is None:
        return path.open("w", encoding="utf-8")
    stream.flush()
    return open(os.dup(stream.fileno()), "w", encoding="utf-8")


def check(option, path, inputs=()):
    """Check before the work that a file can be written. The check leaves nothing behind.

    Args:
        option: name of the option with this value, for messages.
        path: the file, which may not exist yet; None is accepted.
        inputs: files that the command reads.

    Raises:
        ValueError: a folder, or one of the inputs, also under another name or through a link.
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
        # root may write a file that is read-only for everybody: the mode says what its owner wants
        if not found.st_mode & 0o222 or not os.access(path, os.W_OK):
            raise OSError(f"{where} cannot be written: it is read-only")
    if not special(path):
        shell.check_writable(where, Path(os.path.realpath(path)).parent)


def check_apart(where, found, inputs):
    """Refuse a file, given by its `os.stat`, that is one of the inputs."""
    for name in inputs:
        try:
            same = os.path.samestat(found, os.stat(Path(name).expanduser()))
        except OSError:  # missing or unreadable: the code that reads it reports that
            continue
        if same:
            raise ValueError(f"{where} is also read, as {name}: name another file")
