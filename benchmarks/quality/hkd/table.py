"""Tables of the study of HKD4VLM's reconstruction: micro-F1, and differences with 95 % paired bootstrap intervals."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hkd.study import STAGES, SYSTEMS, as_recorded, read_cell
from hkd.tune import EPOCHS, LAYOUTS, RATES, RETOUCH, SPLITS, TAUGHT, TEACH, truths
from hkdfast.evaluate.tables import layout
from world.tracks import REWRITE

FILE = Path(__file__).parents[1] / "results" / "hkd.json"
MODES = ("no shift", "shift")  # of a cell's answers
HEADLINE = (LAYOUTS.index("fixed"), MODES.index("shift"))  # how systems answer where nothing else is said
RESAMPLES = 2000
BLOCK = 500  # resamples at a time
PARTS = {  # of the systems: two that differ in a part
    part: {"added": (f"+ {part}", "distilled"), "left out": ("whole", f"whole - {part}")}
    for part in ("augmentation", "pyramid", "ternary")
} | {
    "unlabelled images": {"left out": ("whole + unlabelled", "whole")},
    "unlabelled images, as long": {"left out": ("whole + unlabelled", "whole, longer")},
}


def settings():
    """What the results file says about how they were made, with the names of `as_recorded`."""
    found = {
        "splits": {name: {"images": count, "seed": seed} for name, (count, seed) in SPLITS.items()},
        "stages": {name: asdict(stage) for name, stage in STAGES.items()},
        "distillation": TEACH,
        "rates": RATES | {"taught": TAUGHT},
        "epochs of tuning directly": EPOCHS,
        "rewrites": repr(REWRITE),
        "views": repr(RETOUCH),
        "resamples": RESAMPLES,
    }
    return json.loads(as_recorded(json.dumps(found)))


def read_cells(cells, track, seeds):
    """{system: {seed: (layouts, modes, questions) bool, whether each answer is right}} of the cells that are there."""
    truth, found = truths(track), {}
    for system in SYSTEMS:
        answers = {seed: read_cell(cells, track, seed, system) for seed in seeds}
        right = {seed: one == truth for seed, one in answers.items() if one is not None}
        if right:
            found[system] = right
    return found


def gap(ours, theirs, mine=HEADLINE, yours=HEADLINE):
    """`interval` of two systems on the chains that both have, None without one; each answers by its layout and mode."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    return interval(np.stack([ours[seed][mine] for seed in seeds]), np.stack([theirs[seed][yours] for seed in seeds]))


def interval(ours, theirs, resamples=RESAMPLES, seed=0):
    """Mean difference of two systems in points, and the 2.5th and 97.5th percentile of its paired bootstrap.

    Images are drawn with replacement, the same for both systems and all chains, and so are the chains. Few chains drawn
    from themselves vary too little, by a factor of sqrt((n - 1) / n), which is given back to them.

    Args:
        ours, theirs: (chains, questions) bool, right or not; one question an image.
    """
    gap = ours.astype(np.float32) - theirs.astype(np.float32)
    chains, questions = gap.shape
    rng = np.random.default_rng(seed)
    values = []
    for start in range(0, resamples, BLOCK):
        draws = min(BLOCK, resamples - start)
        times = rng.multinomial(questions, np.full(questions, 1 / questions), draws).astype(np.float32)
        means = times @ gap.T / questions
        middle = means.mean(1)
        drawn = rng.integers(chains, size=(draws, chains))
        away = np.take_along_axis(means - middle[:, None], drawn, 1).mean(1)
        values.append(middle + away * (np.sqrt(chains / (chains - 1)) if chains > 1 else 0))
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return [round(100 * float(x), 2) for x in (gap.mean(), low, high)]


def report(cells, track, seeds):
    """What there is to say about a track.

    Returns:
        {"systems": {name: {"f1": {layout: {mode: mean}}, "chains": {seed: f1}, "against small", "against large"}},
        "parts": {part: {"added", "left out"}}}. Differences are [points, low, high]. Those and the f1 of each chain are
        of systems that answer with the shift, in the challenge's own layout, but for what the shift itself is worth.
    """
    right = read_cells(cells, track, seeds)
    once = [MODES.index("no shift")] * len(MODES)
    for name in ("distilled", "whole"):  # the same models, asked every question once
        if name in right:
            right[f"{name} - shift"] = {seed: one[:, once] for seed, one in right[name].items()}
    rows = {}
    for name, chains in right.items():
        means = 100 * np.mean([one.mean(-1) for one in chains.values()], 0)
        row = rows[name] = {
            "f1": {
                layout: {mode: round(float(means[i, j]), 2) for j, mode in enumerate(MODES)}
                for i, layout in enumerate(LAYOUTS)
            },
            "chains": {seed: round(100 * float(one[HEADLINE].mean()), 2) for seed, one in chains.items()},
        }
        for other in ("small", "large"):
            if name != other:
                row[f"against {other}"] = gap(chains, right.get(other, {}))
    parts = {}
    for part, pairs in PARTS.items():
        parts[part] = {what: gap(right.get(a, {}), right.get(b, {})) for what, (a, b) in pairs.items()}
    for i, kind in enumerate(LAYOUTS):
        systems = {"added": "distilled", "left out": "whole", "to small": "small"}
        parts[f"shift, {kind} layout"] = {
            what: gap(right.get(name, {}), right.get(name, {}), (i, 1), (i, 0)) for what, name in systems.items()
        }
    return {"systems": rows, "parts": parts}


