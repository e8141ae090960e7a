"""Read JSON and JSON lines (one object per line). Every error names the file and the line."""

import json
from pathlib import Path

WIDE = (b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-16 and of little-endian UTF-32


def read(path):
    """The objects of a JSON-lines file, as [(line number from 1, dict), ...]. Blank lines are skipped.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened; the message names it.
        ValueError: "file:line: ..." for a line that is not UTF-8, not JSON, or not an object; for an empty file, or
            one JSON value over several lines.
    """
    return objects(path, content(path))


def objects(path, data):
    """The same as `read`, from the bytes that `content` returned."""
    found = []
    for number, line in lines(data):
        if not line.strip():
            continue
        try:
            record = parse(path, line, number)
        except ValueError:
            check_lines(path, data)
            raise
        if not isinstance(record, dict):
            check_lines(path, data)
            kind = type(record).__name__
            raise ValueError(f"{path}:{number}: expected one JSON object per line, found a {kind}")
        found.append((number, record))
    if not found:
        raise ValueError(f"{path}: the file has no lines")
    return found


def check_lines(path, data):
    """Raise a better error for a file that is one JSON list, or one object over several lines."""
    try:
        value = json.loads(data)
    except ValueError:
        return
    if isinstance(value, dict) and b"\n" not in data.strip():
        return
    raise ValueError(f"{path}: the whole file is one JSON {type(value).__name__}, expected one JSON object per line")


def content(path):
    """The bytes of a file without the byte order mark that UTF-8 allows.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is UTF-16 or UTF-32; the message names it.
    """
    data = Path(path).expanduser().read_bytes()
    if data.startswith(WIDE) or b"\0" in data[:4]:
        raise ValueError(f"{path}: the file is UTF-16 or UTF-32, expected UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")


def lines(data):
    """(line number from 1, bytes) of each line. Only a line feed ends a line: a text may contain other separators."""
    return enumerate(data.split(b"\n"), 1)


def decoded(path, data, number=None):
    """Decode the bytes of a file, or of its line `number`. A ValueError names file and line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = path if number is None else f"{path}:{number}"
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None


def parse(path, data, number=None):
    """Parse JSON bytes of a file, or of its line `number`.

    Raises:
        ValueError: not JSON, or an object with a repeated field; names file and line.
    """
    try:
        return json.loads(decoded(path, data, number), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        where = f"{path}:{number or error.lineno}"
        if error.msg == "Extra data":
            raise ValueError(f"{where}: more than one JSON value, the second at column {error.colno}") from None
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except TwiceError as error:
        where = path if number is None else f"{path}:{number}"
        raise ValueError(f"{where}: an object has the field {error.args[0]!r} twice") from None


class TwiceError(Exception):
    """A JSON object has a field twice."""


def once(pairs):
    """The dict of an object's fields. json itself would keep the last of two fields with one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def field(path, number, record, name, kinds=(str,)):
    """record[name], checked: it must exist, have one of these types, and be valid Unicode if it is a text."""
    if name not in record:
        raise ValueError(f"{path}:{number}: no field {name!r}; found {', '.join(map(repr, record)) or 'none'}")
    value = record[name]
    if type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{path}:{number}: {name} is {shown(value)}, expected {wanted}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{path}:{number}: {name} contains half a character, {value[error.start]!r}") from None
    return value


def shown(value, most=80):
    """A value as an error message shows it: a long one by its type, length and beginning."""
    text = repr(value)
    if len(text) <= most:
        return text
    of = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"a {type(value).__name__}{of}, {text[: most // 2]}..."
