"""JSON and JSON lines: one object per line, every complaint with its file and line."""

import json
from pathlib import Path

WIDE = (b"\xff\xfe", b"\xfe\xff")  # what UTF-16, and one form of UTF-32, begin with


def read(path):
    """The objects of a JSON-lines file, as [(line number from 1, dict), ...]; lines of white space only are skipped.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened; the message names it.
        ValueError: "file:line: ..." for a line that is not UTF-8, not JSON, or not an object; a file without a line, or
            of one JSON value over several lines.
    """
    return objects(path, content(path))


def objects(path, data):
    """The objects of JSON lines, given their bytes as `content` gives them, as `read` does."""
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
    """Say of a file that is one JSON list, or one object over several lines, what it is."""
    try:
        value = json.loads(data)
    except ValueError:
        return
    if isinstance(value, dict) and b"\n" not in data.strip():
        return
    raise ValueError(f"{path}: the whole file is one JSON {type(value).__name__}, expected one JSON object per line")


def content(path):
    """The bytes of a file without a byte order mark, which is legal in UTF-8 and invisible.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is UTF-16 or UTF-32; names it.
    """
    data = Path(path).expanduser().read_bytes()
    if data.startswith(WIDE) or b"\0" in data[:4]:
        raise ValueError(f"{path}: the file is UTF-16 or UTF-32, expected UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")


def lines(data):
    """(line number from 1, bytes) of each line; only line feeds end one, for a text may hold other ends."""
    return enumerate(data.split(b"\n"), 1)


def decoded(path, data, number=None):
    """The text of bytes, those of line `number` of a file or of all of it; ValueError names file and line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = path if number is None else f"{path}:{number}"
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None


def parse(path, data, number=None):
    """The value of JSON bytes, as `decoded` takes them.

    Raises:
        ValueError: not JSON, or an object with a field twice; names file and line.
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
    """A field that an object of JSON has twice."""


def once(pairs):
    """The dict of the fields of an object, of which json would keep the last of two with one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def field(path, number, record, name, kinds=(str,)):
    """record[name], after a look that it is there, of one of these types, and text that can be written as UTF-8."""
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
            raise ValueError(f"{path}:{number}: {name} holds half a character, {value[error.start]!r}") from None
    return value


def shown(value, most=80):
    """A value for a message: whole if it is short, else what it is and how it begins."""
    text = repr(value)
    if len(text) <= most:
        return text
    of = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"a {type(value).__name__}{of}, {text[: most // 2]}..."
