"""What a user has to know about a run that does not stop it."""

import sys

noted: set[str] = set()


def note_once(text: str) -> None:
    """Print a note on stderr, once per process."""
    if text not in noted:
        noted.add(text)
        print(f"hkdfast: note: {text}", file=sys.stderr)
