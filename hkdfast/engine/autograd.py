"""The tile loop as autograd functions: the forward pass computes the gradients too."""

from functools import cache

import torch

from ..ops.dispatch import traced, visible
from . import operators
from . import tile_loop as loop
from .arguments import settled, without_autocast


def run(*args, **how):
    """The tile loop: itself, or as an operator where there are no numbers yet."""
    first = args[1][0][0]
    if traced(first):
        return operators.run(*args, **how)
    with without_autocast(first.device):
        return loop.run(*args, **how)


@cache
def scale_kernel():
    """kernels/scale.py, or None without Triton."""
    try:
        from ..kernels.scale import scale
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


def scaled_rows(grad, factor, dtype):
    """Likewise with a factor for each row. A row of factor 0 does not count, though its gradient be NaN."""
    if grad is None:
        return None
    factor = factor.unsqueeze(-1)
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return (grad * factor).where(factor != 0, 0).to(dtype)
    if not visible(factor):
        out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
        return torch.mul(grad, factor, out=out).masked_fill_(factor == 0, 0)
    grad.mul_(factor)
    left_out = factor.squeeze(-1) == 0
    if left_out.any():  # without a row, indexing would still cost a tenth of the product
        grad[left_out] = 0
    return grad.to(dtype)


def first_order(factor):
    """The upstream gradient, unless the gradient is to be differentiated: that it cannot be must not pass for 0."""
    if torch.compiler.is_compiling():
        return factor  # what torch.compile makes of a backward pass refuses it by itself
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the losses of hkdfast have no second derivatives: create_graph=True, as in gradient penalties and "
            "torch.autograd.functional.hessian, is not supported"
        )
    return settled(factor)


def keep(ctx, tensors):
    """Save tensors for backward; those of inference mode, which autograd refuses to save, on the side."""
    apart = [t is not None and not torch.compiler.is_compiling() and t.is_inference() for t in tensors]
    ctx.apart = [t if aside else None for t, aside in zip(tensors, apart, strict=True)]
    ctx.save_for_backward(*(None if aside else t for t, aside in zip(tensors, apart, strict=True)))


def kept(ctx):
    return [saved if aside is None else aside for saved, aside in zip(ctx.saved_tensors, ctx.apart, strict=True)]


def weighted(loss, weight):
    """loss * weight; a row of weight 0 does not count, though its loss be infinite or NaN."""
    return loss if weight is None else (loss * weight).where(weight != 0, 0)


def counted(call, losses):
    """Loss of every row over the lessons that count."""
    count = sum(lesson.counts for lesson in call.lessons)
    return losses[0] if count == 1 else losses[:count].sum(0)


def triples(tensors):
    """(x, weight, bias) at each place, of what autograd takes: one list."""
    return [tuple(tensors[i : i + 3]) for i in range(0, len(tensors), 3)]


def at_places(call, grads):
    """One list again: the gradients of the parties at the places of their tensors. An averaged party has none."""
    flat = [None] * 3 * (1 + max(place for party in call.parties for place in party.branches))
    for party, grad in zip(call.parties, grads, strict=True):
        flat[3 * party.branches[0] : 3 * party.branches[0] + 3] = grad
    return flat


class Total(torch.autograd.Function):
    """sum_i weight_i loss_i of the rows. Forward computes the gradients too; backward only scales them."""

    @staticmethod
    def forward(ctx, call, row_weight, wants, return_metrics, *tensors):
        losses, table, grads = run(call, triples(tensors), row_weight, wants, return_metrics)
        ctx.save_for_backward(*at_places(call, grads))
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        total = weighted(counted(call, losses), row_weight).sum()
        if table is None:
            table = losses.new_empty(0)
        ctx.mark_non_differentiable(table)
        return total, table

    @staticmethod
    def backward(ctx, factor, _):
        factor = first_order(factor)
        grads = (scaled(g, factor, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return None, None, None, None, *grads


class Rows(torch.autograd.Function):
    """Loss of every row. The gradient of the rows that come back is not known before: logits keep the gradient of each
    row and scale it, heads are run again."""

    @staticmethod
    def forward(ctx, call, row_weight, wants, return_metrics, *tensors):
        trained = [party.branches[0] for party, want in zip(call.parties, wants, strict=True) if any(want)]
        heads = any(tensors[3 * place + 1] is not None for place in trained)
        ctx.again = (call, row_weight, wants) if heads else None
        losses, table, grads = run(call, triples(tensors), row_weight, wants, return_metrics, deferred=heads)
        keep(ctx, tensors if heads else at_places(call, grads))
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        if table is None:
            table = losses.new_empty(0)
        ctx.mark_non_differentiable(table)
        return weighted(counted(call, losses), row_weight), table

    @staticmethod
    def backward(ctx, factor, _):
        factor = first_order(factor)
        if not ctx.again:
            grads = (scaled_rows(g, factor, dtype) for g, dtype in zip(kept(ctx), ctx.dtypes, strict=True))
            return None, None, None, None, *grads
        call, row_weight, wants = ctx.again
        factor = (factor if row_weight is None else factor * row_weight).contiguous()
        _, _, grads = run(call, triples(kept(ctx)), factor, wants, False)
        grads = at_places(call, grads)
        grads = (g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, None, *grads
