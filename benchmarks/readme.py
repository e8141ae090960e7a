"""Writes the tables of README.md, benchmarks/speed/README.md and benchmarks/quality/TABLES.md from the results files.

python benchmarks/readme.py [--check]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "benchmarks/speed"), str(ROOT / "benchmarks/quality")]

import speed_table  # noqa: E402

import hkd.table  # noqa: E402
import seed.table  # noqa: E402
from hkdfast.data import outputs  # noqa: E402

# rows of the README's tables: the beginnings of their names, of which each gives the last row without narrow tiles
SPEED = ("logits bf16, reverse_kl", "heads fp32, reverse_kl", "heads bf16, reverse_kl", "coupled fp32")
SEED = ("SEED |", "SEED, two rounds", "shift of yes to the yes-rate", "contrast, 1 draw")
HKD = ("large, tuned directly", "small, tuned directly", "small, plain distillation", "**whole system**")


def some(table, *beginnings):
    """A Markdown table, or several, with those rows alone whose first cell begins so; a row that is in none fails."""
    kept, found = [], set()
    for part in table.split("\n\n"):
        lines = part.splitlines()
        if not lines[0].startswith("|"):  # the words above a table
            kept.append(part)
            continue
        rows = {}
        for line in lines[2:]:
            name = line.removeprefix("| ")
            first = next((start for start in beginnings if name.startswith(start)), None)
            if first and not any(narrow in name for narrow in ("bfloat16 tiles", "difference tiles")):
                rows[first] = line
        found |= set(rows)
        kept.append("\n".join([*lines[:2], *rows.values()]))
    missing = [start for start in beginnings if start not in found]
    if missing:
        sys.exit(f"the results have no row that begins with {missing[0]!r}")
    return "\n\n".join(kept)


PAGES = {  # {page: {name of its markers: function that makes the table}}
    "README.md": {
        "speed": lambda: some(speed_table.readme(), *SPEED),
        "trainers": speed_table.trainers,
        "seed": lambda: some(seed.table.readme(), *SEED),
        "hkd": lambda: some(hkd.table.readme(), *HKD),
    },
    "benchmarks/speed/README.md": {"speed": speed_table.everything, "trainers": speed_table.trainers},
    "benchmarks/quality/TABLES.md": {"seed": seed.table.readme, "hkd": hkd.table.readme},
}


def with_tables(page, text):
    """The text of a page with every table between its markers made anew."""
    for name, table in PAGES[page].items():
        start, end = f"<!-- {name}: made by benchmarks/readme.py -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            sys.exit(f"{page} must have the lines {start!r} and {end!r} once each")
        head, rest = text.split(start)
        text = f"{head}{start}\n{table()}\n{end}{rest.split(end)[1]}"
    return text


def main():
    parser = argparse.ArgumentParser(description="Writes the tables of the READMEs from the results files.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is not current")
    args = parser.parse_args()
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        new = with_tables(page, text)
        if args.check and new != text:
            sys.exit(f"{page} differs from the results: run python benchmarks/readme.py")
        if not args.check:
            with outputs.replacing(path) as file:
                file.write(new)


if __name__ == "__main__":
    main()
