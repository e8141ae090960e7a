"""The README's table of what SEED does, from results/seed.json, which `run.py seed --full` writes."""

import json
from pathlib import Path

from questions import SPLITS

LEFT_OUT = ("base", "no plausibility", "blind prompts", "8 draws", "two rounds against", "yes-rate of SEED, two")
FILE = Path(__file__).parent / "results" / "seed.json"


def gain(entry):
    change, low, high = entry["f1_gain"]
    return f"{change:+.1f} [{low:+.1f}, {high:+.1f}]" if (change, low, high) != (0, 0, 0) else "0"


def readme():
    found = json.loads(FILE.read_text())
    base = next(row for row in found["rows"] if row["system"] == "base")["pooled"]["greedy"]
    told = ", ".join(f"{split} {base[split]['f1']:.1f}" for split in SPLITS)
    where = f"{found['processor']}, `{FILE.relative_to(Path(__file__).parents[2])}`"
    lines = [
        f"{len(found['bases'])} bases, {len(found['sets'])} fresh question sets of {found['images']} images; F1 of the"
        f" bases, greedy: {told}. Change in F1 with its 95 % interval over images; {where}.",
        "",
        f"| | runs | forwards | {' | '.join(f'greedy, {split}' for split in SPLITS)} | sampled, adversarial |",
        "|" + " --- |" * (len(SPLITS) + 4),
    ]
    for row in found["rows"]:
        if any(words in row["system"] for words in LEFT_OUT):  # of one screen; results/seed.json has them
            continue
        greedy, sampled = row["pooled"]["greedy"], row["pooled"]["sampled"]
        cells = [row["system"], str(row.get("runs", row["pooled"].get("runs", ""))), str(row["forwards"])]
        cells += [gain(greedy[split]) for split in SPLITS] + [gain(sampled["adversarial"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
