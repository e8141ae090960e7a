"""Helpers of the commands: paths, command lines to copy, signals, checks that a folder is writable."""

import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def path(text: str) -> str:
    """The argparse type of paths: expands ~. A Hub name is not changed."""
    return os.path.expanduser(text)


def absolute(name: str | None) -> str | None:
    """The absolute path of a file or folder that exists; any other name unchanged."""
    return os.path.abspath(name) if name and os.path.exists(name) else name


def program() -> list[str]:
    """The command line that starts this program again, as a list of words."""
    script = Path(sys.argv[0])
    if script.name != "hkdfast":
        return [sys.executable, "-m", "hkdfast"]
    found = shutil.which("hkdfast")
    return ["hkdfast" if found and os.path.samefile(found, script) else str(script.absolute())]


def paste(*words: object) -> str:
    """A command line of this program with these arguments, to copy and paste."""
    return shlex.join([*program(), *map(str, words)])


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, like Ctrl-C, unless it has a handler."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def nearest(path: str | Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    start = Path(path).absolute()
    return next(each for each in (start, *start.parents) if os.path.lexists(each))


def check_writable(option: str, folder: str | Path) -> None:
    """Check that files can be written into a folder, which may not exist yet. The check leaves nothing behind.

    Raises:
        OSError: naming the option.
    """
    there = nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b" ")
            file.flush()
    except OSError as error:
        raise OSError(f"{option} cannot be written: {there}: {error.strerror}") from error
