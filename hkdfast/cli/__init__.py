"""The command hkdfast. Each subcommand is a module with `add_arguments(parser)` and `run(args)`."""

import argparse
import importlib
import io
import os
import sys

import torch

from .. import __version__, shell
from . import bench, demo, doctor, evaluate, extras, user_modules
from .help import HelpFormatter, add_example, shorten_usage

COMMANDS = {
    "distill": "distill a teacher, or several, into a language model or vision-language model",
    "seed": "reduce the hallucinations of a vision-language model by self-distillation (SEED)",
    "hkd": "distill a chain of vision-language models into the smallest one (HKD4VLM)",
    "evaluate": "score a model, or existing answers, on POPE, MME or multiple choice",
    "doctor": "show what is installed, which backends run, and why the others do not",
    "demo": "compare distill_loss with plain PyTorch on this machine: time, error, memory",
    "bench": "run the speed benchmarks of a clone of the repository",
}
PATHS = ("PATH", "DIR", "FILE")  # metavars
TRAINING = {"distill": ".distill", "seed": ".seed", "hkd": ".hkd"}  # modules that need transformers


def main(argv=None):
    """Run one command.

    Returns:
        the exit code: 0 for success; 2 for bad input, reported in one line on stderr; 130 for Ctrl-C and SIGTERM, with
        a message that says what was kept and how to continue.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug, args = "--debug" in argv, None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot show must not lose a table
            stream.reconfigure(errors="backslashreplace")
    try:
        with shell.terminable():
            args = make_parser(argv).parse_args(argv)
            user_modules.load(getattr(args, "modules", ()))
            return args.run(args) or 0
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        text = message(error)
        if debug or text is None:
            raise
        print(f"hkdfast: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # only one of several processes reports it
            print(stopped(argv, args), file=sys.stderr)
        return 130


def stopped(argv, args):
    """The message of a stopped command: what it has kept, and the command that continues it."""
    kept = args.kept(args) if hasattr(args, "kept") else None
    if kept is None:
        return f"\nhkdfast: stopped, nothing was kept. To begin again:\n{shell.paste(*argv)}"
    words = argv if args.resume else [*argv, "--resume"]
    return f"\nhkdfast: stopped, {kept}. To continue:\n{shell.paste(*words)}"


def message(error):
    """The message for an error that the user can correct; None for an error in this library."""
    # torch has no exception type for a lack of memory on the CPU
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
        what = str(error).splitlines()[0] if str(error) else "on the CPU"
        return f"out of memory: {what}; smaller batches take less, and so does a --dtype of 16 bits"
    if isinstance(error, ImportError):
        return f"{error}{extras.hint(error)}"
    return None if isinstance(error, RuntimeError) else str(error)


def make_parser(argv):
    """The parser of all commands. A training command gets its options only if it is in argv: it needs transformers."""
    parser = argparse.ArgumentParser("hkdfast", description="Distillation of language and vision-language models.")
    parser.add_argument("--version", action="version", version=f"hkdfast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    made = {
        name: commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=HelpFormatter
        )
        for name, text in COMMANDS.items()
    }
    evaluate.add_arguments(made["evaluate"])
    for name in made:
        if name != "evaluate":
            add_example(made[name], name)
    for name, module in (("doctor", doctor), ("demo", demo), ("bench", bench)):
        module.add_arguments(made[name])
        made[name].set_defaults(run=module.run)
    command = next((word for word in argv if not word.startswith("-")), None)
    if command in TRAINING:
        module = importlib.import_module(TRAINING[command], __package__)
        module.add_arguments(made[command])
        made[command].set_defaults(run=module.run, kept=module.kept)
        shorten_usage(made[command])
    expand(parser)
    return parser


def expand(parser):
    """Expand ~ in every option whose metavar is one of PATHS."""
    for action in parser._actions:
        if action.metavar in PATHS:
            action.type = shell.path
        for each in (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else ():
            expand(each)
