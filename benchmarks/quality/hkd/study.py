"""What HKD4VLM's reconstruction does to the smallest model of a chain, cell by cell.

A system is a model trained by one or more stages. Its cell is what that model answers to every question of the test
set; stages keep their weights, cells their answers, so a stopped study goes on where it was. `table.py` makes the
tables of it.
"""

import hashlib
import json
import re
from dataclasses import asdict, replace

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hkd.cells import plain
from hkd.chains import load, weights_file
from hkd.tune import BATCH, RETOUCH, SPLITS, TEACH, Reader, Stage, Track, epochs, examine, fit, rates
from world.tracks import REWRITE

FIRST, SECOND = 12, 30  # epochs of the small model's two stages of distillation
LONGER = 60  # of the second, with unlabelled questions beside the labelled ones, and as a control without
LARGE, MEDIUM = ("L", "large"), ("M", "medium")
AUGMENTED = {"rewrites": 1, "views": 16}


def distilled(pyramid, ternary, augmented):
    """The last stage of a system: which of the three parts of training it has.

    Returns:
        Stage. The small model has always learnt FIRST epochs in the stage before, from the chain or from the large
        model, and learns SECOND here, from two teachers or from one.
    """
    before = f"{'augmented ' * augmented}{'pyramid' if pyramid else 'first'}"
    medium = ("M", f"{before}/live") if pyramid else MEDIUM
    one = medium if pyramid else LARGE
    teachers = (LARGE, medium) if ternary else (one,)
    return Stage("S", SECOND, before, teachers=teachers, **(AUGMENTED if augmented else {}))


STAGES = {
    "large": Stage("L"),
    "small": Stage("S"),
    "augmented pyramid M": Stage("M", live=("L", None), **AUGMENTED),
    "augmented pyramid": Stage("S", FIRST, live=("M", "augmented pyramid M"), **AUGMENTED),
    "whole": distilled(1, 1, 1),
    "whole - ternary": distilled(1, 0, 1),
    "augmented first": Stage("S", FIRST, teachers=(LARGE,), **AUGMENTED),
    "whole - pyramid": distilled(0, 1, 1),
    "pyramid M": Stage("M", live=("L", None)),
    "pyramid": Stage("S", FIRST, live=("M", "pyramid M")),
    "whole - augmentation": distilled(1, 1, 0),
    "first": Stage("S", FIRST, teachers=(LARGE,)),
    "distilled": distilled(0, 0, 0),
    "+ augmentation": distilled(0, 0, 1),
    "+ pyramid": distilled(1, 0, 0),
    "+ ternary": distilled(0, 1, 0),
    "whole, longer": replace(distilled(1, 1, 1), epochs=LONGER),
    "whole + unlabelled": replace(distilled(1, 1, 1), epochs=LONGER, unlabelled=True),
    "medium": Stage("M"),
    "true first": Stage("S", FIRST, **AUGMENTED),
    "small, true rewrites": Stage("S", SECOND, "true first", **AUGMENTED),
    "small, no shuffle": Stage("S", shuffle=False),
}
RECORDED = {
    "RewriteStatement": "Reword",
    "RandomApply": "Sometimes",
    "divergence_weight": "weight",
    "min_scale": "least",
    "max_std": "most",
    r"(?<=Flip\()text": "words",
}
FIRSTS = ("augmented pyramid", "augmented first", "pyramid M", "pyramid", "first", "true first")  # only gone on from
SYSTEMS = [name for name in STAGES if name not in FIRSTS]  # in the order in which cells are made


def stage_file(work, track, seed, stage):
    return work / track / f"seed{seed}" / f"{plain(stage)}.safetensors"


def grounds(name):
    """The models that a stage begins with or learns from, as (size, stage or None)."""
    stage = STAGES[name]
    return [(stage.size, stage.start), *([stage.live] if stage.live else []), *stage.teachers]