SHOWN = {  # rows of the README's table, by their names in the results
    "large": "large, tuned directly",
    "medium": "medium, tuned directly",
    "augmented pyramid M": "medium, taught in the whole's pyramid",
    "small": "small, tuned directly",
    "distilled": "small, plain distillation",
    "distilled - shift": "plain distillation without mapping shift",
    "+ pyramid": "+ pyramid",
    "+ ternary": "+ ternary",
    "+ augmentation": "+ augmentation",
    "whole": "**whole system**",
    "whole + unlabelled": "**whole, with unlabelled images**",
    "whole, longer": "whole, as long but without them",
    "whole - pyramid": "whole without pyramid",
    "whole - ternary": "whole without ternary",
    "whole - augmentation": "whole without augmentation",
    "whole - shift": "whole without mapping shift",
    "small, true rewrites": "small, tuned with augmentation, truly labelled",
}


def readme():
    """The README's table: micro-F1 with the shift, and the gain over the small model tuned directly."""
    found = json.loads(FILE.read_text())
    count = found["splits"]["test"]["images"]
    shift = [told(found["tracks"][track]["parts"]["shift, fixed layout"]["left out"]) for track in found["tracks"]]
    where = f"{found['processor']}, `{FILE.relative_to(Path(__file__).parents[3])}`"
    lines = [
        f"{len(found['chains'])} chains, {count} fresh test questions a track. Micro-F1 under four cyclic shifts"
        " of the challenge's own layout, and its change against the small model tuned directly with the 95 % interval"
        f" over images and chains; {where}. The shift itself adds {' and '.join(shift)} to the whole.",
        "",
        f"| | {' | '.join(found['tracks'])} |",
        "|" + " --- |" * (len(found["tracks"]) + 1),
    ]
    for name, words in SHOWN.items():
        cells = []
        for track in found["tracks"].values():
            row = track["systems"].get(name)
            gain = told(row.get("against small")) if row else ""
            few = "" if not row or len(row["chains"]) == len(found["chains"]) else f", {len(row['chains'])} chains"
            cells.append(f"{row['f1']['fixed']['shift']:.1f}{f' ({gain}{few})' if gain else ''}" if row else "")
        if any(cells):
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def told(gap):
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gap) if gap else ""


def text(found):
    """The tables of one track's report as text: systems, and what each part is worth where that is known."""
    rows, parts = [], []
    for name, row in found["systems"].items():
        numbers = [f"{row['f1'][kind][mode]:.1f}" for kind in LAYOUTS for mode in MODES]
        gaps = [told(row.get(f"against {other}")) for other in ("small", "large")]
        rows.append([name, str(len(row["chains"])), *numbers, *gaps])
    for part, gaps in found["parts"].items():
        parts.append([part, told(gaps.get("added")), told(gaps.get("left out"))])
    columns = [f"{kind}, {mode}" for kind in LAYOUTS for mode in MODES]
    systems = layout(["micro-F1", "chains", *columns, "against small", "against large"], rows)
    known = [part for part in parts if any(part[1:])]
    return "\n\n".join([systems, *([layout(["part", "added to distillation", "left out"], known)] if known else [])])


def meaning(found, track):
    """What a track's report says about the whole system, in one sentence; nothing without it."""
    whole = found["systems"].get("whole", {})
    said = []
    for other in ("small", "large"):
        gap = whole.get(f"against {other}")
        if gap:
            change, low, high = gap
            where = f"{change:.1f} above" if low > 0 else f"{-change:.1f} below" if high < 0 else "not told apart from"
            said.append(f"{where} the {other} one tuned directly [{low:+.1f}, {high:+.1f}]")
    return (
        f"On {track}, the small model that the whole system makes is, in points of micro-F1, {' and '.join(said)}."
        if said
        else ""
    )
