"""Tables of the study: scores, and differences with 95 % paired bootstrap intervals over images."""

import json
from pathlib import Path

import numpy as np
import torch

from hkdfast.evaluate.bootstrap import paired
from hkdfast.evaluate.pope import Graded, score
from hkdfast.evaluate.tables import layout
from world.questions import SPLITS

MODES = {"greedy": 1, "sampled": 5}  # draws of every answer, from the whole vocabulary at temperature 1
RESAMPLES = 1000
YES, NO = 0, 1  # columns of a cell, see Exam.take
FILE = Path(__file__).parents[1] / "results" / "seed.json"  # which `run.py seed --full` writes
LEFT_OUT = (  # of the README's table, which fills one screen; results/seed.json has them
    "base",
    "no plausibility",
    "blind prompts",
    "8 draws",
    "two rounds against",
    "yes-rate of SEED, two",
)


def read_cell(file):
    """{question set: (splits, questions, 3) float64}"""
    with np.load(file) as cell:
        return {int(name): cell[name].astype(np.float64) for name in cell.files}


def margin(cell):
    """Log-odds of yes over no, all sets, splits and questions in one row."""
    return np.concatenate([(part[..., YES] - part[..., NO]).ravel() for part in cell.values()])


def shifted(cell, shift):
    """The cell after a constant is taken from the logit of yes."""
    out = {}
    for name, part in cell.items():
        part = part.copy()
        p = np.exp(part[..., YES])
        part[..., YES] -= shift
        out[name] = part - np.log1p(p * np.expm1(-shift))[..., None]
    return out


def equal_yes_rate(cell, other):
    """The shift under which `cell` says yes as often as `other` does."""
    return float(np.quantile(margin(cell), 1 - (margin(other) > 0).mean()))


def tuned_shift(cell, exams, slack=0.005):
    """The shift that labels recommend: most adversarial F1, while random and popular lose no more than `slack`."""

    def f1(part):
        pairs = marked(part, exams, "greedy")
        return np.array([np.mean([score(marks)["f1"] for marks in pairs[split]]) for split in SPLITS])

    best, before = (0.0, 0.0), f1(cell)
    for shift in np.arange(0.1, 4.0, 0.1):
        gain = f1(shifted(cell, shift)) - before
        if gain[:-1].min() >= -slack:
            best = max(best, (gain[-1], shift))
    return best[1]


def marked(cell, exams, mode):
    """{split: [Graded of each set and draw]}. Draws take the same random numbers whatever the system."""
    pairs = {split: [] for split in SPLITS}
    for exam in exams:
        for number, split in enumerate(SPLITS):
            image, _, label = exam.splits[split].T
            label = torch.from_numpy(label == 1)
            names = tuple(f"{exam.seed}/{i}" for i in image)
            log_p = cell[exam.seed][number]
            for draw in range(MODES[mode]):
                words = log_p.argmax(-1)
                if mode == "sampled":
                    u = np.random.default_rng([exam.seed, number, draw]).random(len(log_p))
                    yes, no = np.exp(log_p[:, YES]), np.exp(log_p[:, NO])
                    words = np.where(u < yes, YES, np.where(u < yes + no, NO, 2))
                right = torch.where(label, torch.from_numpy(words == YES), torch.from_numpy(words == NO))
                pairs[split].append(Graded(names, label, right))
    return pairs


def auc(cell, exams, split):
    """Chance that a question to be answered yes has a larger margin than one to be answered no; mean over the sets."""
    areas = []
    for exam in exams:
        log_p = cell[exam.seed][SPLITS.index(split)]
        label = exam.splits[split][:, 2] == 1
        order = (log_p[:, YES] - log_p[:, NO]).argsort()
        rank = np.empty(len(order))
        rank[order] = np.arange(1, len(order) + 1)
        yes, no = label.sum(), (~label).sum()
        areas.append((rank[label].sum() - yes * (yes + 1) / 2) / (yes * no))
    return float(np.mean(areas))


