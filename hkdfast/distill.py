"""distill_loss: checks, reductions, autograd. The work is done in tiles.py."""

import math
from functools import cache

import torch

from . import operators
from . import tiles as loop
from .backends import visible
from .checks import (
    check_labels,
    check_options,
    check_pair,
    check_shared,
    check_source,
    check_target,
    check_vocab,
    check_weights,
    check_word,
)
from .objective import METRICS, Objective, Transform
from .reference import DIVERGENCES
from .sources import Purified, device_of, disturbed, parts, transform_of

REDUCTIONS = ("mean", "sum", "none")
# domain of beta, in words and as a test, for the divergences that read it
MIXTURES = {
    "jensen_shannon": ("0 < beta < 1", lambda beta: 0 < beta < 1),
    "skew_kl": ("0 <= beta < 1", lambda beta: 0 <= beta < 1),
    "skew_reverse_kl": ("0 < beta <= 1", lambda beta: 0 < beta <= 1),
}
# ends of beta where a mixture is one side alone: no loop has to take the logarithm of a mixture that is not one
ENDS = {"skew_kl": (0, "forward_kl"), "skew_reverse_kl": (1, "reverse_kl")}


def run(*args):
    """The tile loop: itself, or as an operator where torch.compile looks on."""
    if torch.compiler.is_compiling():
        return operators.run(*args)
    with torch.autocast(args[1][0].device.type, enabled=False):
        return loop.run(*args)


@cache
def scale_kernel():
    """kernels/scale.py, or None without Triton."""
    try:
        from .kernels.scale import scale
    except ImportError:
        return None
    return scale


def scaled(grad, factor, dtype):
    """grad * factor in dtype; in grad's own memory when this backward is the last to read it."""
    if grad is None:
        return None
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return (grad * factor).to(dtype)
    if not grad.is_cuda:
        if factor.numel() != 1 or not visible(factor) or factor.item() != 1:
            grad.mul_(factor)
        return grad.to(dtype)
    out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    one = factor.numel() == 1 and grad.dtype != torch.float64 and grad.is_contiguous()
    if one and scale_kernel():
        return scale_kernel()(grad, factor, out)
    return torch.mul(grad, factor, out=out)


def weighted(loss, weight):
    """loss * weight; a row of weight 0 does not count, though its loss be infinite."""
    return loss if weight is None else (loss * weight).where(weight != 0, 0)


