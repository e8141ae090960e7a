"""Tables of the results in benchmarks/speed/results: benchmarks/readme.py writes one into the README."""

import json
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
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


def table(path, wanted):
    return [
        f"{machine(path)}. Median time of loss and gradients, in brackets the gradient's error to float64; for each"
        " peer how many times ours its time is, and its error.",
        "",
        "| | hkdfast | over its floor | eager | torch.compile | Liger 0.8.5 | TRL 1.16 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows(path) if wanted in row[0]),
    ]


def everything(wanted=""):
    """Every row of every results file whose name holds the words."""
    files = sorted((ROOT / "benchmarks/speed/results").glob("*.json"))
    return "\n\n".join("\n".join(table(path, wanted)) for path in files)


def readme():
    return everything("reverse_kl")