def compare(ours, theirs, exams, modes=MODES):
    """One row of a table.

    Args:
        ours: cells of a system, one per base and seed.
        theirs: cells of what it is compared with, as many.
        exams: the question sets.
        modes: of MODES.

    Returns:
        {mode: {split: {"f1", "accuracy", "yes_rate", "auc", "f1_gain", "accuracy_gain"}}}, percent and percentage
        points, a gain as [difference, low, high].
    """
    row = {}
    for mode in modes:
        row[mode] = {}
        sides = [[marked(cell, exams, mode) for cell in cells] for cells in (ours, theirs)]
        for split in SPLITS:
            mine, yours = ([marks for pairs in side for marks in pairs[split]] for side in sides)
            scores = [score(marks) for marks in mine]
            entry = {name: 100 * float(np.mean([s[name] for s in scores])) for name in ("f1", "accuracy", "yes_rate")}
            entry["auc"] = float(np.mean([auc(cell, exams, split) for cell in ours]))
            for metric in ("f1", "accuracy"):
                gap = paired(mine, yours, metric, resamples=RESAMPLES)
                entry[f"{metric}_gain"] = [round(100 * x, 3) for x in (gap.difference, gap.low, gap.high)]
            row[mode][split] = {name: x if isinstance(x, list) else round(x, 4) for name, x in entry.items()}
    return row


def line(name, forwards, row, mode):
    cells = []
    for split in SPLITS:
        entry = row[mode][split]
        gain, low, high = entry["f1_gain"]
        gained = "" if gain == low == high == 0 else f" ({gain:+.1f} [{low:+.1f}, {high:+.1f}])"
        cells.append(f"{entry['f1']:.1f}{gained}")
    cells.append(f"{row[mode]['adversarial']['accuracy_gain'][0]:+.1f}")
    return [name, str(forwards), *cells]


def text(rows, mode):
    """A table of F1 with its change against the base, as text.

    Args:
        rows: list of (name, forwards at inference, row of `compare`).
        mode: one of MODES.
    """
    head = [mode, "forwards", *(f"{split} F1" for split in SPLITS), "adv. accuracy"]
    return layout(head, [line(*row, mode) for row in rows])


def meaning(rows):
    """What the rows of `text` say about SEED against its base, in one sentence."""
    found = {name: row["greedy"] for name, _, row in rows}

    def told(name, split):
        change, low, high = found[name][split]["f1_gain"]
        verb = f"gains {change:.1f}" if low > 0 else f"loses {-change:.1f}" if high < 0 else "neither gains nor loses"
        return f"{verb} on {split} questions [{low:+.1f}, {high:+.1f}]"

    said = ", ".join(told("SEED", split) for split in reversed(SPLITS))
    other, hard = "contrast, 1 draw", SPLITS[-1]
    beside = f"; the contrast that it learns from, at two, {told(other, hard)}" if other in found else ""
    return f"In F1 against its base, SEED, at one forward an answer, {said}{beside}."


def gain(entry):
    change, low, high = entry["f1_gain"]
    return f"{change:+.1f} [{low:+.1f}, {high:+.1f}]" if (change, low, high) != (0, 0, 0) else "0"


def readme():
    """The README's table of what SEED does, from results/seed.json."""
    found = json.loads(FILE.read_text())
    base = next(row for row in found["rows"] if row["system"] == "base")["pooled"]["greedy"]
    told = ", ".join(f"{split} {base[split]['f1']:.1f}" for split in SPLITS)
    where = f"{found['processor']}, `{FILE.relative_to(Path(__file__).parents[3])}`"
    lines = [
        f"{len(found['bases'])} bases, {len(found['sets'])} fresh question sets of {found['images']} images; F1 of the"
        f" bases, greedy: {told}. Change in F1 with its 95 % interval over images; {where}.",
        "",
        f"| | runs | forwards | {' | '.join(f'greedy, {split}' for split in SPLITS)} | sampled, adversarial |",
        "|" + " --- |" * (len(SPLITS) + 4),
    ]
    for row in found["rows"]:
        if any(words in row["system"] for words in LEFT_OUT):
            continue
        greedy, sampled = row["pooled"]["greedy"], row["pooled"]["sampled"]
        cells = [row["system"], str(row.get("runs", row["pooled"].get("runs", ""))), str(row["forwards"])]
        cells += [gain(greedy[split]) for split in SPLITS] + [gain(sampled["adversarial"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
