"""Writes the README's table of speed from the results files: python benchmarks/speed/table.py [--check]"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
START, END = "<!-- speed: made by benchmarks/speed/table.py -->", "<!-- /speed -->"
PEERS = ("eager", "torch.compile", "Liger chunked, compiled", "TRL ChunkedDivergence")


def cell(ours, peer):
    """How many times a peer's time is ours, and its error."""
    if peer is None:
        return "-"
    return f"{peer['stats']['median'] / ours['stats']['median']:.1f}x ({peer['extra_info']['gradient error']:.0e})"


def roof(results, group, shape):
    """What nothing can beat: three streams at the speed of a copy, which moves two; or the matrix products alone."""
    for (what, where), runs in results.items():
        if where == shape and what == "copy bf16" and group.startswith("logits"):
            return 1.5 * runs["copy"]["stats"]["median"]
        if where == shape and group.startswith(what) and "its GEMMs alone" in runs:
            return runs["its GEMMs alone"]["stats"]["median"]


def rows(path):
    results = defaultdict(dict)
    data = json.loads(path.read_text())
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        results[info["what"], info["shape"]][info["who"]] = benchmark
    for (what, shape), runs in results.items():
        for who in runs:
            if not who.startswith("hkdfast"):
                continue
            ours, floor = runs[who], roof(results, what, shape)
            tiles = who.removeprefix("hkdfast").strip(", ")
            name = f"{what}, {shape}" + (f", {tiles}" if tiles else "")
            time = f"{ours['stats']['median'] * 1e3:.1f} ms ({ours['extra_info']['gradient error']:.0e})"
            over = "-" if floor is None else f"{ours['stats']['median'] / floor:.2f}x"
            yield [name, time, over, *(cell(ours, runs.get(peer)) for peer in PEERS)]


def machine(path):
    data = json.loads(path.read_text())
    info, versions = data["machine_info"], data["versions"]
    where = info["gpu"] or f"{info['cpu']['brand_raw']}, {info['torch_threads']} threads"
    named = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    return f"{where}; {data['date']}; {named}; `{path.relative_to(ROOT)}`"


def table():
    lines = []
    for path in sorted((ROOT / "benchmarks/speed/results").glob("*.json")):
        lines += [
            f"{machine(path)}. Median time of loss and gradients, in brackets the gradient's error to float64; for each"
            " peer how many times ours its time is, and its error.",
            "",
            "| | hkdfast | over its floor | eager | torch.compile | Liger 0.8.5 | TRL 1.16 |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows(path)),
            "",
        ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the README's table is not current"
    )
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    if START not in text or END not in text:
        sys.exit(f"README.md has no lines {START!r} and {END!r} to write between")
    head, rest = text.split(START)
    new = f"{head}{START}\n{table()}{END}{rest.split(END)[1]}"
    if args.check and new != text:
        sys.exit("README.md differs from the results: run python benchmarks/speed/table.py")
    if not args.check:
        readme.write_text(new)


if __name__ == "__main__":
    main()
