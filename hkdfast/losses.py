"""The losses of logits, heads and purified teachers: distill_loss of two sides, coupled_loss of several models."""

from dataclasses import dataclass

from .engine.arguments import check_flag, shown
from .engine.checks import check_source
from .engine.terms import Teaching, check_divergence, check_weight, couple
from .heads import Purified
from .ops.reference import MIRROR


def distill_loss(
    student,
    teacher,
    divergence="forward_kl",
    *,
    beta=0.5,
    temperature=1.0,
    t_squared=False,
    labels=None,
    hard_weight=0.0,
    row_weight=None,
    reduction="mean",
    num_items=None,
    ignore_index=-100,
    vocab=None,
    teacher_floor=None,
    precision="float32",
    tile_memory=None,
    return_metrics=False,
    backend=None,
):
    """Divergence between the next-token distributions of a teacher p and a student q over a whole vocabulary.

    With heads on either side the logits exist only as tiles of a row block: all gradients cost three products through
    the student's head and one through the teacher's, in memory bounded by `memory`.

    Args:
        student: logits (..., V) or a Head. Gets a gradient: logits, or the head's hidden, weight and bias.
        teacher: logits (..., V), a Head of any hidden size, or what `purify` returned. A constant: no gradient.
        divergence: "forward_kl" KL(p || q), "reverse_kl" KL(q || p) (mode-seeking), "jensen_shannon"
            beta KL(p || m) + (1 - beta) KL(q || m), "skew_kl" KL(p || m), "skew_reverse_kl" KL(q || m), with
            m = beta p + (1 - beta) q, or "total_variation" sum |p - q| / 2.
        beta: weight of the teacher in the mixture m. jensen_shannon takes 0 < beta < 1: the formula tends to 0 at both
            ends (divided by beta to forward_kl, by 1 - beta to reverse_kl), where GKD and TRL put forward_kl (0) and
            reverse_kl (1): ask for those by name. skew_kl takes 0 <= beta < 1 and is forward_kl at 0;
            skew_reverse_kl takes 0 < beta <= 1 and is reverse_kl at 1. The others do not read it.
        temperature: positive and finite, divides the logits of both sides.
        t_squared: multiply the divergence (value and gradient) by temperature ** 2, as Hinton et al. do.
        labels: (...) int64, the next word of each row, or None. Shift them rather than logits, whose view [:, :-1] has
            to be copied. Rows labeled ignore_index cost 0 and, with heads, no products; rows labeled
            hkdfast.UNLABELED (-101) have no cross entropy, but their divergence, unless the teacher's purification
            reads labels. On CUDA with heads the host waits once, for the number of rows that cost something.
        hard_weight: the cross entropy of the student against labels, at temperature 1, is added this many times.
        weight: (...) factors of the rows' losses, not negative, any float dtype; they do not change the denominator of
            the mean. A row of weight 0 does not count, whatever it holds. No gradient: one that requires it is refused.
        reduction: "mean" over num_items, "sum", or "none": (...) losses. With "none" and a Head, backward computes the
            tiles again, for it alone knows each row's upstream gradient; no other case computes anything twice.
        num_items: denominator of the mean, and for no other reduction: a number or a tensor of one; None: the rows not
            ignored. 0 counts as 1. A negative or infinite number or NaN is refused; in a tensor on CUDA, at which the
            host does not look, it makes the loss NaN.
        ignore_index: the label of rows that do not count.
        vocab: None: both sides must have the same words. "common": the first words that both have. A number: the first
            so many. Words beyond count as absent, on both sides; they get a zero gradient.
        floor: least log-probability (nats) of the teacher for a word that the student does not mask. None: none. A
            divergence that is infinite without it is returned as inf, with a zero gradient for its row.
        tiles: how heads are multiplied. "float32": products summed and kept in float32, whatever their dtype; gradient
            error to float64 at most 3e-3 for bf16 models from KL 24 to 0.001. "bfloat16": 16-bit tiles, error 2e-2 at
            KL 4, more than the gradient itself at 0.0004. "difference": 16-bit tiles of teacher minus student, where
            all sides share one weight, bias and scale and no softcap: error 2e-2 from KL 24 down to 4e-5.
        memory: bytes for tiles; None: 512 MiB on the CPU; on CUDA 2 GiB, with a trained head 8 GiB, but at most half of
            what is free.
        metrics: also return a dict of (...) tensors, no gradient: divergence, cross_entropy, student_entropy,
            teacher_entropy, confidence, purification, agreement (hkdfast.ops.objective.METRICS says what each is).
        backend: "cpu", "cuda", "triton" or "reference"; None picks the fastest that is built for the device.

    Returns:
        Scalar loss, or (...) with reduction "none", in nats: float32 (float64 for float64 inputs); (loss, dict) with
        metrics. Where every row is ignored: 0 that can be differentiated. A row that holds a NaN (in logits, hidden
        states or its weight), or a positive infinity, has a NaN loss and a NaN gradient; one whose loss is infinite has
        a zero gradient. There are no second derivatives.

    Raises:
        ValueError: on unknown words, numbers out of range, shapes, devices, dtypes or vocabularies that do not fit,
            labels outside the vocabulary (CPU; on CUDA a device assertion), negative weights (CPU), options that
            require a gradient, tensors that are not dense (sparse, nested, quantized, distributed, inside torch.func),
            a backend for another device, a reverse_kl to a teacher that drops words without a floor, or memory too
            small for one row and its gradient.
        ImportError: if the backend asked for does not run here; `hkdfast.backends()` tells why.
        RuntimeError: from backward with create_graph=True, which would be for a second derivative.

    Sources: Hinton et al., 2015 (arXiv:1503.02531); Gu et al., 2024 (arXiv:2306.08543); Agarwal et al., 2024
    (arXiv:2306.13649); Ko et al., 2024 (arXiv:2402.03898); Wen et al., 2023 (arXiv:2307.15190).
    """
    check_weight("hard_weight", hard_weight)
    check_source("student", student)
    teaching = Teaching(0, 1, divergence, beta, hard_weight=hard_weight)
    result = couple(
        ("student", "teacher"), (student, teacher), [teaching],
        temperature=temperature, t_squared=t_squared, labels=labels, row_weight=row_weight, reduction=reduction,
        num_items=num_items, ignore_index=ignore_index, vocab=vocab, teacher_floor=teacher_floor, precision=precision, tile_memory=tile_memory,
        return_metrics=return_metrics, backend=backend,
    )  # fmt: skip
    return (result[0], result[1][0, 1]) if return_metrics else result


