"""One results file of the parts that gpu.sh's stages left: python benchmarks/speed/collect.py FOLDER... [--name NAME]

A benchmark that several parts hold is taken from the last. Parts of different machines or versions are refused.
"""

import argparse
import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
STATISTICS = ("min", "max", "mean", "stddev", "median", "iqr", "rounds", "iterations")
SAME = (
    ("machine_info", "gpu"),
    ("machine_info", "driver"),
    ("machine_info", "cpu", "brand_raw"),
    ("versions",),
    ("commit_info", "id"),
)


def at(part, path):
    for key in path:
        part = part.get(key) if isinstance(part, dict) else None
    return part


def merge(parts):
    """The parts, in their order, as one."""
    first = parts[0]
    for path in SAME:
        found = {json.dumps(at(part, path), sort_keys=True) for part in parts}
        if len(found) > 1:
            sys.exit(f"the parts differ in {'.'.join(path)}: {' and '.join(sorted(found))}")
    benchmarks = {}
    for part in parts:
        for one in part["benchmarks"]:
            stats = {name: one["stats"][name] for name in STATISTICS}
            benchmarks[one["fullname"]] = {"name": one["name"], "stats": stats, "extra_info": one["extra_info"]}
    kept = {key: first[key] for key in ("machine_info", "commit_info", "versions", "date")}
    failures = {json.dumps(one, sort_keys=True): one for part in parts for one in part.get("failures", [])}
    commands = list(dict.fromkeys(part["command"] for part in parts))
    return {**kept, "command": commands, "failures": list(failures.values()), "benchmarks": list(benchmarks.values())}


def join(path, parts):
    """Put the parts of one stage that its processes have left into one file."""
    whole = json.loads(parts[0].read_text())
    for part in map(json.loads, (each.read_text() for each in parts[1:])):
        whole["benchmarks"] += part["benchmarks"]
        whole["failures"] += part["failures"]
    path.write_text(json.dumps(whole, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--name", help="of the results file; by default the GPU's")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--join", type=Path, help="put the parts, files here, into this one and do no more")
    args = parser.parse_args()
    if args.join:
        return join(args.join, [path for path in args.folders if path.is_file()])
    paths = sorted(path for folder in args.folders for path in folder.glob("*.json"))
    if not paths:
        sys.exit(f"no parts (*.json) in {', '.join(map(str, args.folders))}: run benchmarks/speed/gpu.sh")
    whole = merge([json.loads(path.read_text()) for path in paths])
    device = whole["machine_info"]["gpu"] or whole["machine_info"]["cpu"]["brand_raw"]
    name = args.name or re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = args.into / f"{name}.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"{len(whole['benchmarks'])} benchmarks and {len(whole['failures'])} failures of {len(paths)} parts: {path}")


if __name__ == "__main__":
    main()
