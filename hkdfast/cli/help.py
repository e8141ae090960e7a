"""What `--help` shows: defaults that say something, and an example at the end."""

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
    """Shows no default of None or of a flag, and keeps the line of an example."""

    def _get_help_string(self, action):
        says_nothing = action.default is None or action.nargs == 0
        return action.help if says_nothing else super()._get_help_string(action)

    def _fill_text(self, text, width, indent):
        if text.startswith("example:"):
            return indent + text
        return super()._fill_text(text, width, indent)


def add_example(parser, name):
    """End the help of the command with its example."""
    parser.epilog = f"example: {EXAMPLES[name]}"
