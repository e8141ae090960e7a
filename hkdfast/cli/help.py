"""The format of `--help`: a short usage line, defaults that are informative, and an example at the end."""

import argparse

EXAMPLES = {
    "distill": "hkdfast distill --model STUDENT --teacher TEACHER --data text.jsonl --output student",
    "seed": "hkdfast seed --model MODEL --images images --questions questions.jsonl --output adapter",
    "hkd": "hkdfast hkd --models large medium small --task hallucination --data questions.json --images images "
    "--output students",
    "evaluate pope": "hkdfast evaluate pope --model MODEL --images images --questions questions.jsonl "
    "--output pope.json",
    "evaluate mme": "hkdfast evaluate mme --results answers --output mme.json",
    "evaluate choices": "hkdfast evaluate choices --model MODEL --task factcheck --data questions.json --images images "
    "--output choices.json",
    "doctor": "hkdfast doctor",
    "demo": "hkdfast demo --rows 128 --vocab 8000 --hidden 128",
    "bench": "hkdfast bench --seconds 600",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only if it is informative, lists as they are typed, and an example on one line."""

    def _get_help_string(self, action):
        default = action.default
        if action.nargs == 0:
            return f"{action.help} (default: on)" if default is True else action.help
        if default is None or default in ("", [], ()):
            return action.help
        if isinstance(default, list):
            return f"{action.help} (default: {' '.join(map(str, default)).replace('%', '%%')})"
        return super()._get_help_string(action)

    def _fill_text(self, text, width, indent):
        if text.startswith("example:"):
            return indent + text
        return super()._fill_text(text, width, indent)


def add_example(parser, name):
    """End the help of the command with its example."""
    parser.epilog = f"example: {EXAMPLES[name]}"


def shorten_usage(parser):
    """Name only the required options in the usage line; the help below it lists all."""
    choice = [group._group_actions for group in parser._mutually_exclusive_groups if group.required]
    words = [written(action) for action in parser._actions if action.required]
    words += [f"({' | '.join(map(written, actions))})" for actions in choice]
    parser.usage = " ".join(["%(prog)s", *words, "[options]"])


def written(action):
    """An option as a usage line shows it: --model PATH."""
    value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper())
    return f"{action.option_strings[0]} {value}" + (f" [{value} ...]" if action.nargs == "+" else "")
