"""Draws the figures of every results file beside it, and with --readme the one of the README.

python benchmarks/speed/figures.py [FILE.json...]
python benchmarks/speed/figures.py --readme [FILE.json...]      docs/figures/speed-FILE.svg
"""

import argparse
import json
import re
from collections import defaultdict
from datetime import date
from pathlib import Path

from speed_table import floor_of, floors

RESULTS = Path(__file__).parent / "results"
DRAWN = Path(__file__).parents[2] / "docs" / "figures"


def read(path):
    """{what: {who: [a benchmark's facts, with its median in ms and the fraction of it that is the floor]}}, and the
    machine's name."""
    data = json.loads(path.read_text())
    found, floor = defaultdict(lambda: defaultdict(list)), floors(data["benchmarks"])
    for benchmark in data["benchmarks"]:
        info, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
        if info["who"] in ("copy", "its GEMMs alone"):
            continue
        least = floor_of(info["what"], info["shape"], floor)
        facts = {**info, "ms": seconds * 1e3, "fraction": None if least is None else least / seconds}
        found[info["what"]][info["who"]].append(facts)
    machine = data["machine_info"]
    return found, machine["gpu"] or machine["cpu"]["brand_raw"]


def style(who):
    """Ours blue and thick, each peer with a color that it keeps from figure to figure."""
    peers = ("eager", "torch.compile", "Liger", "TRL")
    if who.startswith("hkdfast"):
        pattern = next(
            (p for word, p in (("triton", "--"), ("bfloat16", ":"), ("difference", "-.")) if word in who), "-"
        )
        return {"color": "C0", "linewidth": 2.5, "linestyle": pattern}
    number = next((i for i, peer in enumerate(peers, 1) if who.startswith(peer)), len(peers) + 1)
    pattern = "--" if "compiled" in who else ":" if "fused" in who else "-"
    return {"color": f"C{number}", "linewidth": 1.2, "linestyle": pattern}


HATCHES = {"-": "", "--": "///", ":": "...", "-.": "xxx"}


def legend(panels):
    """On the panel that shows most."""
    max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[1])).legend(fontsize=6)


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
    legend(panels)
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
            color, hatch = style(who)["color"], HATCHES[style(who)["linestyle"]]
            panel.bar(list(heights), list(heights.values()), width, label=who, color=color, hatch=hatch)
        panel.set(title=what, ylabel=y[0])
        if log:
            panel.set_yscale("log")
        panel.set_xticks(range(len(shapes)), [shape.split(":")[0] for shape in shapes], fontsize=7)
    legend(panels)
    return figure