def recipe(track, seed, name):
    """A digest of all that a stage came from: its settings, those before it, and the pretrained weights."""
    stage = replace(STAGES[name], epochs=epochs(track, STAGES[name]))
    given = asdict(stage)
    more = [SPLITS["unlabelled"]] * given.pop("unlabelled")
    told = [track, seed, given, SPLITS["train"], BATCH, rates(track, stage), TEACH]
    told += [repr(REWRITE)] * bool(stage.rewrites) + [repr(RETOUCH)] * (stage.views > 1) + more
    for size, before in grounds(name):
        told.append(
            recipe(track, seed, before.removesuffix("/live"))
            if before
            else hashlib.blake2b(weights_file(seed, size).read_bytes()).hexdigest()
        )
    return hashlib.blake2b(as_recorded(json.dumps(told)).encode(), digest_size=12).hexdigest()


def as_recorded(text):
    """The text of a recipe with the names that hkdfast 0.1 had, under which the committed results were made."""
    for now, then in RECORDED.items():
        text = re.sub(rf"\b{now}\b", then, text)
    return text


def tuned(track, seed, size, stage, work):
    """A model of a chain as a stage left it, which is run if it has not been; None: the pretrained model."""
    model, tokenizer = load(seed, size)
    if stage is not None:
        file, name = stage_file(work, track, seed, stage), stage.removesuffix("/live")
        if not kept(file, recipe(track, seed, name)):
            train(track, seed, name, work)
        model.load_state_dict(load_file(file), strict=False)
    return model, tokenizer


def kept(file, digest):
    """Whether a stage's weights are there and of the recipe that is asked for."""
    if not file.exists():
        return False
    with safe_open(file, "pt") as found:
        return (found.metadata() or {}).get("recipe") == digest


def missing(track, seed, name, work):
    """The stages that have to be run for a stage, itself the last, in their order; none if its weights are kept."""
    if kept(stage_file(work, track, seed, name), recipe(track, seed, name)):
        return []
    before = [stage.removesuffix("/live") for _, stage in grounds(name) if stage]
    return list(dict.fromkeys([*(each for one in before for each in missing(track, seed, one, work)), name]))


def train(track, seed, name, work, step=None):
    """Run a stage, and those it builds on, and keep its weights; `step` as in `fit`."""
    stage = STAGES[name]
    student, tokenizer = tuned(track, seed, stage.size, stage.start, work)
    live = tuned(track, seed, *stage.live, work)[0] if stage.live else None
    teachers = [tuned(track, seed, *teacher, work)[0] for teacher in stage.teachers]
    reader = Reader(tokenizer, Track(track, "train", stage.views))
    unlabelled = Track(track, "unlabelled") if stage.unlabelled else None
    fit(stage, student, teachers, reader, seed, live=live, unlabelled=unlabelled, step=step)
    for model, ending in ((live, "/live"), (student, "")):  # the student last: it says that the stage is done
        if model is not None:
            keep(model, stage_file(work, track, seed, name + ending), recipe(track, seed, name))


def keep(model, file, digest):
    """Write what tuning changes, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    tuned = {name: weight for name, weight in model.state_dict().items() if "vision_tower" not in name}
    save_file(tuned, draft, {"recipe": digest})
    draft.replace(file)


def read_cell(cells, track, seed, system, remake=False):
    """(layouts, 2, questions) int8 of a system, or None if its cell is not there; the rest as in `Cells.read`."""
    return cells.read(track, seed, system, cell_recipe(track, seed, system), remake)


def cell_recipe(track, seed, system):
    return f"{recipe(track, seed, system)} on {SPLITS['test']}"


def make_cell(track, seed, system, work, cells, remake=False):
    """Make the cell of a system, unless it is there."""
    if read_cell(cells, track, seed, system, remake) is not None:
        return
    model, tokenizer = tuned(track, seed, STAGES[system].size, system, work)
    found = examine(model, Reader(tokenizer, Track(track, "test")))
    cells.write(track, seed, system, cell_recipe(track, seed, system), found)


def gather(cells, track, seeds):
    """Take the new cells of this study into the track's file."""
    cells.gather(track, {(seed, system): cell_recipe(track, seed, system) for seed in seeds for system in SYSTEMS})
