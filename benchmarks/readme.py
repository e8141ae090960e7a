"""Writes the README's tables from the results files: python benchmarks/readme.py [--check | --all]"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks/speed"), str(ROOT / "benchmarks/quality")]

import speed_table  # noqa: E402

import hkd.table  # noqa: E402
import seed.table  # noqa: E402

SECTIONS = {"speed": speed_table.readme, "seed": seed.table.readme, "hkd": hkd.table.readme}


def with_tables(text):
    """The README's text with every table between its markers made anew."""
    for name, table in SECTIONS.items():
        start, end = f"<!-- {name}: made by benchmarks/readme.py -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            sys.exit(f"README.md must have the lines {start!r} and {end!r} once each")
        head, rest = text.split(start)
        text = f"{head}{start}\n{table()}\n{end}{rest.split(end)[1]}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is not current")
    parser.add_argument("--all", action="store_true", help="change nothing; print every row of the speed results")
    args = parser.parse_args()
    if args.all:
        print(speed_table.everything())
        return
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = with_tables(text)
    if args.check and new != text:
        sys.exit("README.md differs from the results: run python benchmarks/readme.py")
    if not args.check:
        readme.write_text(new)


if __name__ == "__main__":
    main()