def panels_of(count):
    from matplotlib import pyplot

    across = min(count, 3)
    down = -(-count // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 3.6 * down), layout="constrained", squeeze=False)
    for unused in axes.flat[count:]:
        unused.axis("off")
    return figure, list(axes.flat[:count])


def draw(path):
    """The figures of one results file, beside it; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, machine = read(path)
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
        "coupled-time": bars(found, "coupled", time, log=True),
        "fraction": bars(found, ("heads", "logits", "SEED", "coupled"), ("floor / time", lambda run: run["fraction"])),
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


# panels of the README's figure: a title, what is shown of the results, and of which of our tiles
FRONT = (
    ("from logits: reverse KL, bf16", "logits bf16, reverse_kl", ""),
    ("from LM heads: reverse KL, fp32", "heads fp32, reverse_kl", "float32 tiles"),
)
MEMORY = {"rows": 1024, "hidden": 256, "dtype": "float32", "seed": 0}  # of the heads whose memory is measured
VOCABULARIES = (8000, 16000, 32000, 64000, 128000)
PEERS = (
    "eager",
    "torch.compile",
    "Liger chunked",
    "Liger chunked, compiled",
    "TRL ChunkedDivergence",
)


def measure_memory(path):
    """Measure, as `hkdfast demo` does, the peak memory above the inputs of loss and gradients between two heads on this
    machine's CPU, and write it beside a results file. Returns the path of what it wrote."""
    import torch

    from hkdfast.cli import demo

    device, peaks = torch.device("cpu"), defaultdict(list)
    for vocab in VOCABULARIES:
        problems = demo.problems(argparse.Namespace(**MEMORY, vocab=vocab), device)
        inputs = next(tensors for title, tensors, _ in problems if title == "heads")
        for who, loss in demo.cases(MEMORY["dtype"])["heads"].items():
            before = demo.peak(device, reset=True)
            if before is None:
                raise OSError("the peak memory of a process is not known here: Linux tells it")
            demo.gradients(loss, inputs)
            peaks[who].append({"vocab": vocab, "bytes": demo.peak(device) - before})
    written = memory_file(path)
    written.parent.mkdir(exist_ok=True)
    facts = {"date": date.today().isoformat(), "torch": torch.__version__, "problem": MEMORY, "peaks": peaks}
    written.write_text(json.dumps(facts, indent=1) + "\n")
    return written


def memory_file(path):
    return path.parent / "memory" / path.name


def front_memory(axis, found):
    """Curves of the peak memory over the vocabulary."""
    for who, points in found["peaks"].items():
        xs, ys = ([point[name] for point in points] for name in ("vocab", "bytes"))
        color = "C0" if who.startswith("hkdfast") else "0.6"
        axis.plot(xs, [y / 1e9 for y in ys], marker="o", markersize=3, color=color)
        axis.text(xs[-1], ys[-1] / 1e9, f"{who} {ys[-1] / 1e9:.1f} ", ha="right", va="bottom", fontsize=7)
    axis.set_title(f"from LM heads, {found['problem']['rows']} tokens, fp32", fontsize=9)
    axis.set_xlabel("vocabulary, tokens; memory above the inputs, GB", fontsize=8)
    axis.set_ylim(0)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def front(path):
    """The README's figure of a results file: time of loss and gradients, a panel for each entry of FRONT, and beneath
    them the memory above the inputs where it was measured. Returns its path, or None if the file has none of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, machine = read(path)
    panels = [(title, found[what], tiles) for title, what, tiles in FRONT if found[what]]
    facts = {"time, ms": lambda run: run["ms"], "memory above the inputs, GB": gigabytes}
    measured = [
        label
        for label, fact in facts.items()
        if any(fact(r) for _, group, _ in panels for rs in group.values() for r in rs)
    ]
    if not panels:
        return None
    memory = json.loads(memory_file(path).read_text()) if memory_file(path).is_file() else None
    columns = len(panels) + (memory is not None)
    # the same results are the same file; text stays text
    pyplot.rcParams.update({"svg.hashsalt": path.stem, "svg.fonttype": "none"})
    size = (4 * columns, 2.6 * len(measured))
    figure, axes = pyplot.subplots(len(measured), columns, figsize=size, layout="constrained", squeeze=False)
    if memory is not None:
        front_memory(axes[0, -1], memory)
        for axis in axes[1:, -1]:
            axis.axis("off")
    for label, row in zip(measured, axes, strict=True):
        for axis, (title, group, tiles) in zip(row, panels, strict=False):
            front_bars(axis, {who: runs for who, runs in group.items() if tiles in who or who in PEERS}, facts[label])
            axis.set_title(title, fontsize=9)
            axis.set_xlabel(label, fontsize=8)
    figure.suptitle(f"loss and gradients; {machine}; shorter is better", fontsize=8)
    DRAWN.mkdir(parents=True, exist_ok=True)
    written = DRAWN / f"speed-{path.stem}.svg"
    figure.savefig(written, metadata={"Date": None})
    pyplot.close(figure)
    return written


def front_bars(axis, group, fact):
    """Horizontal bars, those of one shape together, each with its number and how many times ours it is."""
    shapes = list(dict.fromkeys(run["shape"] for runs in group.values() for run in runs))
    bars = [
        (who.removesuffix(", float32 tiles") + (f"\n{shape}" if len(shapes) > 1 else ""), who, shape, fact(run))
        for shape in shapes
        for who, runs in sorted(group.items(), key=lambda item: not item[0].startswith("hkdfast"))
        for run in runs
        if run["shape"] == shape and fact(run) is not None
    ]
    ours = {shape: value for _, who, shape, value in bars if who.startswith("hkdfast")}
    for place, (_, who, shape, value) in enumerate(bars):
        axis.barh(place, value, color="C0" if who.startswith("hkdfast") else "0.75")
        times = "" if who.startswith("hkdfast") or not ours.get(shape) else f"  ({value / ours[shape]:.1f}x)"
        axis.text(
            value, place, f" {value:.3g}{times}" if value < 100 else f" {value:,.0f}{times}", va="center", fontsize=7
        )
    axis.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max(value for *_, value in bars))
    axis.spines[["top", "right"]].set_visible(False)


TRAFFIC = "GB/s of the least traffic"
BOUND = ("3e-3", 3e-3)


def gigabytes(run):
    return None if "peak memory" not in run else run["peak memory"] / 1e9


def error(run):
    return run.get("gradient error") or None  # a logarithmic scale has no 0


def main():
    parser = argparse.ArgumentParser(description="Draws the figures of the results files.")
    parser.add_argument("files", nargs="*", type=Path, help="by default all in benchmarks/speed/results")
    parser.add_argument("--readme", action="store_true", help="draw the README's figure, docs/figures/speed-FILE.svg")
    parser.add_argument("--memory", action="store_true", help="measure results/memory/FILE.json on this machine's CPU")
    args = parser.parse_args()
    if args.memory and len(args.files) != 1:
        parser.error("--memory takes the one results file of this machine")
    for path in args.files or sorted(RESULTS.glob("*.json")):
        made = [measure_memory(path)] if args.memory else [front(path)] if args.readme else draw(path)
        print(*made, sep="\n")


if __name__ == "__main__":
    main()
