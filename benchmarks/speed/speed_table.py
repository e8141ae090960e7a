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
TABLED = ("logits", "SEED", "heads", "coupled")  # the rest are sweeps, for the figures, and steps of trainers


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


def threads(count):
    return f"{count} thread" + "s" * (count > 1)


def machine(path):
    data = json.loads(path.read_text())
    info, versions = data["machine_info"], data["versions"]
    where = info["gpu"] or f"{info['cpu']['brand_raw']}, {threads(info['torch_threads'])}"
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


def results():
    return sorted((ROOT / "benchmarks/speed/results").glob("*.json"))


def everything(*wanted):
    """Every row of every results file that has some, or those whose name holds one of the words."""
    wanted = wanted or [""]
    found = [path for path in results() if any(word in row[0] for row in rows(path) for word in wanted)]
    return "\n\n".join("\n".join(table(path, wanted)) for path in found)


def trainer_rows(path):
    """Of every step of a trainer in a results file: what is tabled of it, with and without hkdfast."""
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        info, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
        if "unpatched" not in info:
            continue
        before = info["unpatched"]
        memory = ["-", "-"]
        if info["peak memory"] is not None:  # None where no system tells it
            memory = [f"{info['peak memory'] / 1e6:.0f} MB", f"{info['peak memory'] / before['peak memory']:.2f}x"]
        yield [
            f"{info['what'].removeprefix('step of ')}, {info['shape']}",
            f"{seconds * 1e3:.0f} ms",
            f"{seconds / before['median']:.2f}x ({benchmark['stats']['min'] / before['min']:.2f}x)",
            *memory,
            f"{info['loss error']:.0e} ({before['loss error']:.0e})",
        ]


def trainers():
    """Steps of patched trainers, of every results file that has some."""
    heading = (
        "| | time | of the unpatched time (fastest rounds) | memory | of the unpatched memory "
        "| error of the loss (unpatched) |"
    )
    found = []
    for path in results():
        if steps := list(trainer_rows(path)):
            lines = [heading, "| --- |" + " --- |" * 5, *(f"| {' | '.join(row)} |" for row in steps)]
            found.append(f"{machine(path)}.\n\n" + "\n".join(lines))
    return "\n\n".join(found)


def readme():
    return everything("reverse_kl", "coupled")
