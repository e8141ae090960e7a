"""Where the answers of systems are kept: one file per track, and one per new cell until they are gathered."""

import numpy as np


class Cells:
    """Answers by track, seed of the chain and system, each with the recipe that it was made by.

    Args:
        folder: where each track has its file, TRACK.npz.
        fresh: where new cells have a file each, so that several processes can share the work.
    """

    def __init__(self, folder, fresh):
        self.folder, self.fresh = folder, fresh

    def read(self, track, seed, system, recipe, remake=False):
        """The (layouts, 2, questions) int8 answers of a system, or None if there are none by this recipe.

        Raises:
            ValueError: if there are some by another recipe, unless those are to be made again.
        """
        name, other = f"{seed}/{system}", None
        for file in (self.fresh_file(track, seed, system), self.track_file(track)):
            if file.exists():
                with np.load(file) as found:
                    if f"{name}/answers" in found:
                        if str(found[f"{name}/recipe"]) == recipe:
                            return found[f"{name}/answers"]
                        other = other or file
        if other and not remake:
            raise ValueError(
                f"{other} holds answers of {system!r}, seed {seed}, made by other settings or from another chain than "
                "this study's; run.py hkd --remake makes them again"
            )
        return None

    def write(self, track, seed, system, recipe, answers):
        """Keep a new cell, whole or not at all."""
        name = f"{seed}/{system}"
        write(self.fresh_file(track, seed, system), {f"{name}/answers": answers, f"{name}/recipe": np.array(recipe)})

    def gather(self, track, recipes):
        """Take new cells into the track's file.

        Args:
            recipes: {(seed, system): recipe} of the cells to take; those by another recipe are left.
        """
        file, kept, changed = self.track_file(track), {}, False
        if file.exists():
            with np.load(file) as found:
                kept = dict(found)
        for (seed, system), recipe in recipes.items():
            name = f"{seed}/{system}"
            if name + "/recipe" in kept and str(kept[f"{name}/recipe"]) == recipe:
                continue
            answers = self.read(track, seed, system, recipe, remake=True)
            if answers is not None:
                kept |= {f"{name}/answers": answers, f"{name}/recipe": np.array(recipe)}
                changed = True
        if changed:
            write(file, dict(sorted(kept.items())))

    def track_file(self, track):
        return self.folder / f"{track}.npz"

    def fresh_file(self, track, seed, system):
        return self.fresh / track / f"seed{seed}" / f"{plain(system)}.npz"


def write(file, arrays):
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft.npz")
    np.savez_compressed(draft, **arrays)
    draft.replace(file)


def plain(name):
    """The name of a stage or system as a file's."""
    for sign, word in ((" - ", "_without_"), ("+ ", "with_"), ("/", "-"), (",", ""), (" ", "_")):
        name = name.replace(sign, word)
    return name
