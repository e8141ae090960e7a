"""The definitions, written from the papers in plain PyTorch for any float dtype. Autograd computes every derivative.

p is the teacher's distribution, q the student's, both over the vocabulary (last dim). Values are in nats, per token:
their sum over the vocabulary is the divergence. A token of probability 0 on both sides contributes 0.

This module is also a backend, and defines the interface of a backend: the functions `rows` and `contrast`.
"""

import math

import torch

from .objective import METRICS


def cross(log_a, log_b):
    """a (log a - log b), 0 where a is 0."""
    a = log_a.exp()
    # the mask is inside the product: outside, autograd would multiply 0 by the infinite gap
    return a * torch.where(a > 0, log_a - log_b, 0)


def mix(log_p, log_q, beta):
    """log(beta p + (1 - beta) q); 0 for a token of probability 0 on both sides, where it is never read."""
    m = beta * log_p.exp() + (1 - beta) * log_q.exp()
    return torch.where(m == 0, 1, m).log()


def forward_kl(log_p, log_q, beta):
    """KL(p || q). Hinton et al., 2015 (arXiv:1503.02531)."""
    return cross(log_p, log_q)


def reverse_kl(log_p, log_q, beta):
    """KL(q || p), mode-seeking. Gu et al., 2024 (arXiv:2306.08543)."""
    return cross(log_q, log_p)


