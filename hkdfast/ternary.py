"""Ternary-coupled refinement distillation: reconstruction of HKD4VLM (arXiv:2506.13038).

    loss, metrics = ternary.loss((large, medium, student), batch)

The student comes from the pyramid. Only the abstract describes the method. Which three models are coupled is an option;
the default is the likeliest choice, two teachers and a student.
A model is any function of a batch that returns logits or a `Head` at the batch's answer rows: see `hkdfast.seed`.
`hkdfast.hf.TernaryTrainer` trains with it.
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

__all__ = ["FORMS", "coupling", "loss", "roles"]

TEACHERS = ("frozen", "trained")
# the roles of the models, and the model at each index of the coupling table
FORMS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "two_teachers": (("teacher1", "teacher2", "student"), (0, 1, 2)),
    "mutual": (("model1", "model2", "model3"), (0, 1, 2)),
    # two divergences between two models: the teacher has two rows of the table
    "one_pair": (("teacher", "student"), (0, 0, 1)),
}


def roles(form: str) -> tuple[str, ...]:
    """Names of the models that a form couples, in the order of `loss`'s models."""
    check_word("form", form, FORMS)
    return FORMS[form][0]


@refuses(COUPLED)
def coupling(
    form: str = "two_teachers",
    divergence_weight: float | Sequence[float] = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    hard_weight: float | Sequence[float] = 1.0,
    *,
    teachers: str = "frozen",
    teacher_coupling: float = 0.0,
    detach: bool = True,
) -> tuple[Coupling, list[float]]:
    """How the models learn, for `hkdfast.coupled_loss`.

    Args:
        form: "two_teachers": the student learns from both teachers and by cross entropy. "mutual": each of three models
            learns from the other two and by cross entropy. "one_pair": a student learns from one teacher by three
            terms, cross entropy, forward KL and reverse KL; the teacher has two rows of the table.
        divergence_weight: weights of the divergences, not negative: one number, or one per teacher (two_teachers: two;
            mutual: three, the weight with which the others learn from each), or (forward, reverse) in one_pair.
        divergence, beta: as in `distill_loss`. Ignored by one_pair.
        hard_weight: weights of the cross entropies: one number, or one per model, in the order of `roles`. Ignored for
            frozen teachers.
        teachers: "frozen", or "trained": they also learn, by their own cross entropy. Ignored by mutual.
        teacher_coupling: weight of the divergences between two trained teachers; only in two_teachers.
        detach: whether only the model that learns gets the gradient of a divergence. False: both models get it.

    Returns:
        3 x 3 table of Edge and None, and three hard weights.

    Raises:
        ValueError: on unknown option values, negative or too many weights, frozen teachers with detach=False or with
            `teacher_coupling`.

    Source: reconstruction of HKD4VLM (arXiv:2506.13038); mutual: Zhang et al., 2018 (arXiv:1706.00384).
    """
    names = roles(form)
    check_word("teachers", teachers, TEACHERS)
    (teacher_coupling,) = per_model("teacher_coupling", teacher_coupling, ("teachers",))
    frozen = teachers == "frozen" and form != "mutual"
    if teacher_coupling and (frozen or form != "two_teachers"):
        raise ValueError(
            f"teacher_coupling={teacher_coupling} is for two trained teachers, "
            f"not for form {form!r} with teachers {teachers!r}"
        )
    if frozen and not detach:
        raise ValueError("detach=False gives the teachers a gradient: take teachers='trained'")
    hard = per_model("hard_weight", hard_weight, names)
    if frozen:
        hard[:-1] = [0.0] * (len(names) - 1)
    if form == "one_pair":
        forward, reverse = per_model("divergence_weight", divergence_weight, ("forward", "reverse"))
        edges = {(2, 0): Edge(forward, "forward_kl", beta, detach), (2, 1): Edge(reverse, "reverse_kl", beta, detach)}
        return coupling_table(3, edges), [hard[0], 0.0, hard[1]]
    if form == "mutual":
        weights = per_model("divergence_weight", divergence_weight, names)
        pairs = {(i, j): weights[j] for i in range(3) for j in range(3) if i != j}
    else:
        first, second = per_model("divergence_weight", divergence_weight, names[:2])
        pairs = {(2, 0): first, (2, 1): second, (0, 1): teacher_coupling, (1, 0): teacher_coupling}
    return coupling_table(3, {pair: Edge(number, divergence, beta, detach) for pair, number in pairs.items()}), hard


@refuses(COUPLED)
def loss(
    models: Sequence[Model],
    batch: Batch,
    form: str = "two_teachers",
    *,
    divergence_weight: float | Sequence[float] = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    hard_weight: float | Sequence[float] = 1.0,
    teachers: str = "frozen",
    teacher_coupling: float = 0.0,
    detach: bool = True,
    unlabeled_weight: float = 1.0,
    **options: "Unpack[BatchKeywords]",
) -> tuple[Tensor, Metrics]:
    """The loss on one batch: the sum over all models that are trained.

    Args:
        models: functions of a batch, in the order of `roles`: (teacher1, teacher2, student), three models, or (teacher,
            student) for one_pair. Trained models get a gradient; frozen teachers get none.
        batch: dict of tensors. Rows marked "distill_only" have no cross entropy.
        form, divergence_weight, divergence, beta, hard_weight, teachers, teacher_coupling, detach: as in `coupling`.
        unlabeled_weight: weight of the loss of "distill_only" rows.
        options: temperature, t_squared, reduction ("mean" or "sum"), num_items, vocab, teacher_floor, precision,
            tile_memory, backend, as in `hkdfast.coupled_loss`.

    Returns:
        scalar loss in nats per answer row, and {name: (n,) tensor} without gradient, as
        `hkdfast.mutual.coupled_batch_loss`: e.g. student_cross_entropy, student_divergence_teacher1,
        student_divergence_forward_kl in one_pair.

    Raises:
        ValueError: as `coupling`; on another number of models, or if labels are needed and the batch has none.
    """
    names = roles(form)
    if len(models) != len(names):
        raise ValueError(f"form {form!r} couples {len(names)} models ({', '.join(names)}), got {len(models)}")
    how = coupling(
        form,
        divergence_weight,
        divergence,
        beta,
        hard_weight,
        teachers=teachers,
        teacher_coupling=teacher_coupling,
        detach=detach,
    )
    return coupled_batch_loss(
        models, batch, *how, roles=names, slots=FORMS[form][1], unlabeled_weight=unlabeled_weight, **options
    )
