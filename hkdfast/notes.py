"""What a user has to know about a run that does not stop it."""

import sys

told: set[str] = set()


def tell(text: str) -> None:
    """Print a note on stderr, once per process."""
    if text not in told:
        told.add(text)
        print(f"hkdfast: note: {text}", file=sys.stderr)