def jensen_shannon(log_p, log_q, beta):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. Agarwal et al., 2024 (arXiv:2306.13649)."""
    log_m = mix(log_p, log_q, beta)
    return beta * cross(log_p, log_m) + (1 - beta) * cross(log_q, log_m)


def skew_kl(log_p, log_q, beta):
    """KL(p || beta p + (1 - beta) q). Ko et al., 2024 (arXiv:2402.03898), whose alpha is this beta."""
    return cross(log_p, mix(log_p, log_q, beta))


def skew_reverse_kl(log_p, log_q, beta):
    """KL(q || beta p + (1 - beta) q). Ko et al., 2024 (arXiv:2402.03898), whose alpha is 1 - beta here."""
    return cross(log_q, mix(log_p, log_q, beta))


def total_variation(log_p, log_q, beta):
    """Half the L1 distance of p and q. Wen et al., 2023 (arXiv:2307.15190)."""
    return (log_p.exp() - log_q.exp()).abs() / 2


DIVERGENCES = {
    f.__name__: f
    for f in (
        forward_kl,
        reverse_kl,
        jensen_shannon,
        skew_kl,
        skew_reverse_kl,
        total_variation,
    )
}

# The divergences that read beta: its range, in words and as a test.
BETA_RANGES = {
    "jensen_shannon": ("0 < beta < 1", lambda beta: 0 < beta < 1),
    "skew_kl": ("0 <= beta < 1", lambda beta: 0 <= beta < 1),
    "skew_reverse_kl": ("0 < beta <= 1", lambda beta: 0 < beta <= 1),
}

# The limits of beta where a mixture is p or q alone, and the divergence it then is: no backend has to take the
# logarithm of a degenerate mixture.
LIMITS = {"skew_kl": (0, "forward_kl"), "skew_reverse_kl": (1, "reverse_kl")}

# The divergence with p and q swapped and beta replaced by 1 - beta: the gradient of the one in p is the gradient of the
# other in q.
SWAPPED = {
    "forward_kl": "reverse_kl",
    "reverse_kl": "forward_kl",
    "jensen_shannon": "jensen_shannon",
    "skew_kl": "skew_reverse_kl",
    "skew_reverse_kl": "skew_kl",
    "total_variation": "total_variation",
}


def logits(tile, transform):
    x = tile * transform.scale
    return x if transform.softcap is None else transform.softcap * torch.tanh(x / transform.softcap)


def entropy(log_p):
    return -cross(log_p, torch.zeros_like(log_p)).sum(-1)


def confidence(log_clean, measure, labels):
    """How certainty the clean branch is of its answer: (N,) between 0 and 1."""
    if measure == "max_prob":
        return log_clean.amax(-1).exp()
    if measure == "entropy":
        return 1 - entropy(log_clean) / math.log(max(log_clean.shape[-1], 2))  # of one word it is certainty
    return log_clean.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).exp()  # target


def contrast_weight(law, certainty, alpha):
    """The weight a of the noisy branch: (N,)."""
    if law.schedule == "per_row":
        return alpha.to(certainty.dtype)
    if law.schedule == "linear":
        return law.alpha * (1 - certainty)
    if law.schedule == "gate":
        return torch.where(certainty < law.threshold, law.alpha, torch.zeros_like(certainty))
    return torch.full_like(certainty, law.alpha)  # constant


def contrasted(law, log_clean, log_noisy, a):
    """Purified log-probabilities up to a constant per row: reconstruction of SEED (arXiv:2507.04680), VCD's contrast
    (arXiv:2311.16922) when extrapolating with a constant weight.

    A token that only the noisy branch masks keeps its clean log-probability: there is nothing to subtract.
    Inside the plausibility set (VCD's V_head) the tokens share the clean mass of the set by their purified odds, so
    that outside="clean" leaves every other token exactly its clean log-probability.
    """
    gain = 1 + a if law.mode == "extrapolate" else torch.ones_like(a)
    both = (log_clean != -math.inf) & (log_noisy != -math.inf)  # a NaN is no mask
    z = torch.where(both, gain.unsqueeze(-1) * log_clean - a.unsqueeze(-1) * log_noisy, log_clean)
    if law.plausibility == 0:
        return z
    inside = log_clean >= math.log(law.plausibility) + log_clean.amax(-1, keepdim=True)
    if law.outside == "drop":
        return z.masked_fill(~inside, -math.inf)
    mass = log_clean.masked_fill(~inside, -math.inf).logsumexp(-1, keepdim=True)
    odds = z.masked_fill(~inside, -math.inf).log_softmax(-1)
    return torch.where(inside, odds + mass, log_clean)


def teacher_log_probs(objective, clean, noisy, alpha, labels):
    """(log p at the temperature, confidence, contrast weight) from logits."""
    law = objective.law
    if law is None:
        log_p = (clean / objective.temperature).log_softmax(-1)
        certainty = log_p.amax(-1).exp()
        return log_p, certainty, torch.zeros_like(certainty)
    log_clean, log_noisy = clean.log_softmax(-1), noisy.log_softmax(-1)
    certainty = confidence(log_clean, law.confidence, labels)
    a = contrast_weight(law, certainty, alpha)
    return (
        (contrasted(law, log_clean, log_noisy, a) / objective.temperature).log_softmax(-1),
        certainty,
        a,
    )


def rows(objective, student, teacher, noisy, alpha, labels, row_weight, loss, grad, metrics):
    """The row operation: loss, gradient and metrics of every row of a block of tiles.

    Args:
        objective: Objective, every scalar.
        student: (N, V) tile, any float dtype, unit stride along V, any stride along N.
        teacher: (N, V) tile, likewise; the clean branch if there is a contrast. The dtypes of the tiles may differ.
        noisy: (N, V) tile, or None without a contrast.
        alpha: (N,) float32 contrast weights if law.schedule == "per_row", else None.
        labels: (N,) int64 or None. A row whose label is ignore_index has loss 0: its outputs are zeros. One
            labeled UNLABELED has no cross entropy.
        row_weight: (N,) float32 factor of each row's gradient, or None for 1. The loss is not multiplied by it.
        loss: (N,) float32 output: soft_weight * divergence + hard_weight * cross entropy.
        grad: (N, V) output of the student tile's values (before scale and softcap), any float dtype, or None if no
            gradient is required. It may be the student tile itself. 0 for a masked token (-inf logit), and for the
            whole row if its weight is 0 or its loss infinite; NaN for the whole row if its loss is NaN or its weight
            not finite. With objective.accumulate all this is added to grad's values, summed in float32 or float64;
            grad is not the student tile then.
        metrics: (len(METRICS), N) float32 output, or None.

    float64 tiles with float64 outputs are computed in float64: this backend is the oracle of the tests.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    soft = DIVERGENCES[objective.divergence]
    live = torch.ones_like(loss, dtype=torch.bool) if labels is None else labels != objective.ignore_index
    with torch.enable_grad():
        x = student.detach().to(dtype, copy=True).requires_grad_()
        offset = x.detach() if objective.difference else 0
        clean = logits(teacher.to(dtype) + offset, objective.teacher)
        noisy_logits = None if noisy is None else logits(noisy.to(dtype) + offset, objective.noisy)
        z = logits(x, objective.student)
        log_q = (z / objective.temperature).log_softmax(-1)
        log_p, certainty, a = teacher_log_probs(objective, clean, noisy_logits, alpha, labels)
        floored = torch.where(log_q > -math.inf, log_p.clamp(min=objective.teacher_floor), log_p)
        divergence = soft(floored, log_q, objective.beta).sum(-1)
        hard = torch.zeros_like(divergence)
        if labels is not None:
            target = labels.clamp(min=0).unsqueeze(-1)
            hard = (-z.log_softmax(-1).gather(-1, target).squeeze(-1)).where(labels >= 0, 0)
        # a label that the student masks has an infinite cross entropy, and 0 * inf would be NaN
        hard_part = objective.hard_weight * hard if objective.hard_weight else torch.zeros_like(hard)
        total = objective.soft_weight * divergence + hard_part
        total = total.where(live, 0)
        if grad is not None:
            factor = (
                torch.ones_like(total) if row_weight is None else row_weight.to(dtype, copy=True)
            )  # copied, as it may be an inference-mode tensor
            (exact,) = torch.autograd.grad((total * factor).where(total.isfinite(), 0).sum(), x)
            exact = exact.where(x != -math.inf, 0)
            sound = (total.isfinite() & factor.isfinite()).unsqueeze(-1)
            without = ~live | total.isinf() | (factor == 0)
            exact = exact.where(sound, math.nan).where(~without.unsqueeze(-1), 0)
            grad.copy_(grad.to(dtype) + exact if objective.accumulate else exact)
    # a divergence is never negative; near 0 the sum of its rounded terms can be
    divergence = divergence.detach().clamp(min=0)
    loss.copy_((objective.soft_weight * divergence + hard_part.detach()).where(live, 0))
    if metrics is not None:
        agree = log_p.argmax(-1) == log_q.argmax(-1)
        columns = (divergence, hard, entropy(log_q), entropy(log_p), certainty, a, agree)
        for out, column in zip(metrics, columns, strict=True):
            out.copy_(column.detach().where(live, 0))
    assert metrics is None or len(metrics) == len(METRICS)


def contrast(objective, clean, noisy, alpha, labels, out):
    """Purified log-probabilities for decoding: softmax of the contrast at the temperature, written to out (N, V).

    Only objective.teacher, .noisy, .temperature and .law are read; the other arguments are as in `rows`. The
    computation has the dtype of out, float32 or float64.
    """
    clean, noisy = logits(clean.to(out.dtype), objective.teacher), logits(noisy.to(out.dtype), objective.noisy)
    log_p, _, _ = teacher_log_probs(objective, clean, noisy, alpha, labels)
    out.copy_(log_p)
