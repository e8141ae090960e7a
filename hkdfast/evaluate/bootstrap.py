"""Confidence intervals for the difference between two systems: paired bootstrap over images."""

from dataclasses import asdict, dataclass

import torch

from .pope import METRICS, confusion, metrics

BLOCK = 2**24  # values in one block of resamples: 128 MiB of float64


@dataclass(frozen=True)
class Interval:
    """A difference of one metric, ours minus theirs, with the bootstrap's percentile interval."""

    difference: float
    low: float
    high: float
    level: float
    resamples: int
    images: int  # clusters
    pairs: int  # question sets x bases x seeds x draws

    def __str__(self):
        return f"{100 * self.difference:+.2f} [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"

    as_dict = asdict


def paired(ours, theirs, metric="f1", *, level=0.95, resamples=10_000, seed=0):
    """Interval of the mean difference in a metric between two systems that answered the same questions.

    Images are drawn with replacement, each with all its questions, because questions on one image are not independent.
    Both systems, all seeds and all draws are evaluated on the same drawn images. The metric is computed for each pair,
    then averaged over the pairs with equal weight, as in a table of means over seeds. Only images are resampled: the
    interval holds for these bases and seeds, on other images of the same kind.

    Args:
        ours, theirs: lists of `pope.Graded`, pair by pair on the same questions: one per question set, base, seed and
            draw, in any order. An image is one cluster wherever its name occurs (see `source` of `pope.grade`). Pairs
            that share no image are drawn separately, so each question set keeps its number of images.
        metric: one of pope.METRICS.
        level: coverage of the interval, 0 < level < 1.
        resamples: number of bootstrap draws.
        seed: of the draws. The same seed gives the same draws for every metric.

    Raises:
        ValueError: an unknown metric, lists that are not pairs on the same questions, a level or a number of resamples
            out of range.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}, expected one of {', '.join(METRICS)}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected 0 < level < 1")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected at least 1")
    counts, strata = table(ours, theirs)

    def difference(total):  # (..., pairs, 2, 4) -> (...)
        per_system = metrics(total)[metric]
        return (per_system[..., 0] - per_system[..., 1]).mean(-1)

    flat = counts.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    found = []
    block = max(1, BLOCK // len(flat))
    for start in range(0, resamples, block):
        times = draw(strata, min(block, resamples - start), generator)
        found.append(difference((times @ flat).unflatten(1, counts.shape[1:])))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(found).quantile(tails).tolist()
    return Interval(difference(counts.sum(0)).item(), low, high, level, resamples, len(flat), len(ours))


def table(ours, theirs):
    """((images, pairs, 2, 4) confusion counts of each image, sizes of the strata into which the images are divided)."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} graded sets against {len(theirs)}, expected as many on both sides, at least one")
    for number, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        if mine.images != yours.images or not torch.equal(mine.label, yours.label):
            raise ValueError(f"pair {number} is not on the same questions: images or labels differ")
    # pairs that share an image belong to one stratum, which is the union of their images
    strata = []
    for graded in ours:
        names = dict.fromkeys(graded.images)
        apart = []
        for other in strata:
            if names.keys().isdisjoint(other):
                apart.append(other)
            else:
                names = other | names
        strata = [*apart, names]
    row = {name: index for index, name in enumerate(name for names in strata for name in names)}
    counts = torch.zeros(len(row), len(ours), 2, 4, dtype=torch.float64)
    for pair, sides in enumerate(zip(ours, theirs, strict=True)):
        rows = torch.tensor([row[name] for name in sides[0].images])
        for side, graded in enumerate(sides):
            counts[:, pair, side].index_add_(0, rows, confusion(graded))
    return counts, [len(names) for names in strata]


def draw(strata, resamples, generator):
    """(resamples, images) float64: how often each image is drawn. A stratum of n images gets n draws."""
    times = torch.zeros(resamples, sum(strata), dtype=torch.float64)
    start = 0
    for size in strata:
        picks = torch.randint(start, start + size, (resamples, size), generator=generator)
        times.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
        start += size
    return times
