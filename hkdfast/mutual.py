"""Models that learn from each other on one batch: the common part of the pyramid and the ternary refinement.

A model is any function of a batch that returns logits (N, V) or a `Head` at the batch's answer rows, in the order of
`hkdfast.batch.answer_rows`. Rows that a batch marks "distill_only" have no label: there the models learn from each
other only, without cross entropy.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .batch import IGNORE_INDEX, Batch, Model, answer_rows
from .engine.arguments import check_word
from .losses import Edge, Metrics, coupled_loss
from .ops.objective import UNLABELED

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .engine.options import BatchKeywords

Coupling: TypeAlias = list[list[Edge | None]]  # [i][j] says how model i learns from model j
REDUCTIONS = ("mean", "sum")  # the loss of several models is one number


def per_model(name: str, value: float | Sequence[float], names: Sequence[str]) -> list[float]:
    """One float for each of `names`: `value` repeated if it is one number, else its entries.

    Raises:
        ValueError: if there are more or fewer entries than names, or one is negative or not finite.
    """
    found = [value] * len(names) if isinstance(value, (int, float)) else list(value)
    if len(found) != len(names):
        raise ValueError(f"{name} must be one number or {len(names)} ({', '.join(names)}), got {value!r}")
    for one, number in zip(names, found, strict=True):
        if not (isinstance(number, (int, float)) and 0 <= number < math.inf):
            raise ValueError(f"{name} must be finite and not negative, got {number!r} for {one}")
    return [float(number) for number in found]


def coupling_table(size: int, edges: Mapping[tuple[int, int], Edge]) -> Coupling:
    """The coupling table (size x size) of {(student, teacher): Edge}: None elsewhere and for edges of weight 0."""
    return [[edges[i, j] if (i, j) in edges and edges[i, j].weight else None for j in range(size)] for i in range(size)]


def trained_models(coupling: Coupling, hard_weight: Sequence[float]) -> list[bool]:
    """For each row of the coupling table, whether its model gets a gradient."""
    size = range(len(coupling))
    taught = [bool(hard_weight[i]) or any(coupling[i]) for i in size]
    pulled = [any(edge and not edge.detach for edge in column) for column in zip(*coupling, strict=True)]
    return [a or b for a, b in zip(taught, pulled, strict=True)]


def coupled_batch_loss(
    models: Sequence[Model],
    batch: Batch,
    coupling: Coupling,
    hard_weight: Sequence[float],
    *,
    roles: Sequence[str],
    slots: Sequence[int] | None = None,
    unlabeled_weight: float = 1.0,
    **options: "Unpack[BatchKeywords]",
) -> tuple[Tensor, Metrics]:
    """The loss of models coupled on one batch. Models that do not learn run without gradients.

    Args:
        models: functions of a batch, as described above. Each that learns or teaches is run once.
        batch: dict of tensors.
        coupling: table of Edge or None; [i][j] says how slot i learns from slot j, as in `hkdfast.coupled_loss`.
        hard_weight: one number per slot: weight of its cross entropy at the labeled rows.
        roles: one name per model, for the metrics.
        slots: the index of the model for each slot (row) of the table; None: slot i is model i.
        unlabeled_weight: factor of the loss of "distill_only" rows.
        options: of `coupled_loss`, except labels, ignore_index, row_weight and return_metrics.

    Returns:
        scalar loss, a mean over all answer rows unless options say otherwise, and {name: (n,) float tensor}
        without gradient: for each model that learns, ROLE_cross_entropy (of labeled rows, if there are any),
        ROLE_entropy, ROLE_divergence and ROLE_agreement. If it learns from several teachers, the suffix _TEACHER (or
        _DIVERGENCE, if they are one model) follows.

    Raises:
        ValueError: if unlabeled_weight is negative, labels are needed and missing, or `coupled_loss` refuses.
    """
    check_word("reduction", options.get("reduction", "mean"), REDUCTIONS)
    (unlabeled_weight,) = per_model("unlabeled_weight", unlabeled_weight, ("rows without a label",))
    labels = answer_rows(batch)[1]
    if labels is None and any(hard_weight):
        raise ValueError(f"hard_weight {hard_weight} needs labels in the batch, which has {', '.join(batch)}")
    slots = range(len(models)) if slots is None else slots
    used = [i for i in range(len(coupling)) if hard_weight[i] or any(coupling[i]) or any(row[i] for row in coupling)]
    if not used:
        raise ValueError("nothing to train: every weight of the coupling is 0, and hard_weight is 0")
    trained = {slots[i] for i, is_trained in enumerate(trained_models(coupling, hard_weight)) if is_trained}
    found = {}
    for i in dict.fromkeys(slots[slot] for slot in used):
        with nullcontext() if i in trained else torch.no_grad():
            found[i] = models[i](batch)

    known = weight = None
    if batch.get("distill_only") is not None and labels is not None:  # answer_rows has marked these rows UNLABELED
        known = (labels != UNLABELED).nonzero()[:, 0]
        if unlabeled_weight != 1:
            weight = torch.full_like(labels, unlabeled_weight, dtype=torch.float64).index_fill(0, known, 1.0)
        if not any(map(any, coupling)) and len(known) < len(labels):
            raise ValueError("nothing to train at rows without a label: every weight of the coupling is 0")
    loss, metrics = coupled_loss(
        [found[slots[i]] for i in used],  # one object for a model in two slots, whose products are computed once
        [[coupling[i][j] for j in used] for i in used],
        labels=labels,
        ignore_index=IGNORE_INDEX,
        hard_weight=[hard_weight[i] for i in used],
        row_weight=weight,
        return_metrics=True,
        **options,
    )
    names = [roles[slot] for slot in slots]
    return loss, metric_names(
        {(used[i], used[j]): rows for (i, j), rows in metrics.items()}, coupling, names, labels, known
    )


def metric_names(
    metrics: Mapping[tuple[int, int], Metrics],
    coupling: Coupling,
    names: Sequence[str],
    labels: Tensor | None,
    known: Tensor | None,
) -> Metrics:
    """The metrics of coupled_loss, by the models' names; known: indices of the labeled rows, None for all."""
    found = {}
    for (i, j), rows in metrics.items():
        cross = f"{names[i]}_cross_entropy"
        if labels is not None and cross not in found and (known is None or len(known)):
            found[cross] = rows["cross_entropy"] if known is None else rows["cross_entropy"][known]
        found.setdefault(f"{names[i]}_entropy", rows["student_entropy"])
        if i != j:
            sources = {k: edge for k, edge in enumerate(coupling[i]) if edge}
            ending = "" if len(sources) == 1 else f"_{names[j]}"
            if len({names[k] for k in sources}) < len(sources):
                ending = f"_{sources[j].divergence}"
            found |= {f"{names[i]}_{name}{ending}": rows[name] for name in ("divergence", "agreement")}
    return found
