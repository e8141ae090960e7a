"""Tables of the results in benchmarks/speed/results: benchmarks/readme.py writes one into the README."""

import json
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = {  # of a peer that has several ways, the fastest
    "eager": ("eager",),
    "torch.compile": ("torch.compile",),
    "Liger 0.8.5": ("Liger chunked", "Liger chunked, compiled", "Liger fused JSD", "Liger JSD"),
    "TRL 1.16": ("TRL ChunkedDivergence",),
    "pairwise": ("pairwise distill_loss",),
}
TABLED = ("logits", "SEED", "heads", "coupled")  # the rest are sweeps, for the figures


def cell(ours, peers, failures):
    """How many times a peer's time is ours, and its error; why it has none."""
    if not peers:
        for word, told in (("OutOfMemory", "out of memory"), ("TooSlow", "too slow"), ("", "failed")):
            if any(word in why for why in failures):
                return told
        return "-"
    peer = min(peers, key=lambda one: one["stats"]["median"])
    return f"{peer['stats']['median'] / ours['stats']['median']:.1f}x ({error_of(peer)})"


def error_of(benchmark):
    """In a few characters; ? where its truth could not be computed, or was not reached."""
    error = benchmark["extra_info"].get("gradient error")
    return "?" if error is None else f"{error:.0e}"


def floors(benchmarks):
    """{(what, shape): seconds that nothing can beat}: the products alone, or the least traffic at a copy's speed."""
    floor = {}
    for benchmark in benchmarks:
        info, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
        if info["who"] == "its GEMMs alone":
            floor[info["what"], info["shape"]] = seconds
        if info["who"] == "copy":  # it moves two streams; a loss and its gradient three, SEED's four
            floor["logits", info["shape"]], floor["SEED", info["shape"]] = 1.5 * seconds, 2 * seconds
    return floor


def floor_of(what, shape, floor):
    """The floor of a group, or None where none was measured."""
    if what.startswith(("logits", "SEED")):
        return floor.get((what.split()[0], shape))
    return floor.get((what.split(",")[0] + (", frozen head" if what.endswith("frozen head") else ""), shape))


def rows(path):
    results, failures = defaultdict(dict), defaultdict(dict)
    data = json.loads(path.read_text())
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        results[info["what"], info["shape"]][info["who"]] = benchmark
    for failure in data.get("failures", []):
        failures[failure["what"], failure["shape"]][failure["who"]] = failure["why"]
    floor = floors(data["benchmarks"])
    for (what, shape), runs in results.items():
        for who in runs:
            if not who.startswith("hkdfast") or not what.startswith(TABLED):
                continue
            ours, least = runs[who], floor_of(what, shape, floor)
            tiles = who.removeprefix("hkdfast").strip(", ")
            name = f"{what}, {shape}" + (f", {tiles}" if tiles else "")
            time = f"{ours['stats']['median'] * 1e3:.1f} ms ({error_of(ours)})"
            over = "-" if least is None else f"{ours['stats']['median'] / least:.2f}x"
            cells = (
                cell(
                    ours,
                    [runs[peer] for peer in peers if peer in runs],
                    [why for peer, why in failures[what, shape].items() if peer in peers],
                )
                for peers in COLUMNS.values()
            )
            yield [name, time, over, *cells]


def machine(path):
    data = json.loads(path.read_text())
    info, versions = data["machine_info"], data["versions"]
    where = info["gpu"] or f"{info['cpu']['brand_raw']}, {info['torch_threads']} threads"
    named = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    return f"{where}; {data['date']}; {named}; `{path.relative_to(ROOT)}`"


def table(path, wanted):
    """Lines of a file's table, without the columns of peers who are in none of its rows."""
    found = [row for row in rows(path) if any(word in row[0] for word in wanted)]
    there = [i for i, _ in enumerate(COLUMNS) if any(row[3 + i] != "-" for row in found)]
    peers = [list(COLUMNS)[i] for i in there]
    return [
        f"{machine(path)}. Median time of loss and gradients, in brackets the gradient's error to float64; for each"
        " peer how many times ours its time is, and its error.",
        "",
        f"| | hkdfast | over its floor | {' | '.join(peers)} |",
        "| --- | --- | --- |" + " --- |" * len(peers),
        *(f"| {' | '.join([*row[:3], *(row[3 + i] for i in there)])} |" for row in found),
    ]


def everything(*wanted):
    """Every row of every results file, or those whose name holds one of the words."""
    files = sorted((ROOT / "benchmarks/speed/results").glob("*.json"))
    return "\n\n".join("\n".join(table(path, wanted or [""])) for path in files)


def readme():
    return everything("reverse_kl", "coupled")
