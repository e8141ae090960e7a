"""Losses over logits, heads and purified teachers: distill_loss of two models, coupled_loss of several."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from torch import Tensor, nn, no_grad

from .engine.arguments import check_flag, shown
from .engine.checks import check_source
from .engine.options import LossOptions
from .engine.renamed import LOSS, refuses
from .engine.terms import check_divergence, check_weight, coupled_rows_loss, loss_term, prepared
from .engine.tile_loop import LossTerm
from .heads import Head, Purified
from .ops.reference import SWAPPED
from .split import Split

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .engine.options import LossKeywords

Metrics: TypeAlias = dict[str, Tensor]


@overload
def distill_loss(
    student: Tensor | Head,
    teacher: Tensor | Head | Purified,
    divergence: str = ...,
    *,
    beta: float = ...,
    divergence_weight: float = ...,
    hard_weight: float = ...,
    return_metrics: Literal[False] = ...,
    **options: "Unpack[LossKeywords]",
) -> Tensor: ...
@overload
def distill_loss(
    student: Tensor | Head,
    teacher: Tensor | Head | Purified,
    divergence: str = ...,
    *,
    beta: float = ...,
    divergence_weight: float = ...,
    hard_weight: float = ...,
    return_metrics: Literal[True],
    **options: "Unpack[LossKeywords]",
) -> tuple[Tensor, Metrics]: ...
@refuses(LOSS)
def distill_loss(
    student: Tensor | Head,
    teacher: Tensor | Head | Purified,
    divergence: str = "forward_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    divergence_weight: float = 1.0,
    hard_weight: float = 0.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab: int | str | None = None,
    teacher_floor: float | None = None,
    precision: str = "float32",
    tile_memory: float | None = None,
    return_metrics: bool = False,
    backend: str | None = None,
    split: Split | None = None,
) -> Tensor | tuple[Tensor, Metrics]:
    """Divergence between the next-token distributions of a teacher p and a student q over a whole vocabulary.

    With heads on either side the logits exist only as tiles of a row block: all gradients cost three products through
    the student's head and one through the teacher's, in memory bounded by `tile_memory`.

    Args:
        student: logits (..., V) or a Head. Gets a gradient: logits, or the head's hidden, weight and bias.
        teacher: logits (..., V), a Head of any hidden size, or what `purify` returned. A constant: no gradient.
        divergence: "forward_kl" KL(p || q), "reverse_kl" KL(q || p) (mode-seeking), "jensen_shannon"
            beta KL(p || m) + (1 - beta) KL(q || m), "skew_kl" KL(p || m), "skew_reverse_kl" KL(q || m), with
            m = beta p + (1 - beta) q, or "total_variation" sum |p - q| / 2.
        beta: weight of the teacher in the mixture m. jensen_shannon takes 0 < beta < 1: the formula tends to 0 at both
            ends (divided by beta to forward_kl, by 1 - beta to reverse_kl), where GKD and TRL put forward_kl (0) and
            reverse_kl (1): name those divergences instead. skew_kl takes 0 <= beta < 1 and is forward_kl at 0;
            skew_reverse_kl takes 0 < beta <= 1 and is reverse_kl at 1. Ignored by the others.
        temperature: positive and finite, divides the logits of both sides.
        t_squared: multiply the divergence (value and gradient) by temperature ** 2, as Hinton et al. do.
        labels: (...) int64, the next token of each row, or None. Shift the labels, not the logits, whose view [:, :-1]
            would have to be copied. Rows labeled ignore_index have loss 0 and, with heads, need no products. Rows
            labeled hkdfast.UNLABELED (-101) have no cross entropy but keep their divergence; a teacher whose contrast
            reads labels refuses them. On CUDA with heads the host waits once, for the number of rows not ignored.
        divergence_weight: weight of the divergence beside the cross entropy. Finite and not negative. The loss of a row
            is divergence_weight * divergence + hard_weight * cross entropy, in the same products.
        hard_weight: weight of the student's cross entropy against labels, at temperature 1. Finite and not negative.
        row_weight: (...) factors of the rows' losses, not negative, any float dtype; they do not change the denominator
            of the mean. A row of weight 0 contributes 0, whatever it holds. Must not require a gradient.
        reduction: "mean" over num_items, "sum", or "none": (...) losses. With "none" and a Head, backward computes the
            tiles again, because only then is each row's upstream gradient known; no other case recomputes anything.
        num_items: denominator of reduction "mean", refused with any other: a number or a tensor with one element. None:
            the number of rows not ignored. 0 counts as 1. A negative, infinite or NaN value is refused; in a tensor on
            CUDA, which the host does not read, it makes the loss NaN.
        ignore_index: the label of rows that are left out of the loss.
        vocab: tokens to compare. None: both sides must have vocabularies of one size. "common": the first tokens that
            both have. A number: the first so many. Tokens beyond are absent on both sides and get a zero gradient.
        teacher_floor: lower bound of the teacher's log-probabilities (nats), for tokens that the student does not mask.
            None: no bound. A divergence that is infinite without it is returned as inf, with a zero gradient for its
            row.
        precision: how heads are multiplied. "float32": products are summed and kept in float32, whatever the heads'
            dtype; the gradient's error against float64 is at most 3e-3 for bf16 models from KL 24 to 0.001. "bfloat16":
            16-bit tiles; error 2e-2 at KL 4, more than the gradient itself at KL 0.0004. "difference": 16-bit tiles of
            teacher minus student, for heads that share one weight, bias and scale and have no softcap; error 2e-2 from
            KL 24 down to 4e-5.
        tile_memory: bytes for tiles; None: 512 MiB on the CPU; on CUDA 2 GiB, with a trained head 8 GiB, but at most
            half of the free memory.
        return_metrics: also return a dict of (...) tensors without gradient: divergence, cross_entropy,
            student_entropy, teacher_entropy, confidence, contrast_weight, agreement (see
            hkdfast.ops.objective.METRICS).
        backend: "cpu", "cuda", "triton" or "reference"; None: the fastest that is built for the device.
        split: `Split` if the student is this process's part of a vocabulary that several processes hold. None: the
            Split of the student's Head, if it has one. The teacher is such a part too, or whole: then it is sliced. All
            processes get the loss over the whole vocabulary.

    Returns:
        Scalar loss, or (...) with reduction "none", in nats: float32 (float64 for float64 inputs); (loss, dict) with
        return_metrics. If every row is ignored, the loss is 0 and has a zero gradient. A row with a NaN (in logits,
        hidden states or its weight) or a positive infinity has a NaN loss and a NaN gradient. A row with an infinite
        loss has a zero gradient. There are no second derivatives.

    Raises:
        ValueError: on unknown option values, numbers out of range, shapes, devices, dtypes or vocabularies that differ,
            labels outside the vocabulary (CPU; on CUDA a device assertion), negative weights (CPU), options that
            require a gradient, tensors that are not dense (sparse, nested, quantized, distributed, inside torch.func),
            a backend for another device, a reverse_kl to a teacher that drops tokens without a teacher_floor, or a
            tile_memory too small for one row and its gradient.
        ImportError: if the named backend does not run here; `hkdfast.backends()` gives the reason.
        TypeError: on an unknown option, or one by its name of version 0.1.
        RuntimeError: from backward with create_graph=True: there are no second derivatives.

    Sources: Hinton et al., 2015 (arXiv:1503.02531); Gu et al., 2024 (arXiv:2306.08543); Agarwal et al., 2024
    (arXiv:2306.13649); Ko et al., 2024 (arXiv:2402.03898); Wen et al., 2023 (arXiv:2307.15190).
    """
    check_weight("divergence_weight", divergence_weight)
    check_weight("hard_weight", hard_weight)
    check_source("student", student)
    term = loss_term(0, 1, divergence, beta, divergence_weight, hard_weight)
    options = LossOptions(
        temperature, t_squared, labels, row_weight, reduction, num_items, ignore_index, vocab, teacher_floor,
        precision, tile_memory, return_metrics, backend, split,
    )  # fmt: skip
    names, sources = ("student", "teacher"), (student, teacher)
    if divergence_weight == 0:  # a divergence that is infinite must not count either
        return labels_only_loss(names, sources, [term], options)
    result = coupled_rows_loss(names, sources, [term], options)
    return (result[0], result[1][0, 1]) if return_metrics else result


def labels_only_loss(
    names: Sequence[str], sources: Sequence[Tensor | Head | Purified], terms: list[LossTerm], options: LossOptions
) -> Any:
    """The loss of a student whose divergence has weight 0. The metrics still include those of the teacher."""
    _, options, found = prepared(names, sources, terms, options)
    vocab = found.vocab if found.part is None else found.part.compared
    hard = loss_term(0, 0, "forward_kl", 0.5, 0.0, terms[0].objective.hard_weight)
    loss = coupled_rows_loss(names[:1], sources[:1], [hard], replace(options, vocab=vocab, return_metrics=False))
    if not options.return_metrics:
        return loss
    with no_grad():
        return loss, coupled_rows_loss(names, sources, terms, options)[1][0, 1]


class DistillLoss(nn.Module):
    """`distill_loss` as a module: options are passed and checked once, tensors at each call.

        loss = DistillLoss("reverse_kl", temperature=2.0)(student, teacher, labels=labels)

    It has no parameters. The result is exactly that of `distill_loss` with the same arguments.

    Args:
        divergence: as in `distill_loss`.
        options: beta, temperature, t_squared, divergence_weight, hard_weight, reduction, ignore_index, vocab,
            teacher_floor, precision, tile_memory, return_metrics, backend, split, as in `distill_loss`.

    Raises:
        ValueError: on an unknown option value or a number out of range. The call raises the other errors of
            `distill_loss`.
        TypeError: on an unknown option, one by its name of version 0.1, or labels, row_weight or num_items, which
            belong to the call.
    """

    def __init__(self, divergence: str = "forward_kl", **options: Any) -> None:
        super().__init__()
        check_module_options(options)
        general = {name: value for name, value in options.items() if name not in ("beta", "hard_weight")}
        for name in ("divergence_weight", "hard_weight"):
            check_weight(name, options.get(name, 0.0))
        check_divergence(divergence, options.get("beta", 0.5))
        LossOptions(**general)
        self.divergence, self.options = divergence, dict(options)

    def forward(
        self,
        student: Tensor | Head,
        teacher: Tensor | Head | Purified,
        *,
        labels: Tensor | None = None,
        row_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Metrics]:
        """The loss of one batch; arguments and result as in `distill_loss`."""
        batch: dict[str, Any] = {"labels": labels, "row_weight": row_weight, "num_items": num_items}
        return distill_loss(student, teacher, self.divergence, **batch, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.divergence), *(f"{name}={shown(value)}" for name, value in self.options.items())])


BATCH_OPTIONS = ("labels", "row_weight", "num_items")
MODULE_OPTIONS = (
    "beta",
    "divergence_weight",
    "hard_weight",
    *(name for name in LossOptions.__dataclass_fields__ if name not in BATCH_OPTIONS),
)


def check_module_options(options: dict[str, Any]) -> None:
    for name in options:
        if name in BATCH_OPTIONS:
            raise TypeError(
                f"{name} changes with the batch: pass it to the call of the DistillLoss, not to DistillLoss()"
            )
        if name not in MODULE_OPTIONS:
            hint = f"it is called {LOSS[name]} now" if name in LOSS else f"expected some of {', '.join(MODULE_OPTIONS)}"
            raise TypeError(f"DistillLoss() has no option {name!r}: {hint}")


@dataclass(frozen=True)
class Edge:
    """How one model learns from another in `coupled_loss`.

    Args:
        weight: of the divergence, finite and not negative.
        divergence, beta: as in `distill_loss`, the other model as the teacher.
        detach: whether the teacher is a constant of this edge. If False, it also gets the gradient of the divergence,
            so that teacher and student move toward each other.

    Raises:
        ValueError: on an unknown divergence, a beta out of its range, or a negative weight.
    """

    weight: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    detach: bool = True

    def __post_init__(self) -> None:
        check_weight("weight of an edge", self.weight)
        check_divergence(self.divergence, self.beta)
        check_flag("detach", self.detach)
        if not self.detach and self.divergence not in SWAPPED:
            raise ValueError(
                f"detach=False: {self.divergence} has no gradient into its teacher, {', '.join(SWAPPED)} have"
            )


@overload
def coupled_loss(
    heads: Sequence[Tensor | Head | Purified],
    coupling: Sequence[Sequence[Edge | float | None]],
    *,
    hard_weight: float | Sequence[float] = ...,
    return_metrics: Literal[False] = ...,
    **options: "Unpack[LossKeywords]",
) -> Tensor: ...
@overload
def coupled_loss(
    heads: Sequence[Tensor | Head | Purified],
    coupling: Sequence[Sequence[Edge | float | None]],
    *,
    hard_weight: float | Sequence[float] = ...,
    return_metrics: Literal[True],
    **options: "Unpack[LossKeywords]",
) -> tuple[Tensor, dict[tuple[int, int], Metrics]]: ...
@refuses(LOSS)
def coupled_loss(
    heads: Sequence[Tensor | Head | Purified],
    coupling: Sequence[Sequence[Edge | float | None]],
    *,
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    hard_weight: float | Sequence[float] = 0.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab: int | str | None = None,
    teacher_floor: float | None = None,
    precision: str = "float32",
    tile_memory: float | None = None,
    return_metrics: bool = False,
    backend: str | None = None,
    split: Split | None = None,
) -> Tensor | tuple[Tensor, dict[tuple[int, int], Metrics]]:
    """Loss of K models that teach each other over one batch, in one loop. The loss of a row is

        sum_i hard_weight_i cross_entropy_i + sum_ij weight_ij D_ij(p_j, q_i)

    Every model's tile is made once per block of rows, whatever the number of edges: 3 products through the head of a
    trained model, 2 with a frozen head, 1 of a model that only teaches; 3K for K trained models, never K(K-1) pairs.
    Where gradient tiles have 16 bits (bf16 heads on CUDA, 16-bit tiles) a tile to which several edges add is rounded
    after each: error 2.6e-3 near convergence against 2.2e-3 for one edge, more where the edges pull against each other.

    Args:
        heads: K sources of the same rows: logits (..., V) or `Head` of any hidden size, with its own scale and softcap.
            Those that learn (from another, from labels, or through an edge with detach=False) get a gradient if they
            require one. What `purify` returns can teach, not learn. A single model learns from labels.
        coupling: K rows of K entries. coupling[i][j] says how model i learns from model j: None or 0 (not at all), a
            number (the weight of a forward KL), or an `Edge`. The diagonal is empty.
        labels: (...) int64, the next token of each row for all models, or None.
        hard_weight: weight of the cross entropy against labels, at temperature 1: one number, or one for each model.
        return_metrics: also return {(i, j): dict}, one for each edge: the metrics of `distill_loss` for student i and
            teacher j; (i, i) for a model that learns from labels alone.
        temperature, t_squared, row_weight, reduction, num_items, ignore_index, vocab, teacher_floor, precision,
            tile_memory, backend, split: as in `distill_loss`; precision "difference" takes one model that learns.

    Returns:
        As `distill_loss`: scalar loss, or (...) with reduction "none"; (loss, dict of dicts) with
        return_metrics.

    Raises:
        ValueError: as `distill_loss`; on no heads, a table that is not K x K, a diagonal that is not empty,
            negative weights, a model that neither learns nor teaches, a teacher_floor with detach=False.

    Sources: deep mutual learning, Zhang et al., 2018 (arXiv:1706.00384). The couplings of `hkdfast.pyramid` and
    `hkdfast.ternary` are a reconstruction of HKD4VLM (arXiv:2506.13038).
    """
    edges, hard = table_of(heads, coupling), hard_weights(heads, hard_weight)
    for i, head in enumerate(heads):
        if isinstance(head, Purified) and (hard[i] or any(student == i for student, _ in edges)):
            raise ValueError(f"heads[{i}] is purified: it can teach, not learn")
    terms = []
    for i, own in enumerate(hard):
        teachers = [(j, edge) for (student, j), edge in edges.items() if student == i]
        if own and not teachers:
            terms.append(loss_term(i, i, "forward_kl", 0.5, weight=0.0, hard_weight=own))
        for n, (j, edge) in enumerate(teachers):
            terms.append(loss_term(i, j, edge.divergence, edge.beta, edge.weight, 0.0 if n else own))
    for (i, j), edge in edges.items():
        if not edge.detach and not isinstance(heads[j], Purified):
            if teacher_floor is not None:  # in the swapped term the floor would apply to the learner
                raise ValueError(
                    f"teacher_floor={teacher_floor} takes constant teachers, coupling[{i}][{j}] has detach=False"
                )
            terms.append(loss_term(j, i, SWAPPED[edge.divergence], 1 - edge.beta, edge.weight, counted=False))
    if not terms:
        raise ValueError("nothing to train: the coupling has no edge, and hard_weight is 0")
    idle = set(range(len(heads))) - {i for term in terms for i in (term.student, term.teacher)}
    if idle:
        raise ValueError(f"heads[{min(idle)}] neither learns nor teaches: no edge leads to it or from it")
    options = LossOptions(
        temperature, t_squared, labels, row_weight, reduction, num_items, ignore_index, vocab, teacher_floor,
        precision, tile_memory, return_metrics, backend, split,
    )  # fmt: skip
    return coupled_rows_loss([f"heads[{i}]" for i in range(len(heads))], heads, terms, options)


def table_of(
    heads: Sequence[Tensor | Head | Purified], coupling: Sequence[Sequence[Edge | float | None]]
) -> dict[tuple[int, int], Edge]:
    """{(student, teacher): Edge} of a coupling table, without its empty entries."""
    lists = (list, tuple)
    if not isinstance(heads, lists):
        raise ValueError(f"coupled_loss takes a list of heads, got {shown(heads)}")
    size = len(heads)
    if not size:
        raise ValueError("coupled_loss takes at least one head, got none")
    if not isinstance(coupling, lists) or not all(isinstance(row, lists) for row in coupling):
        raise ValueError(f"coupling must be a list of {size} lists of {size} entries, got {shown(coupling)}")
    shape = [len(row) for row in coupling]
    if shape != [size] * size:
        raise ValueError(f"coupling must have {size} rows of {size} entries for {size} heads, got rows of {shape}")
    edges = {}
    for i, row in enumerate(coupling):
        for j, entry in enumerate(row):
            name = f"coupling[{i}][{j}]"
            if not isinstance(entry, Edge):
                check_weight(name, 0 if entry is None else entry)
                entry = Edge(entry or 0)
            if entry.weight and i == j:
                raise ValueError(f"{name} is {entry.weight}: a model does not teach itself, the diagonal is empty")
            if entry.weight:
                edges[i, j] = entry
    return edges


def hard_weights(heads: Sequence[Tensor | Head | Purified], hard_weight: float | Sequence[float]) -> list[float]:
    """One number for each head."""
    is_list = isinstance(hard_weight, (list, tuple))
    weights: list[Any] = list(hard_weight) if isinstance(hard_weight, (list, tuple)) else [hard_weight] * len(heads)
    if len(weights) != len(heads):
        raise ValueError(f"hard_weight must be one number, or one for each of {len(heads)} heads, got {len(weights)}")
    for i, one in enumerate(weights):
        check_weight(f"hard_weight[{i}]" if is_list else "hard_weight", one)
    if not is_list:  # a purified teacher does not learn from labels
        weights = [0.0 if isinstance(head, Purified) else one for head, one in zip(heads, weights, strict=True)]
    return weights
