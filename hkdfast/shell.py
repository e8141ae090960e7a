"""What a command shares with the shell it was started from: paths, words to paste, signals."""

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
    """The type of every option that is a path: ~ is the home folder. A name of the Hub is left as it is."""
    return os.path.expanduser(text)


def absolute(name: str | None) -> str | None:
    """A file or folder that exists, by the path that means the same from every folder; anything else as it is."""
    return os.path.abspath(name) if name and os.path.exists(name) else name


def program() -> list[str]:
    """The words that start this program again."""
    script = Path(sys.argv[0])
    if script.name != "hkdfast":
        return [sys.executable, "-m", "hkdfast"]
    found = shutil.which("hkdfast")
    return ["hkdfast" if found and os.path.samefile(found, script) else str(script.absolute())]


def paste(*words: object) -> str:
    """A command of this program with these words, as a line to paste."""
    return shlex.join([*program(), *map(str, words)])


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, unless somebody handles it."""
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
    """See that files can be written into a folder, which may not exist yet. Nothing is left there.

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
