"""The tile loop as autograd functions: the forward pass computes the gradients too."""

from functools import cache

import torch

from ..ops.dispatch import host_readable, is_traced
from . import operators
from . import tile_loop as loop
from .arguments import settled, without_autocast
from .memory import capturing


def run(*args, **how):
    """The tile loop: called directly, or as an operator while tensors have no values yet (tracing, fake, meta)."""
    spec, first = args[0], args[1][0][0]
    if spec.part is not None and (is_traced(first) or capturing(first.device)):
        raise ValueError("a loss under a Split runs eagerly only: keep it out of torch.compile and of CUDA graphs")
    if is_traced(first):
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


def scale_grad(grad, factor, dtype):
    """grad * factor in dtype; in grad's own memory when this backward is the last to read it."""
    if grad is None:
        return None
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return (grad * factor).to(dtype)
    if not grad.is_cuda:
        if factor.numel() != 1 or not host_readable(factor) or factor.item() != 1:
            grad.mul_(factor)
        return grad.to(dtype)
    out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    one = factor.numel() == 1 and grad.dtype != torch.float64 and grad.is_contiguous()
    if one and scale_kernel():
        return scale_kernel()(grad, factor, out)
    return torch.mul(grad, factor, out=out)


def scale_grad_rows(grad, factor, dtype):
    """scale_grad with one factor per row. A row of factor 0 gets a zero gradient, even where its own is NaN."""
    if grad is None:
        return None
    factor = factor.unsqueeze(-1)
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return (grad * factor).where(factor != 0, 0).to(dtype)
    if not host_readable(factor):
        out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
        return torch.mul(grad, factor, out=out).masked_fill_(factor == 0, 0)
    grad.mul_(factor)
    left_out = factor.squeeze(-1) == 0
    if left_out.any():  # indexing costs a tenth of the product even if no row is selected
        grad[left_out] = 0
    return grad.to(dtype)


def first_order(factor):
    """The upstream gradient. Refuses a second derivative, which would otherwise silently be 0."""
    if torch.compiler.is_compiling():
        return factor  # a compiled backward refuses second derivatives itself
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the losses of hkdfast have no second derivatives: create_graph=True, as in gradient penalties and "
            "torch.autograd.functional.hessian, is not supported"
        )
    return settled(factor)


def save_tensors(ctx, tensors):
    """Save tensors for backward. Autograd refuses inference-mode tensors: those become an attribute."""
    inference = [t is not None and not torch.compiler.is_compiling() and t.is_inference() for t in tensors]
    ctx.inference = [t if aside else None for t, aside in zip(tensors, inference, strict=True)]
    ctx.save_for_backward(*(None if aside else t for t, aside in zip(tensors, inference, strict=True)))


def saved_tensors(ctx):
    return [saved if aside is None else aside for saved, aside in zip(ctx.saved_tensors, ctx.inference, strict=True)]


def apply_row_weight(loss, weight):
    """loss * weight. A row of weight 0 contributes 0, even where its loss is infinite or NaN."""
    return loss if weight is None else (loss * weight).where(weight != 0, 0)


def sum_terms(spec, losses):
    """The rows' losses, summed over the counted terms."""
    count = sum(term.counted for term in spec.terms)
    return losses[0] if count == 1 else losses[:count].sum(0)


def by_input(tensors):
    """Group the flat list that autograd takes into (x, weight, bias)."""
    return [tuple(tensors[i : i + 3]) for i in range(0, len(tensors), 3)]


def scatter_to_inputs(spec, grads):
    """Flatten the inputs' gradients into the order of the forward's tensors. An averaged teacher has no gradient."""
    flat = [None] * 3 * (1 + max(i for given in spec.inputs for i in given.branches))
    for given, grad in zip(spec.inputs, grads, strict=True):
        flat[3 * given.branches[0] : 3 * given.branches[0] + 3] = grad
    return flat


class ReducedLoss(torch.autograd.Function):
    """sum_i weight_i loss_i over the rows. Forward computes the gradients too; backward only scales them."""

    @staticmethod
    def forward(ctx, spec, row_weight, wants, return_metrics, *tensors):
        losses, table, grads = run(spec, by_input(tensors), row_weight, wants, return_metrics)
        ctx.save_for_backward(*scatter_to_inputs(spec, grads))
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        total = apply_row_weight(sum_terms(spec, losses), row_weight).sum()
        if table is None:
            table = losses.new_empty(0)
        ctx.mark_non_differentiable(table)
        return total, table

    @staticmethod
    def backward(ctx, factor, _):
        factor = first_order(factor)
        grads = (scale_grad(g, factor, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return None, None, None, None, *grads


class UnreducedLoss(torch.autograd.Function):
    """Unreduced losses. The upstream gradient is unknown in forward, so logits keep d loss / d logits and scale it
    in backward; heads recompute their tiles."""

    @staticmethod
    def forward(ctx, spec, row_weight, wants, return_metrics, *tensors):
        trained = [given.branches[0] for given, want in zip(spec.inputs, wants, strict=True) if any(want)]
        heads = any(tensors[3 * i + 1] is not None for i in trained)
        ctx.again = (spec, row_weight, wants) if heads else None
        losses, table, grads = run(spec, by_input(tensors), row_weight, wants, return_metrics, deferred=heads)
        save_tensors(ctx, tensors if heads else scatter_to_inputs(spec, grads))
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        if table is None:
            table = losses.new_empty(0)
        ctx.mark_non_differentiable(table)
        return apply_row_weight(sum_terms(spec, losses), row_weight), table

    @staticmethod
    def backward(ctx, factor, _):
        factor = first_order(factor)
        if not ctx.again:
            grads = (scale_grad_rows(g, factor, dtype) for g, dtype in zip(saved_tensors(ctx), ctx.dtypes, strict=True))
            return None, None, None, None, *grads
        spec, row_weight, wants = ctx.again
        factor = (factor if row_weight is None else factor * row_weight).contiguous()
        _, _, grads = run(spec, by_input(saved_tensors(ctx)), factor, wants, False)
        grads = scatter_to_inputs(spec, grads)
        grads = (g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, None, *grads
