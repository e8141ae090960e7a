"""A user's own modules, which a command imports before it loads a model: they register classes with transformers."""

import importlib
import os
import sys


def add_option(parser):
    """--import of a command that loads a model; `load` does it."""
    parser.add_argument(
        "--import",
        dest="modules",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="import this first, from the current folder or what is installed: it registers a model class of your own",
    )


def load(names):
    """Import these modules.

    Raises:
        ValueError: one that cannot be imported, whatever it stumbles over.
    """
    here = os.getcwd()
    if names and here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; the script `hkdfast` does not
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # the module is the user's, and so is its fault
            raise ValueError(f"--import {name}: {type(error).__name__}: {error}") from error
