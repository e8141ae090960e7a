"""One stage of pyramid-like progressive online distillation: reconstruction of HKD4VLM (arXiv:2506.13038).

    for k in range(len(chain) - 1):                        # from the largest model to the smallest
        for batch in data:
            loss, metrics = pyramid.loss((chain[k], chain[k + 1]), batch)

Only the abstract describes the method. What it leaves open is an option, and the default is the likeliest choice: the
teacher of a stage learns by its own cross entropy while the student learns from it on the same batch.
A model is any function of a batch that returns logits or a `Head` at the batch's answer rows: see `hkdfast.seed`.
`hkdfast.hf.PyramidTrainer` runs the whole chain.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .batch import Batch, Model
from .engine.arguments import check_word
from .engine.renamed import COUPLED, refuses
from .losses import Edge, Metrics
from .mutual import Coupling, coupled_batch_loss, coupling_table, per_model

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .engine.options import BatchKeywords

__all__ = ["MODES", "coupling", "loss"]

MODES = ("concurrent", "mutual", "frozen")
ROLES = ("teacher", "student")


@refuses(COUPLED)
def coupling(
    mode: str = "concurrent",
    divergence_weight: float | Sequence[float] = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    hard_weight: float | Sequence[float] = (1.0, 1.0),
    *,
    detach: bool = True,
) -> tuple[Coupling, list[float]]:
    """How teacher and student of one stage learn, for `hkdfast.coupled_loss`.

    Args:
        mode: "concurrent": the teacher learns by its own cross entropy, the student by cross entropy and from the
            teacher. "mutual": both also learn from each other (deep mutual learning). "frozen": the teacher is not
            trained, and its hard_weight is ignored.
        divergence_weight: weight of the divergence, not negative; in mutual mode one number for both, or (teacher's,
            student's).
        divergence, beta: of each model from the model that it learns from, as in `distill_loss`.
        hard_weight: weight of the cross entropies: one number for both, or (teacher's, student's).
        detach: whether only the model that learns gets the gradient of a divergence. False: both models get it.

    Returns:
        2 x 2 table of Edge and None, the teacher first, and the two hard weights.

    Raises:
        ValueError: on an unknown mode, negative or too many weights, a frozen teacher with detach=False.

    Sources: reconstruction of HKD4VLM (arXiv:2506.13038); mutual: Zhang et al., 2018 (arXiv:1706.00384).
    """
    check_word("mode", mode, MODES)
    if mode == "frozen" and not detach:
        raise ValueError("detach=False gives the teacher a gradient, which mode 'frozen' forbids")
    up, down = (
        per_model("divergence_weight", divergence_weight, ROLES)
        if mode == "mutual"
        else (0.0, *per_model("divergence_weight", divergence_weight, ROLES[1:]))
    )
    teacher, student = per_model("hard_weight", hard_weight, ROLES)
    edges = {(0, 1): Edge(up, divergence, beta, detach), (1, 0): Edge(down, divergence, beta, detach)}
    return coupling_table(2, edges), [0.0 if mode == "frozen" else teacher, student]


@refuses(COUPLED)
def loss(
    models: Sequence[Model],
    batch: Batch,
    mode: str = "concurrent",
    *,
    divergence_weight: float | Sequence[float] = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    hard_weight: float | Sequence[float] = (1.0, 1.0),
    detach: bool = True,
    unlabeled_weight: float = 1.0,
    **options: "Unpack[BatchKeywords]",
) -> tuple[Tensor, Metrics]:
    """The loss of one stage on one batch: the sum of the teacher's and the student's.

    Args:
        models: (teacher, student), functions of a batch. Trained models get a gradient; a frozen teacher gets none.
        batch: dict of tensors. Rows marked "distill_only" have no cross entropy.
        mode, divergence_weight, divergence, beta, hard_weight, detach: as in `coupling`.
        unlabeled_weight: weight of the loss of "distill_only" rows.
        options: temperature, t_squared, reduction ("mean" or "sum"), num_items, vocab, teacher_floor, precision,
            tile_memory, backend, as in `hkdfast.coupled_loss`.

    Returns:
        scalar loss in nats per answer row, and {name: (n,) tensor} without gradient: student_divergence,
        student_agreement, student_cross_entropy, student_entropy, and the same for a teacher that is trained.

    Raises:
        ValueError: as `coupling`; if there are not two models, or labels are needed and the batch has none.
    """
    if len(models) != 2:
        raise ValueError(f"a stage couples two models, teacher and student, got {len(models)}")
    how = coupling(mode, divergence_weight, divergence, beta, hard_weight, detach=detach)
    return coupled_batch_loss(models, batch, *how, roles=ROLES, unlabeled_weight=unlabeled_weight, **options)
