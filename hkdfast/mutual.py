"""Models that learn from each other on one batch: what the pyramid and the ternary refinement have in common.

A model is any function of a batch that returns logits (N, V) or a `Head` at the batch's answer rows, in the order of
`hkdfast.batch.answer_rows`. Rows that a batch marks "distill_only" have no label: the models learn from each other there,
never by cross entropy.
"""

import math
from contextlib import nullcontext

import torch

from .batch import IGNORE_INDEX, answer_rows
from .engine.arguments import check_word
from .losses import coupled_loss
from .ops.objective import UNLABELED

REDUCTIONS = ("mean", "sum")  # the loss of several models is one number


def numbers(name, value, places):
    """One number for each of the named places: `value`, if it is one number, or its numbers.

    Raises:
        ValueError: if there are more or fewer numbers than places, or one is negative or not finite.
    """
    found = [value] * len(places) if isinstance(value, (int, float)) else list(value)
    if len(found) != len(places):
        raise ValueError(f"{name} must be one number or {len(places)} ({', '.join(places)}), got {value!r}")
    for place, number in zip(places, found, strict=True):
        if not (isinstance(number, (int, float)) and 0 <= number < math.inf):
            raise ValueError(f"{name} must be finite and not negative, got {number!r} for {place}")
    return [float(number) for number in found]


def table(size, edges):
    """A coupling table: None but for {(learner, source): Edge}, where an edge of weight 0 is None too."""
    return [[edges[i, j] if (i, j) in edges and edges[i, j].weight else None for j in range(size)] for i in range(size)]


def learners(coupling, hard_weight):
    """For each place, whether its model gets a gradient."""
    size = range(len(coupling))
    taught = [bool(hard_weight[i]) or any(coupling[i]) for i in size]
    return [taught[i] or any(coupling[j][i] and not coupling[j][i].detach for j in size) for i in size]


def learn(models, batch, coupling, hard_weight, *, roles, places=None, unlabeled_weight=1.0, **options):
    """The loss of models coupled on one batch. Models that learn nothing are run without gradients.

    Args:
        models: functions of a batch, see the head of this module. Each is run once, if it learns or teaches.
        batch: dict of tensors.
        coupling: table of Edge or None, [i][j]: how place i learns from place j; see `hkdfast.coupled_loss`.
        hard_weight: one number per place: times its cross entropy at the labeled rows.
        roles: one name per model, for the metrics.
        places: index of the model that stands at each place of the table; None: place i is model i.
        unlabeled_weight: times the loss of the rows that are "distill_only".
        options: of `coupled_loss`; not labels, ignore_index, weight or metrics.

    Returns:
        scalar loss, a mean over all answer rows unless options say otherwise, and {name: (n,) float tensor}, no
        gradient: for each model that learns, ROLE_cross_entropy (of labeled rows, if there are any), ROLE_entropy,
        ROLE_divergence and ROLE_agreement; where it learns from several, _SOURCE (or _DIVERGENCE, if they are one
        model) follows.

    Raises:
        ValueError: if unlabeled_weight is negative, labels are needed and missing, or `coupled_loss` refuses.
    """
    check_word("reduction", options.get("reduction", "mean"), REDUCTIONS)
    (unlabeled_weight,) = numbers("unlabeled_weight", unlabeled_weight, ("rows without a label",))
    labels = answer_rows(batch)[1]
    if labels is None and any(hard_weight):
        raise ValueError(f"hard_weight {hard_weight} needs labels in the batch, which has {', '.join(batch)}")
    places = range(len(models)) if places is None else places
    used = [i for i in range(len(coupling)) if hard_weight[i] or any(coupling[i]) or any(row[i] for row in coupling)]
    if not used:
        raise ValueError("nothing to learn: every weight of the coupling is 0, and hard_weight is 0")
    live = {places[i] for i, learns in enumerate(learners(coupling, hard_weight)) if learns}
    found = {}
    for i in dict.fromkeys(places[place] for place in used):
        with nullcontext() if i in live else torch.no_grad():
            found[i] = models[i](batch)

    known = weight = None
    if batch.get("distill_only") is not None:
        known = (labels != UNLABELED).nonzero()[:, 0]
        if unlabeled_weight != 1:
            weight = torch.full_like(labels, unlabeled_weight, dtype=torch.float64).index_fill(0, known, 1.0)
        if not any(map(any, coupling)) and len(known) < len(labels):
            raise ValueError("nothing to learn for rows without a label: every weight of the coupling is 0")
    loss, metrics = coupled_loss(
        [found[places[i]] for i in used],  # one object for a model in two places, which is multiplied once
        [[coupling[i][j] for j in used] for i in used],
        labels=labels,
        ignore_index=IGNORE_INDEX,
        hard_weight=[hard_weight[i] for i in used],
        row_weight=weight,
        return_metrics=True,
        **options,
    )
    names = [roles[place] for place in places]
    return loss, named({(used[i], used[j]): rows for (i, j), rows in metrics.items()}, coupling, names, labels, known)


def named(metrics, coupling, names, labels, known):
    """coupled_loss's metrics of edges, by the names of the models; known: indices of labeled rows, None for all."""
    found = {}
    for (i, j), rows in metrics.items():
        cross = f"{names[i]}_cross_entropy"
        if labels is not None and cross not in found and (known is None or len(known)):
            found[cross] = rows["cross_entropy"] if known is None else rows["cross_entropy"][known]
        found.setdefault(f"{names[i]}_entropy", rows["student_entropy"])
        if i != j:
            sources = [k for k, edge in enumerate(coupling[i]) if edge]
            ending = "" if len(sources) == 1 else f"_{names[j]}"
            if len({names[k] for k in sources}) < len(sources):
                ending = f"_{coupling[i][j].divergence}"
            found |= {f"{names[i]}_{name}{ending}": rows[name] for name in ("divergence", "agreement")}
    return found
