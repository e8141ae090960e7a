"""The divergences as Triton device functions: value and tilt of a block of words.

A function gets p, q, gap = log p - log q (0 for a word that neither side has) and beta, and returns
- value, in a form that has no term below 0 where that is possible: it carries RECENTERING * (p - q), which sums to 0;
- tilt, (d value / d log q) / q up to a constant, which the softmax Jacobian removes. It is bounded or grows like gap,
  so that q * tilt is 0 for a word that the student all but excludes. Forward KL's, -p / q, is not: that function
  returns d value / d log q itself, plus the multiple of q that makes it 0 at p = q (KIND below).
Both follow gap, not p and q, where the two nearly cancel.
"""

import triton
import triton.language as tl

# Above it the student's q = p exp(-gap) is 0 in float32; a gap held finite keeps 0 * gap at 0.
WIDEST = tl.constexpr(104.0)


@triton.jit
def expm1_remainder(x):
    """(exp(x) - 1 - x) / x**2 for |x| <= 1/2, relative error below 1e-7 (Taylor)."""
    tail = 1 / 720 + x * (1 / 5040 + x * (1 / 40320))
    return 0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * tail)))


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + x * x * expm1_remainder(x), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """For x > -1; Kahan: what 1 + x rounds away comes back as the quotient."""
    whole = 1 + x
    return tl.log(whole) + (x - (whole - 1)) / whole


@triton.jit
def excess(p, q, gap):
    """p - q."""
    return tl.where(tl.abs(gap) < 0.5, q * (gap + gap * gap * expm1_remainder(gap)), p - q)


@triton.jit
def forward_kl(p, q, gap, beta):
    remainder = expm1_remainder(gap)
    over = excess(p, q, gap)
    far = tl.where(p > 0, p * gap, 0.0) - over
    return tl.where(tl.abs(gap) < 0.5, q * gap * gap * (1 + gap * remainder - remainder), far), -over


@triton.jit
def reverse_kl(p, q, gap, beta):
    far = (p - q) - tl.where(q > 0, q * gap, 0.0)
    return tl.where(tl.abs(gap) < 0.5, q * gap * gap * expm1_remainder(gap), far), -tl.minimum(gap, WIDEST)


@triton.jit
def mixture(gap, beta):
    """(log(m / p), log(m / q), p / m) for m = beta p + (1 - beta) q, in units of the larger of p and q."""
    gap = tl.minimum(tl.maximum(gap, -WIDEST), WIDEST)
    smaller = tl.exp(-tl.abs(gap))
    share = tl.where(gap < 0, beta, 1 - beta)  # of the smaller
    part = share * expm1(-tl.abs(gap))
    m = tl.where(gap < 0, 1 - beta, beta) + share * smaller
    log_m = tl.where(part > -0.5, log1p(tl.maximum(part, -0.5)), tl.log(m))
    return log_m + tl.maximum(-gap, 0.0), log_m + tl.maximum(gap, 0.0), tl.where(gap < 0, smaller, 1.0) / m


@triton.jit
def jensen_shannon(p, q, gap, beta):
    m_over_p, m_over_q, _ = mixture(gap, beta)
    tilt = -(1 - beta) * m_over_q
    return q * tilt - beta * p * m_over_p, tilt


@triton.jit
def skew_kl(p, q, gap, beta):
    m_over_p, _, p_over_m = mixture(gap, beta)
    # not 0 at p = q: where p is far below q at the words that matter, any constant beside it would cost its rounding
    return -p * m_over_p - (1 - beta) * excess(p, q, gap), -(1 - beta) * p_over_m


@triton.jit
def skew_reverse_kl(p, q, gap, beta):
    _, m_over_q, p_over_m = mixture(gap, beta)
    return beta * excess(p, q, gap) - q * m_over_q, beta * p_over_m - m_over_q


@triton.jit
def total_variation(p, q, gap, beta):
    # the sign from gap: p and q are rounded, and near convergence their difference has the sign of the rounding
    return 0.5 * tl.abs(excess(p, q, gap)), tl.where(gap > 0, -0.5, tl.where(gap < 0, 0.5, 0.0))


RECENTERING = {
    "forward_kl": lambda beta: -1.0,
    "reverse_kl": lambda beta: 1.0,
    "jensen_shannon": lambda beta: 0.0,
    "skew_kl": lambda beta: beta - 1.0,
    "skew_reverse_kl": lambda beta: beta,
    "total_variation": lambda beta: 0.0,
}

# Whose gradient needs no sweep for the mean of the tilt under q: forward KL returns slopes, which sum to 0, and the
# mean of reverse KL's, minus that of gap, is gathered with the softmax sums. "tilt": all others.
KIND = {"forward_kl": "slope", "reverse_kl": "gap"}

# The formula at one end of beta is another divergence, whose code does not divide by what vanishes there.
ENDS = {("skew_kl", 0): "forward_kl", ("skew_reverse_kl", 1): "reverse_kl"}
