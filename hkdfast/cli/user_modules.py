"""The option --import: modules of the user, imported before a model is loaded, to register its class."""

import importlib
import os
import sys


def add_option(parser):
    """Add --import to a command that loads a model; `load` imports the modules."""
    parser.add_argument(
        "--import",
        dest="modules",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules to import first, from the current folder or installed, e.g. to register your own model class",
    )


def load(names):
    """Import these modules.

    Raises:
        ValueError: a module that cannot be imported, for any reason.
    """
    here = os.getcwd()
    if names and here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; the script `hkdfast` does not
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # any error of the user's module
            raise ValueError(f"--import {name}: {type(error).__name__}: {error}") from error
