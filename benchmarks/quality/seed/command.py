"""SEED on the picture world: self-evolving distillation against hallucination."""

import json
from pathlib import Path
from textwrap import fill

import numpy as np
import torch

import hkdfast
from hkdfast.hf.progress import Progress
from hkdfast.hf.rounds import folders
from seed import study
from seed.bases import BASES
from seed.table import RESAMPLES, compare, equal_yes_rate, meaning, read_cell, shifted, text, tuned_shift
from world.questions import SPLITS
from world.results import RESULTS, machine
from world.tinyllava import question

SEEDS = (1, 2, 3)


def picture(exam, before, after, noisy, file, count=6):
    """Draw the first adversarial questions whose answer changed, for better or worse, above the noised view."""
    from matplotlib import pyplot

    at = SPLITS.index("adversarial")
    changed = (before[exam.seed][at].argmax(-1) != after[exam.seed][at].argmax(-1)).nonzero()[0][:count]
    figure, axes = pyplot.subplots(2, count, figsize=(2.4 * count, 5.6))
    for axis in axes.flat:
        axis.axis("off")
    for (top, bottom), row in zip(axes.T, changed, strict=False):
        image, index, there = exam.splits["adversarial"][row]
        p = [np.exp(cell[exam.seed][at][row, 0]) for cell in (before, after)]
        words = [("yes", "no", "?")[cell[exam.seed][at][row].argmax()] for cell in (before, after)]
        truth = "yes" if there else "no"
        top.imshow(exam.images[image])
        top.set_title(
            f"{question(index)}\n{words[0]} -> {words[1]}, truth: {truth}\np(yes) {p[0]:.2f} -> {p[1]:.2f}", fontsize=9
        )
        bottom.imshow(((noisy[image].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy())
        bottom.set_title("what the noised branch sees", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def report(bases, seeds, exams, tuning, work, systems):
    """Rows of every system whose cells are all there: [(name, forwards, {"pooled": row, base: row, ...})]."""
    cells = {base: read_cell(study.cell_file(work, base, "base")) for base in bases}
    sets = [exam.seed for exam in exams]

    def only(cell, names):
        return {name: cell[name] for name in names}

    def entry(name, forwards, ours, against=None):
        # ours: {(base, seed): cell}; each is compared with its own base unless told otherwise
        theirs = against or {key: cells[key[0]] for key in ours}
        ours, theirs = ({key: only(cell, sets) for key, cell in side.items()} for side in (ours, theirs))
        row = {"runs": len(ours), "pooled": compare(list(ours.values()), [theirs[key] for key in ours], exams)}
        for base in bases if len(bases) > 1 else ():
            keys = [key for key in ours if key[0] == base]
            row[base] = compare([ours[key] for key in keys], [theirs[key] for key in keys], exams, ["greedy"])
        return name, forwards, row

    rows = []
    for name, (forwards, _) in study.DECODED.items():
        if name in systems:
            files = {(base, None): study.cell_file(work, base, name) for base in bases}
            rows.append(entry(name, forwards, {key: read_cell(file) for key, file in files.items()}))
    shifts = {base: tuned_shift(only(cells[base], [tuning.seed]), [tuning]) for base in bases}
    told = ", ".join(f"{shift:.1f}" for shift in shifts.values())
    moved = {(base, None): shifted(cells[base], shift) for base, shift in shifts.items()}
    rows.append(entry(f"shift of yes by {told}, tuned with labels", 1, moved))
    for name in study.ALL:
        files = {(base, seed): study.cell_file(work, base, name, seed) for base in bases for seed in seeds}
        # a seed counts once every base has it, so that all bases weigh the same
        done = [seed for seed in seeds if all(files[base, seed].exists() for base in bases)]
        if name not in systems or not done:
            continue
        ours = {key: read_cell(file) for key, file in files.items() if key[1] in done}
        rows.append(entry(name, 1, ours))
        if name.startswith("SEED"):
            matched = {}
            for key, cell in ours.items():
                base = only(cells[key[0]], sets)
                matched[key] = shifted(base, equal_yes_rate(base, only(cell, sets)))
            rows.append(entry(f"shift of yes to the yes-rate of {name}", 1, matched))
            rows.append(entry(f"{name} against that shift", 1, ours, matched))
    return rows


def cells(options, bases, seeds, systems, work):
    """What is still to be made: ([(base, system that decodes)], [(base, system that is trained, seed, rounds)])."""
    decoded = [(base, system) for system in study.DECODED for base in bases if system in systems]
    # the first seed of every system on every base, then more seeds of the one that matters
    runs = [(base, name, seeds[0]) for name in study.TRAINED if name in systems for base in bases]
    runs += [(base, "SEED", number) for number in seeds[1:] for base in bases]
    twice = study.TWICE if options.full else ()
    trained = [(base, name, number, 2 if name in twice and number == seeds[0] else 1) for base, name, number in runs]
    return (
        [each for each in decoded if not study.cell_file(work, *each).exists()],
        [run for run in trained if not all(file.exists() for file in study.round_files(*run[:3], work, run[3]))],
    )


def parts(decoded, trained, sets):
    """The job for Progress. One unit of work is a forward of every question of a set, which takes some seconds."""
    found = {"sets": ("drawing the questions", sets / 4)}
    for base, system in decoded:
        forwards = study.DECODED[system][0]
        found[base, system] = (f"{system} on {base}", forwards * sets)
    for base, name, number, rounds in trained:
        steps = (study.RECIPE | study.TRAINED[name])["max_steps"]
        for place, folder in enumerate(folders(study.trainer_folder(base, name, number), rounds), 1):
            which = f"{name} on {base}, seed {number}, round {place} of {rounds}"
            # measured: four steps take as long as a forward of a set, drawing the prompts as long as five
            found[folder] = (which, 5 * (place == 1) + steps / 4 + sets)
    return found | {"tables": ("tables", sets)}


def make_cells(decoded, trained, exams, tuning, work, device, progress):
    for base, system in decoded:
        progress.begin((base, system))
        study.decode(base, system, [*exams, tuning], work, device)
        progress.say(f"{progress.part} is done")
    for base, name, number, rounds in trained:
        progress.begin(folders(study.trainer_folder(base, name, number), rounds)[0])
        study.distill(base, name, number, exams, work, device, rounds, [progress])


def add_arguments(parser):
    add = parser.add_argument
    add("--full", action="store_true", help="every base, system and seed")
    add("--bases", nargs="+", help="folders of bases/; default seed1, with --full all")
    add("--seeds", type=int, nargs="+", help="default 1, with --full 1 2 3: the first for every system, all for SEED")
    add("--cells", action="store_true", help="stop before the tables: for several processes that share the work")
    add("--tables", action="store_true", help="make no cell, only the tables of those that are there")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=1, help="default 1: on a model this small two threads wait for each other")
    add("--work", type=Path, default=Path("out/quality"), help="where finished cells are kept")


def run(options):
    torch.set_num_threads(options.threads)
    bases = options.bases or (sorted(folder.name for folder in BASES.iterdir()) if options.full else ["seed1"])
    seeds = options.seeds or (SEEDS if options.full else SEEDS[:1])
    systems = [*study.DECODED, *study.ALL] if options.full else ["base", "contrast, 1 draw", "SEED"]
    work = options.work / ("full" if options.full else "quick")
    fresh = study.FRESH if options.full else study.FRESH[:1]
    decoded, trained = ([], []) if options.tables else cells(options, bases, seeds, systems, work)
    with Progress(parts(decoded, trained, len(fresh) + 1)) as progress:
        progress.begin("sets")
        exams = [study.Exam(number, device=options.device) for number in fresh]
        tuning = study.Exam(study.TUNING, device=options.device)
        make_cells(decoded, trained, exams, tuning, work, options.device, progress)
        if options.cells:
            return
        progress.begin("tables")
        rows = report(bases, seeds, exams, tuning, work, systems)
    pooled = [(name, forwards, row["pooled"]) for name, forwards, row in rows]
    print("", text(pooled, "greedy"), text(pooled, "sampled"), fill(meaning(pooled), 100), sep="\n\n")
    before, after = (read_cell(study.cell_file(work, bases[0], *key)) for key in (("base",), ("SEED", seeds[0])))
    generator = torch.Generator(options.device).manual_seed(0)
    noisy = hkdfast.diffuse(exams[0].pixels, sigma=study.SIGMA, generator=generator).cpu()
    picture(exams[0], before, after, noisy, work / "seed.png")
    about = machine(options.device) | {
        "bases": bases,
        "seeds": seeds,
        "sets": fresh,
        "images": study.IMAGES,
        "resamples": RESAMPLES,
    }
    found = [{"system": name, "forwards": forwards, **row} for name, forwards, row in rows]
    file = RESULTS / "seed.json" if options.full else work / "seed.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about | {"rows": found}, indent=1) + "\n")
    print(f"\n{file}\n{work / 'seed.png'}")
