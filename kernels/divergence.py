"""The divergences as Triton device functions: value and slope of a block of words.

A function gets p, q, gap = log p - log q (0 for a word that neither side has) and beta, and returns
- value, in a form that has no term below 0 where that is possible: it carries CENTRE * (p - q), which sums to 0;
- slope, d value / d log q up to a multiple of q, which the softmax Jacobian removes: the form that is 0 at p = q.
Both follow gap, not p and q, where the two nearly cancel.
"""

import triton
import triton.language as tl


@triton.jit
def curve(x):
    """(exp(x) - 1 - x) / x**2 for |x| <= 1/2, relative error below 1e-7 (Taylor)."""
    tail = 1 / 720 + x * (1 / 5040 + x * (1 / 40320))
    return 0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * tail)))


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + x * x * curve(x), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """For x > -1; Kahan: what 1 + x rounds away comes back as the quotient."""
    whole = 1 + x
    return tl.log(whole) + (x - (whole - 1)) / whole


@triton.jit
def excess(p, q, gap):
    """p - q."""
    return tl.where(tl.abs(gap) < 0.5, q * (gap + gap * gap * curve(gap)), p - q)


@triton.jit
def forward_kl(p, q, gap, beta):
    bend = curve(gap)
    far = tl.where(p > 0, p * gap, 0.0) - (p - q)
    value = tl.where(tl.abs(gap) < 0.5, q * gap * gap * (1 + gap * bend - bend), far)
    return value, -excess(p, q, gap)


@triton.jit
def reverse_kl(p, q, gap, beta):
    slope = tl.where(q > 0, -q * gap, 0.0)
    value = tl.where(tl.abs(gap) < 0.5, q * gap * gap * curve(gap), slope + (p - q))
    return value, slope


@triton.jit
def mixture(gap, beta):
    """(log(m / p), log(m / q), q / m) for m = beta p + (1 - beta) q, in units of the larger of p and q."""
    # beyond 80 the smaller side is below float32 and only multiplies: finite keeps 0 * gap at 0
    gap = tl.minimum(tl.maximum(gap, -80.0), 80.0)
    smaller = tl.exp(-tl.abs(gap))
    share = tl.where(gap < 0, beta, 1 - beta)  # of the smaller
    part = share * expm1(-tl.abs(gap))
    m = tl.where(gap < 0, 1 - beta, beta) + share * smaller
    log_m = tl.where(part > -0.5, log1p(tl.maximum(part, -0.5)), tl.log(m))
    return log_m + tl.maximum(-gap, 0.0), log_m + tl.maximum(gap, 0.0), tl.where(gap < 0, 1.0, smaller) / m


@triton.jit
def jensen_shannon(p, q, gap, beta):
    m_over_p, m_over_q, _ = mixture(gap, beta)
    slope = -(1 - beta) * q * m_over_q
    return slope - beta * p * m_over_p, slope


@triton.jit
def skew_kl(p, q, gap, beta):
    m_over_p, _, share = mixture(gap, beta)
    step = (1 - beta) * excess(p, q, gap)
    return -p * m_over_p - step, -(1 - beta) * step * share


@triton.jit
def skew_reverse_kl(p, q, gap, beta):
    _, m_over_q, share = mixture(gap, beta)
    step = beta * excess(p, q, gap)
    return step - q * m_over_q, (1 - beta) * step * share - q * m_over_q


@triton.jit
def total_variation(p, q, gap, beta):
    # the sign from gap: p and q are rounded, and near convergence their difference has the sign of the rounding
    slope = tl.where(gap > 0, -0.5 * q, tl.where(gap < 0, 0.5 * q, 0.0))
    return 0.5 * tl.abs(excess(p, q, gap)), slope


CENTRE = {
    "forward_kl": lambda beta: -1.0,
    "reverse_kl": lambda beta: 1.0,
    "jensen_shannon": lambda beta: 0.0,
    "skew_kl": lambda beta: beta - 1.0,
    "skew_reverse_kl": lambda beta: beta,
    "total_variation": lambda beta: 0.0,
}

# What the slopes of a row sum to, if no sweep has to find out: 0, or minus the mean of gap under q.
TOTAL = {"forward_kl": "zero", "reverse_kl": "mean"}

# The formula at one end of beta is another divergence, whose code does not divide by what vanishes there.
ENDS = {("skew_kl", 0): "forward_kl", ("skew_reverse_kl", 1): "reverse_kl"}