@dataclass(frozen=True)
class Edge:
    """How one model learns from another in `coupled_loss`.

    Args:
        weight: times the divergence, finite and not negative.
        divergence, beta: as in `distill_loss`, the other model as the teacher.
        detach: whether the teacher is a constant of this edge. If not, it also gets the gradient of the divergence,
            and gives way to its student.

    Raises:
        ValueError: on an unknown divergence, a beta out of its range, or a negative weight.
    """

    weight: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    detach: bool = True

    def __post_init__(self):
        check_weight("weight of an edge", self.weight)
        check_divergence(self.divergence, self.beta)
        check_flag("detach", self.detach)
        if not self.detach and self.divergence not in MIRROR:
            raise ValueError(
                f"{self.divergence} has no gradient into its teacher (detach=False), {', '.join(MIRROR)} have"
            )


def coupled_loss(
    heads,
    coupling,
    *,
    temperature=1.0,
    t_squared=False,
    labels=None,
    hard_weight=0.0,
    row_weight=None,
    reduction="mean",
    num_items=None,
    ignore_index=-100,
    vocab=None,
    teacher_floor=None,
    precision="float32",
    tile_memory=None,
    return_metrics=False,
    backend=None,
):
    """Loss of K models that teach each other over one batch, in one loop: a row costs

        sum_i hard_weight_i cross_entropy_i + sum_ij weight_ij D_ij(p_j, q_i)

    Every model's tile is made once per block of rows, whatever the number of edges: 3 products through the head of a
    trained model, 2 with a frozen head, 1 of a model that only teaches; 3K for K trained models, never K(K-1) pairs.
    Where gradient tiles are of 16 bits (bf16 heads on CUDA, narrow tiles) one that several edges add to is rounded with
    each: error 2.6e-3 near convergence against 2.2e-3 for one edge, more where the edges pull against each other.

    Args:
        heads: K sources of the same rows: logits (..., V) or `Head` of any hidden size, with its own scale and softcap.
            Those that learn (from another, from labels, or through an edge with detach=False) get a gradient, if they
            ask for one. What `purify` returns can teach, not learn. One alone learns from labels.
        coupling: K rows of K entries. coupling[i][j] says how model i learns from model j: None or 0 for not at all, a
            number for so many times the forward KL, or an `Edge`. The diagonal is empty.
        labels: (...) int64, the next word of each row for all models, or None.
        hard_weight: times the cross entropy against labels, at temperature 1: one number, or one for each model.
        metrics: also return {(i, j): dict}, one for each edge, of what `distill_loss` tells of student i and teacher j;
            (i, i) of a model that learns from labels alone.
        temperature, t_squared, weight, reduction, num_items, ignore_index, vocab, teacher_floor, precision, tile_memory, backend: as in
            `distill_loss`; "difference" tiles take one model that learns.

    Returns:
        As `distill_loss`: scalar loss, or (...) with reduction "none"; (loss, dict of dicts) with metrics.

    Raises:
        ValueError: as `distill_loss`; on no heads, a table that is not K x K, a diagonal that is not empty,
            negative weights, a model that neither learns nor teaches, a floor with detach=False.

    Sources: deep mutual learning, Zhang et al., 2018 (arXiv:1706.00384). The couplings of `hkdfast.pyramid` and
    `hkdfast.ternary`, for which this is made, are a reconstruction of HKD4VLM (arXiv:2506.13038).
    """
    edges, hard = table_of(heads, coupling), hard_weights(heads, hard_weight)
    for i, head in enumerate(heads):
        if isinstance(head, Purified) and (hard[i] or any(student == i for student, _ in edges)):
            raise ValueError(f"heads[{i}] is purified: it can teach, not learn")
    teachings = []
    for i, own in enumerate(hard):
        teachers = [(j, edge) for (student, j), edge in edges.items() if student == i]
        if own and not teachers:
            teachings.append(Teaching(i, i, "forward_kl", 0.5, weight=0.0, hard_weight=own))
        for n, (j, edge) in enumerate(teachers):
            teachings.append(Teaching(i, j, edge.divergence, edge.beta, edge.weight, 0.0 if n else own))
    for (i, j), edge in edges.items():
        if not edge.detach and not isinstance(heads[j], Purified):
            if teacher_floor is not None:  # what it would bound here is the learner, not the teacher
                raise ValueError(
                    f"teacher_floor={teacher_floor} takes constant teachers, coupling[{i}][{j}] has detach=False"
                )
            mirrored = Teaching(j, i, MIRROR[edge.divergence], 1 - edge.beta, edge.weight, counts=False)
            teachings.append(mirrored)
    if not teachings:
        raise ValueError("nothing to learn: the coupling has no edge, and hard_weight is 0")
    idle = set(range(len(heads))) - {place for one in teachings for place in (one.student, one.teacher)}
    if idle:
        raise ValueError(f"heads[{min(idle)}] neither learns nor teaches: no edge leads to it or from it")
    return couple(
        [f"heads[{i}]" for i in range(len(heads))], heads, teachings,
        temperature=temperature, t_squared=t_squared, labels=labels, row_weight=row_weight, reduction=reduction,
        num_items=num_items, ignore_index=ignore_index, vocab=vocab, teacher_floor=teacher_floor, precision=precision, tile_memory=tile_memory,
        return_metrics=return_metrics, backend=backend,
    )  # fmt: skip


def table_of(heads, coupling):
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


def hard_weights(heads, hard_weight):
    """One number for each head."""
    several = isinstance(hard_weight, (list, tuple))
    weights = list(hard_weight) if several else [hard_weight] * len(heads)
    if len(weights) != len(heads):
        raise ValueError(f"hard_weight must be one number, or one for each of {len(heads)} heads, got {len(weights)}")
    for i, one in enumerate(weights):
        check_weight(f"hard_weight[{i}]" if several else "hard_weight", one)
    if not several:  # a teacher that is purified has no part in the labels
        weights = [0.0 if isinstance(head, Purified) else one for head, one in zip(heads, weights, strict=True)]
    return weights
