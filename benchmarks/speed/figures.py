"""Draws the figures of every results file beside it: python benchmarks/speed/figures.py [FILE.json...]"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def read(path):
    """{what: {who: [benchmark's facts, its median in ms among them]}}, and the machine's name."""
    data = json.loads(path.read_text())
    found = defaultdict(lambda: defaultdict(list))
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        found[info["what"]][info["who"]].append({**info, "ms": benchmark["stats"]["median"] * 1e3})
    machine = data["machine_info"]
    return found, machine["gpu"] or machine["cpu"]["brand_raw"]


def style(who):
    """Ours thick, each peer with a colour that it keeps from figure to figure."""
    peers = ("eager", "torch.compile", "Liger", "TRL", "copy", "its GEMMs")
    if who.startswith("hkdfast"):
        return {"color": "C0", "linewidth": 2.5, "linestyle": "--" if "triton" in who else "-"}
    number = next((i for i, peer in enumerate(peers, 1) if who.startswith(peer)), len(peers) + 1)
    return {"color": f"C{number}", "linewidth": 1.2, "linestyle": ":" if "compiled" in who else "-"}


def number(facts):
    return float(re.search(r"[\d.]+", facts["shape"]).group())


def lines(found, prefix, x, y, floor=None):
    """A figure of curves, one panel for each group whose name begins so, or None if there is none."""
    groups = sorted(what for what in found if what.startswith(prefix))
    if not groups:
        return None
    figure, panels = panels_of(len(groups))
    for panel, what in zip(panels, groups, strict=True):
        for who, runs in found[what].items():
            points = sorted((x[1](run), y[1](run)) for run in runs if y[1](run) is not None)
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=who, **style(who))
        panel.set(title=what.removeprefix(prefix), xlabel=x[0], ylabel=y[0], xscale="log", yscale="log")
        if floor:
            panel.axhline(floor[1], color="black", linewidth=0.8, linestyle=":", label=floor[0])
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=6)
    return figure


def bars(found, prefix, y, log=False):
    """A figure of bars, one panel for each group, the shapes side by side."""
    groups = sorted(what for what in found if what.startswith(prefix) and any(map(len, found[what].values())))
    groups = [what for what in groups if any(y[1](run) is not None for runs in found[what].values() for run in runs)]
    if not groups:
        return None
    figure, panels = panels_of(len(groups))
    for panel, what in zip(panels, groups, strict=True):
        shapes = list(dict.fromkeys(run["shape"] for runs in found[what].values() for run in runs))
        width = 0.8 / len(found[what])
        for i, (who, runs) in enumerate(found[what].items()):
            heights = {shapes.index(run["shape"]) + i * width: y[1](run) for run in runs if y[1](run) is not None}
            colour, hatch = style(who)["color"], "" if style(who)["linestyle"] == "-" else "///"
            panel.bar(list(heights), list(heights.values()), width, label=who, color=colour, hatch=hatch)
        panel.set(title=what, ylabel=y[0])
        if log:
            panel.set_yscale("log")
        panel.set_xticks(range(len(shapes)), [shape.split(":")[0] for shape in shapes], fontsize=7)
    panels[0].legend(fontsize=6)
    return figure


def panels_of(count):
    from matplotlib import pyplot

    across = min(count, 3)
    down = -(-count // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 3.6 * down), layout="constrained", squeeze=False)
    for unused in axes.flat[count:]:
        unused.axis("off")
    return figure, list(axes.flat[:count])


def floors(found):
    """{(what, shape): ms that nothing can beat}: the products alone, or the least traffic at the speed of a copy."""
    floor = {}
    for what, by_who in found.items():
        for who, runs in by_who.items():
            for run in runs:
                if who == "its GEMMs alone":
                    floor[what, run["shape"]] = run["ms"]
                if who == "copy":  # moves two of the three streams of a loss with its gradient, of SEED's four
                    floor["logits", run["shape"]], floor["SEED", run["shape"]] = 1.5 * run["ms"], 2 * run["ms"]
    return floor


def floor_of(what, shape, floor):
    """Of a group of benchmarks, or None where none was measured."""
    if what.startswith(("logits", "SEED")):
        return floor.get((what.split()[0], shape))
    head = what.split(",")[0] + (", frozen head" if what.endswith("frozen head") else "")
    return floor.get((head, shape))


def with_floors(found):
    """Every run of ours and of the peers knows how far it is above its floor."""
    floor = floors(found)
    for what, by_who in found.items():
        for runs in by_who.values():
            for run in runs:
                least = floor_of(what, run["shape"], floor)
                run["fraction"] = None if least is None else least / run["ms"]
    return found


def draw(path):
    """The figures of one results file, beside it; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, machine = read(path)
    with_floors(found)
    time, memory = ("ms", lambda run: run["ms"]), ("GB above the inputs", gigabytes)
    figures = {
        "vocabulary": lines(
            found, "vocabulary, ", ("words", number), ("GB/s of the least traffic", lambda r: r.get(TRAFFIC))
        ),
        "tokens": lines(found, "tokens, ", ("rows", number), time),
        "error": lines(found, "error, ", ("distance of the teacher", number), ("gradient error", error), BOUND),
        "heads-time": bars(found, "heads", time, log=True),
        "heads-memory": bars(found, "heads", memory, log=True),
        "logits-time": bars(found, "logits", time, log=True),
        "seed-time": bars(found, "SEED", time, log=True),
        "fraction": bars(found, ("heads", "logits", "SEED"), ("floor / time", lambda run: run["fraction"])),
        "heads-error": bars(found, "heads", ("gradient error", error), log=True),
        "contrast": bars(found, "contrast", time, log=True),
    }
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        figure.suptitle(machine, fontsize=9)
        written.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written


TRAFFIC = "GB/s of the least traffic"
BOUND = ("3e-3", 3e-3)


def gigabytes(run):
    return None if "peak memory" not in run else run["peak memory"] / 1e9


def error(run):
    return run.get("gradient error") or None  # a logarithmic scale has no 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    for path in parser.parse_args().files or sorted(RESULTS.glob("*.json")):
        print(*draw(path), sep="\n")


if __name__ == "__main__":
    main()