class Total(torch.autograd.Function):
    """sum_i weight_i loss_i of the rows. Forward computes the gradients too; backward only scales them."""

    @staticmethod
    def forward(ctx, x, weight, bias, call, row_weight, wants, metrics):
        loss, table, *grads = run(call, (x, weight, bias), row_weight, wants, metrics)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        total = weighted(loss, row_weight).sum()
        if table is None:
            table = loss.new_empty(0)
        ctx.mark_non_differentiable(table)
        return total, table

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, _):
        grads = (scaled(g, factor, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *grads, None, None, None, None


class Rows(torch.autograd.Function):
    """Loss of every row. The gradient of the rows that come back is not known before: logits keep the gradient of each
    row and scale it, heads are run again."""

    @staticmethod
    def forward(ctx, x, weight, bias, call, row_weight, wants, metrics):
        ctx.again = (call, row_weight, wants) if weight is not None else None
        loss, table, *grads = run(call, (x, weight, bias), row_weight, [False] * 3 if ctx.again else wants, metrics)
        ctx.save_for_backward(*((x, weight, bias) if ctx.again else grads))
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        if table is None:
            table = loss.new_empty(0)
        ctx.mark_non_differentiable(table)
        return weighted(loss, row_weight), table

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, _):
        if not ctx.again:
            return scaled(ctx.saved_tensors[0], factor.unsqueeze(-1), ctx.dtypes[0]), *[None] * 6
        call, row_weight, wants = ctx.again
        factor = (factor if row_weight is None else factor * row_weight).contiguous()
        _, _, *grads = run(call, ctx.saved_tensors, factor, wants, False)
        grads = (g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *grads, None, None, None, None


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
    weight=None,
    reduction="mean",
    num_items=None,
    ignore_index=-100,
    vocab=None,
    floor=None,
    tiles="float32",
    memory=None,
    metrics=False,
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
            to be copied. Rows labelled ignore_index cost 0 and, with heads, no products. On CUDA with heads the host
            waits once, for their number.
        hard_weight: the cross entropy of the student against labels, at temperature 1, is added this many times.
        weight: (...) factors of the rows' losses, not negative, any float dtype; they do not change the denominator of
            the mean. No gradient.
        reduction: "mean" over num_items, "sum", or "none": (...) losses. With "none" and a Head, backward computes the
            tiles again, for it alone knows each row's upstream gradient; no other case computes anything twice.
        num_items: denominator of the mean, and for no other reduction: a number or a tensor of one; None: the rows not
            ignored. 0 counts as 1.
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
            teacher_entropy, confidence, purification, agreement (hkdfast.objective.METRICS says what each is).
        backend: "cpu", "triton" or "reference"; None picks the fastest that is built for the device.

    Returns:
        Scalar loss, or (...) with reduction "none", in nats: float32 (float64 for float64 inputs); (loss, dict) with
        metrics. Where every row is ignored: 0 that can be differentiated.

    Raises:
        ValueError: on unknown words, numbers out of range, shapes, devices or vocabularies that do not fit, labels
            outside the vocabulary (CPU; on CUDA a device assertion), negative weights (CPU), a reverse_kl to a teacher
            that drops words without a floor, or memory too small for one row.
        ImportError: if the backend asked for is not built here; `hkdfast.backends()` tells why.

    Sources: Hinton et al., 2015 (arXiv:1503.02531); Gu et al., 2024 (arXiv:2306.08543); Agarwal et al., 2024
    (arXiv:2306.13649); Ko et al., 2024 (arXiv:2402.03898); Wen et al., 2023 (arXiv:2307.15190).
    """
    check_word("divergence", divergence, DIVERGENCES)
    check_word("reduction", reduction, REDUCTIONS)
    check_options(temperature=temperature, tiles=tiles, memory=memory, backend=backend)
    check_numbers(divergence=divergence, beta=beta, hard_weight=hard_weight, floor=floor)
    check_num_items(num_items, reduction)
    if divergence in ENDS and beta == ENDS[divergence][0]:
        divergence = ENDS[divergence][1]
    law = teacher.law if isinstance(teacher, Purified) else None
    branches = [teacher.clean, *teacher.noisy] if law else [teacher]
    check_source("student", student)
    for branch in branches:
        check_source("teacher", branch)
        check_pair("student", student, "teacher", branch)
    words = check_vocab([student, *branches], vocab)
    lead, device = tuple(student.shape[:-1]), device_of(student)
    check_labels(labels, lead, device)
    check_weights("weight", weight, lead, device)
    if labels is None and hard_weight:
        raise ValueError(f"hard_weight {hard_weight} needs labels")
    check_target(law, labels)
    if law and law.outside == "drop" and law.plausibility and divergence == "reverse_kl" and floor is None:
        raise ValueError(
            'reverse_kl to a teacher that drops words is infinite: give a floor, e.g. floor=-30, or outside="clean"'
        )
    if tiles == "difference":
        check_shared([student, *branches])

    n = math.prod(lead)
    x, head, bias = parts(student, n)
    if tiles != "float32" and x.dtype == torch.float64:
        raise ValueError(f'tiles={tiles!r} are of 16 bits: heads of float64 take "float32", which then is float64')
    parted = [parts(branch, n) for branch in branches]
    noisy, draws = disturbed(branches[1:]) if law else (Transform(), [])
    objective = Objective(
        divergence=divergence,
        beta=float(beta) if divergence in MIXTURES else 0.5,
        temperature=float(temperature),
        soft_weight=float(temperature) ** 2 if t_squared else 1.0,
        hard_weight=float(hard_weight),
        ignore_index=ignore_index,
        floor=-math.inf if floor is None else float(floor),
        difference=tiles == "difference",
        student=transform_of(student),
        teacher=transform_of(branches[0]),
        noisy=noisy,
        law=law,
    )
    exact = torch.promote_types(x.dtype, torch.float32)
    labels, weight, alpha = (
        t if t is None else t.detach().reshape(n).contiguous() for t in (labels, weight, teacher.alpha if law else None)
    )
    weight, alpha = (t if t is None else t.to(exact) for t in (weight, alpha))
    share = 1.0 if reduction != "mean" else reciprocal(num_items, n, labels, ignore_index, exact)
    # logits keep the gradient that backward returns, so the mean goes into it before it is rounded to their dtype; a
    # head keeps float32 sums, which the mean scales late, so that no tile of a 16-bit dtype underflows
    early = head is None and reduction == "mean"
    if early:
        weight = (torch.ones(n, dtype=exact, device=x.device) if weight is None else weight) * share
    call = loop.Call(
        xs=[t[0].detach() for t in parted],
        weights=[t[1] if t[1] is None else t[1].detach() for t in parted],
        biases=[t[2] if t[2] is None else t[2].detach() for t in parted],
        labels=labels,
        alpha=alpha,
        objective=objective,
        draws=draws,
        vocab=words,
        compute=loop.autocast_dtype(x.device),
        tiles=tiles,
        memory=None if memory is None else int(memory),
        backend=backend,
    )
    grad = torch.is_grad_enabled()
    wants = [grad and t is not None and t.requires_grad for t in (x, head, bias)]
    loss, table = (Rows if reduction == "none" else Total).apply(x, head, bias, call, weight, wants, metrics)
    if reduction == "none":
        loss = loss.reshape(lead)
    elif reduction == "mean" and not early:
        loss = loss * share
    if not metrics:
        return loss
    return loss, {name: row.reshape(lead) for name, row in zip(METRICS, table, strict=True)}


def reciprocal(num_items, n, labels, ignore_index, dtype):
    """1 / the denominator of the mean, 1 where that is 0; on the device where only the device knows it."""
    if num_items is None:
        num_items = n if labels is None else (labels != ignore_index).sum()
    if not isinstance(num_items, torch.Tensor):
        return 1 / num_items if num_items else 1.0
    num_items = num_items.detach().reshape(()).to(dtype)
    return 1 / num_items.where(num_items > 0, 1)


def check_numbers(*, divergence, beta, hard_weight, floor):
    if divergence in MIXTURES and not MIXTURES[divergence][1](beta):
        raise ValueError(f"{divergence} takes {MIXTURES[divergence][0]}, got {beta}; ask for an end point by its name")
    if not 0 <= hard_weight < math.inf:
        raise ValueError(f"hard_weight must be finite and not negative, got {hard_weight}")
    if floor is not None and not -math.inf < floor <= 0:
        raise ValueError(f"floor is a log-probability, finite and not above 0, got {floor}")


def check_num_items(num_items, reduction):
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f'num_items is the denominator of reduction="mean", which is {reduction!r} here')
    if isinstance(num_items, torch.Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got a tensor {tuple(num_items.shape)}")
    elif not 0 <= num_items < math.inf:
        raise ValueError(f"num_items must be finite and not negative, got {num_items}")
