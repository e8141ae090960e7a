"""HKD4VLM on the picture world: a chain of models distilled into its smallest."""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from hkd import study, table
from hkd.cells import Cells
from hkd.chains import CHAINS
from world.results import RESULTS, machine
from world.tracks import TRACKS


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
    for track, seed, system in tqdm(todo if not options.tables else (), "cells"):
        study.make_cell(track, seed, system, work, cells, options.remake)
    if options.cells:
        return
    for track in tracks:
        study.gather(cells, track, chains)
    found = {track: table.report(cells, track, chains) for track in tracks}
    for track in tracks:
        print(f"\n{track}\n\n{table.markdown(found[track])}")
    file = table.FILE if options.full else work / "hkd.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(machine() | {"chains": chains} | table.settings() | {"tracks": found}, indent=1) + "\n")
    print(f"\n{file}")
