"""HKD4VLM on the picture world: a chain of models distilled into its smallest."""

import json
from pathlib import Path
from textwrap import fill

import torch

from hkd import study, table
from hkd.cells import Cells
from hkd.chains import CHAINS
from hkdfast.hf.progress import Progress
from world.results import RESULTS, machine
from world.tracks import TRACKS

WORK = {"S": 1, "M": 1.5, "L": 3}  # of an epoch, by the layers and the width of the language model


def add_arguments(parser):
    add = parser.add_argument
    add("--full", action="store_true", help="both tracks, every chain and system; cells are kept in results/hkd")
    add("--tracks", nargs="+", choices=TRACKS)
    add("--seeds", type=int, nargs="+", help="chains; default 1, with --full all")
    add("--systems", nargs="+", choices=study.SYSTEMS)
    add("--cells", action="store_true", help="stop before the tables: for several processes that share the work")
    add("--remake", action="store_true", help="make cells again whose settings have changed; otherwise an error")
    add("--tables", action="store_true", help="make no cell, only the tables of those that are there")
    add("--threads", type=int, default=1, help="default 1: on a model this small two threads wait for each other")
    add("--work", type=Path, default=Path("out/quality"), help="where finished stages and new cells are kept")


def make_cells(todo, work, cells, remake):
    """Make the answers of these (track, seed, system) that are not there, and the stages that they need."""
    todo = [each for each in todo if study.read_cell(cells, *each, remake) is None]
    stages = [(track, seed, each) for track, seed, name in todo for each in study.missing(track, seed, name, work)]
    stages = list(dict.fromkeys(stages))
    with Progress(parts(stages, todo)) as progress:
        for stage in stages:
            progress.begin(stage)
            if study.missing(*stage, work):  # another process may have run it since
                study.train(*stage, work, progress.at)
            progress.say(f"{progress.part} is done{progress.left()}")
        if todo:
            progress.begin("answers")
        for number, each in enumerate(todo, 1):
            study.make_cell(*each, work, cells, remake)
            progress.at(number / len(todo))


def parts(stages, todo):
    """The job for Progress. One unit of work is an epoch of the small model by itself."""
    found = {}
    for place, (track, seed, name) in enumerate(stages, 1):
        stage = study.STAGES[name]
        learns, asked = [stage.size, *(stage.live or ())[:1]], [size for size, _ in stage.teachers]
        passes = sum(WORK[size] for size in learns) + sum(WORK[size] for size in asked) / 3
        copies = (1 + stage.rewrites) * (1 + stage.unlabelled)
        title = f"stage {place} of {len(stages)}, {name} on {track}, chain {seed}"
        found[track, seed, name] = (title, study.epochs(track, stage) * passes * copies)
    return found | {"answers": ("answers", len(todo))}


def run(options):
    torch.set_num_threads(options.threads)
    known = sorted(int(folder.name.removeprefix("seed")) for folder in CHAINS.glob("seed*"))
    chains = options.seeds or (known if options.full else known[:1])
    if not set(chains) <= set(known):
        raise SystemExit(f"--seeds: {CHAINS} holds chains {known}, not {chains}; run.py chains trains more")
    tracks = options.tracks or (TRACKS if options.full else TRACKS[:1])
    systems = study.SYSTEMS if options.full else ["large", "small", "whole"]
    systems = options.systems or systems
    work = options.work / "hkd"
    # the answers of the whole study are small and committed; those of a first look are not
    folder = RESULTS / "hkd" if options.full else work / "quick"
    cells = Cells(folder, work / "cells" if options.full else folder / "cells")
    todo = [(track, seed, system) for system in systems for seed in chains for track in tracks]
    if not options.tables:
        make_cells(todo, work, cells, options.remake)
    if options.cells:
        return
    for track in tracks:
        study.gather(cells, track, chains)
    found = {track: table.report(cells, track, chains) for track in tracks}
    for track in tracks:
        print(f"\n{track}\n\n{table.text(found[track])}\n\n{fill(table.meaning(found[track], track), 100)}")
    file = table.FILE if options.full else work / "hkd.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(machine() | {"chains": chains} | table.settings() | {"tracks": found}, indent=1) + "\n")
    print(f"\n{file}")
