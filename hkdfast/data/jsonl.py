"""JSON lines: one object per line, every complaint with its file and line, files that appear whole or not at all."""

import json
import os
from contextlib import contextmanager
from pathlib import Path


def read(path):
    """The objects of a JSON-lines file, as [(line number from 1, dict), ...]; lines of white space only are skipped.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened; the message names it.
        ValueError: "file:line: ..." for a line that is not UTF-8, not JSON, or not an object; a file without a line.
    """
    path = Path(path).expanduser()
    found = []
    for number, line in lines(path):
        if not line.strip():
            continue
        record = parse(path, line, number)
        kind = type(record).__name__
        if kind != "dict":
            raise ValueError(f"{path}:{number}: expected one JSON object per line, found a {kind}")
        found.append((number, record))
    if not found:
        raise ValueError(f"{path}: the file has no lines")
    return found


def lines(path):
    """(line number from 1, bytes) of each line of a file; only line feeds end one, for a text may hold other ends."""
    # a byte order mark is legal and invisible; what reads the first line would call it broken because of it
    return enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)


def decoded(path, data, number=None):
    """The text of bytes, those of line `number` of a file or of all of it; ValueError names file and line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = path if number is None else f"{path}:{number}"
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None


def parse(path, data, number=None):
    """The value of JSON bytes, as `decoded` takes them; ValueError names file and line."""
    try:
        return json.loads(decoded(path, data, number))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number or error.lineno}: not JSON ({error.msg} at column {error.colno})") from None


def field(path, number, record, name, kinds=(str,)):
    """record[name], after a look that it is there and of one of these types."""
    if name not in record:
        raise ValueError(f"{path}:{number}: no field {name!r}; found {', '.join(map(repr, record)) or 'none'}")
    value = record[name]
    if type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{path}:{number}: {name} is {value!r}, expected {wanted}")
    return value


@contextmanager
def replacing(path):
    """A text file to write that takes the place of `path` only once the block has ended without an exception."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside its target, so that the rename stays within one file system
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
