"""The whole loss in plain PyTorch: logits multiplied out, every derivative by autograd, in the dtype of its inputs."""

from dataclasses import replace

import torch

from hkdfast import DIVERGENCES, Head, backends
from hkdfast.heads import Purified
from hkdfast.ops.objective import Objective
from hkdfast.ops.reference import teacher_log_probs

USABLE = [name for name, why in backends().items() if why == "ok"]
FAST = [name for name in USABLE if name != "triton"]  # the interpreter of Triton takes seconds where these take none


def leaves(source):
    """The tensors of a source that can get a gradient."""
    given = (source.hidden, source.weight, source.bias) if isinstance(source, Head) else (source,)
    return [t for t in given if t is not None]


def as_leaves(source, dtype=None, grad=True):
    """A copy of a source, its tensors leaves that ask for a gradient."""

    def leaf(t):
        return None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_(grad)

    if isinstance(source, Purified):
        clean, noisy = as_leaves(source.clean, dtype, grad), tuple(as_leaves(one, dtype, grad) for one in source.noisy)
        return replace(source, clean=clean, noisy=noisy)
    if isinstance(source, Head):
        return replace(source, **{name: leaf(getattr(source, name)) for name in ("hidden", "weight", "bias")})
    return leaf(source)


def logits(source):
    if not isinstance(source, Head):
        return source
    z = source.hidden @ source.weight.T
    z = (z if source.bias is None else z + source.bias) * source.scale
    return z if source.softcap is None else source.softcap * torch.tanh(z / source.softcap)


def row_losses(
    student,
    teacher,
    divergence="forward_kl",
    *,
    beta=0.5,
    temperature=1.0,
    t_squared=False,
    labels=None,
    hard_weight=0.0,
    ignore_index=-100,
    vocab=None,
    teacher_floor=float("-inf"),
):
    """(...) losses, those of ignored rows 0."""
    z = logits(student)[..., :vocab]
    wide = torch.promote_types(z.dtype, torch.float32)
    z = z.to(wide)
    with torch.no_grad():
        if isinstance(teacher, Purified):
            clean = logits(teacher.clean)[..., :vocab].to(wide)
            noisy = torch.stack([logits(one)[..., :vocab].to(wide) for one in teacher.noisy]).mean(0)
            asked = Objective(temperature=temperature, law=teacher.law)
            log_p = teacher_log_probs(asked, clean, noisy, teacher.alpha, labels)[0]
        else:
            log_p = (logits(teacher)[..., :vocab].to(wide) / temperature).log_softmax(-1)
        log_p = log_p.clamp(min=teacher_floor)
    log_q = (z / temperature).log_softmax(-1)
    soft = DIVERGENCES[divergence](log_p, log_q, beta).sum(-1)
    loss = soft * temperature**2 if t_squared else soft
    if hard_weight:
        target = labels.clamp(min=0).unsqueeze(-1)
        loss = loss - hard_weight * z.log_softmax(-1).gather(-1, target).squeeze(-1)
    return loss if labels is None else loss.where(labels != ignore_index, 0)


def loss(student, teacher, divergence="forward_kl", *, row_weight=None, reduction="mean", num_items=None, **options):
    """What `distill_loss` returns."""
    rows = row_losses(student, teacher, divergence, **options)
    labels = options.get("labels")
    rows = rows if row_weight is None else rows * row_weight.to(rows.dtype)
    if reduction == "none":
        return rows
    counted = rows.numel() if labels is None else (labels != options.get("ignore_index", -100)).sum()
    return rows.sum() / (1 if reduction == "sum" else max(counted, 1) if num_items is None else num_items)


def through(source, given, student):
    """A source whose heads go through the student's new weight where they went through the given one."""
    if isinstance(source, Purified):
        clean, noisy = through(source.clean, given, student), tuple(through(x, given, student) for x in source.noisy)
        return replace(source, clean=clean, noisy=noisy)
    if isinstance(source, Head) and isinstance(given, Head) and source.weight is given.weight:
        return replace(source, weight=student.weight)
    return source


def with_gradients(function, student, teacher, *args, upstream=None, **options):
    """[value, gradient of each tensor of the student] of a loss function, on fresh leaves."""
    given, student = student, as_leaves(student)
    teacher = through(teacher, given, student)
    value = function(student, teacher, *args, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value.dtype))
    return [value.detach(), *(t.grad for t in leaves(student))]


def exactly(student, teacher, *args, **options):
    """with_gradients of the plain loss in float64."""
    return with_gradients(loss, as_leaves(student, torch.float64), as_leaves(teacher, torch.float64), *args, **options)


def off(got, exact):
    """Relative error: norm of the difference over norm of the exact."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def near_and_far(apart, dtype=torch.bfloat16, rows=48, width=64, vocab=2000, spread=6.0, seed=0, shared=False):
    """Two heads whose logits have this spread; the teacher's hidden states are the student's and `apart` of noise.

    Forward KL falls from 20 to 2e-5 as apart goes from None (independent) to 0.0015.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, noise = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * spread / width**0.5
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    other = noise if apart is None else hidden.double() + apart * noise
    # a teacher of twice the width, half of it without effect, unless both share one head
    if shared:
        return Head(hidden, weight), Head(other.to(dtype), weight)
    wide = torch.cat([other, torch.zeros_like(other)], 1)
    return Head(hidden, weight), Head(wide.to(dtype), torch.cat([weight, weight], 1))
