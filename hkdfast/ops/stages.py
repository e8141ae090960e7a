"""The row operation over a vocabulary that is split over processes, in stages.

In each stage a process makes a few numbers of a row from its own tokens (`sums`), all processes gather those of all,
and each joins them in rank order to constants of the row (`combine`): the same bits everywhere. The gradient of the
process's own tokens (`write_gradient`) then needs the constants alone. Nothing of the size of the vocabulary moves.
"""

import math
from types import SimpleNamespace

import torch

from .objective import METRICS
from .reference import DIVERGENCES, contrast_weight, logits

LOW = -math.inf
KL = ("forward_kl", "reverse_kl")
# numbers of a row in each stage; the second is a sum that is never negative, which `FAILED` in its place denies
COUNTS = {"branches": 6, "set": 4, "softmax": 11, "terms": 3}
FAILED = -1.0
WORKSPACE = 64 << 20  # bytes of temporaries, about


def stages(objective, teacher_only=False):
    """The stages of an objective, in their order; teacher_only: of the purified teacher alone."""
    law, found = objective.law, []
    if law is not None:
        found.append("branches")
        if law.plausibility and law.outside == "clean":
            found.append("set")
    found.append("softmax")
    if not teacher_only and (objective.divergence not in KL or objective.teacher_floor > LOW):
        found.append("terms")
    return found


def rows(objective, student, teacher, noisy, alpha, labels, row_weight, loss, grad, metrics, part):
    """`reference.rows` of a row whose tokens several processes hold.

    Args:
        part: the process's part: `first`, its first token; `compared`, the number of tokens of all; and `gather`, from
            this process's numbers (K, N) float64 to those of all (R, K, N).
    """
    tiles = Tiles(objective, student, teacher, noisy, labels, part.first)
    known = SimpleNamespace()
    for stage in stages(objective):
        gather_stage(stage, tiles, part, known, alpha)
    value = known.value.clamp(min=0)
    hard = torch.zeros_like(value)
    if labels is not None:
        hard = known.hard.where(labels >= 0, 0)
    hard_part = objective.hard_weight * hard if objective.hard_weight else torch.zeros_like(hard)
    live = torch.ones_like(value, dtype=torch.bool) if labels is None else labels != objective.ignore_index
    total = (objective.soft_weight * value + hard_part).where(live, 0)
    loss.copy_(total)
    if metrics is not None:
        columns = (value, hard, known.student_entropy, known.teacher_entropy, known.confidence, known.a, known.agree)
        for out, column in zip(metrics, columns, strict=True):
            out.copy_(column.where(live, 0))
    if grad is not None:
        factor = torch.ones_like(total) if row_weight is None else row_weight.to(total.dtype, copy=True)
        for chunk in tiles.chunks():
            write_gradient(tiles.of(chunk), sliced(known, chunk), total[chunk], live[chunk], factor[chunk], grad[chunk])
    assert metrics is None or len(metrics) == len(METRICS)


def contrast(objective, clean, noisy, alpha, labels, out, part):
    """`reference.contrast` over the tokens of several processes: out (N, V_local) are this process's."""
    tiles = Tiles(objective, clean, clean, noisy, labels, part.first)
    known = SimpleNamespace()
    for stage in stages(objective, teacher_only=True):
        gather_stage(stage, tiles, part, known, alpha)
    for chunk in tiles.chunks():
        out[chunk] = log_probs(tiles.of(chunk), sliced(known, chunk))[0]


def gather_stage(stage, tiles, part, known, alpha):
    """One stage of all rows of a block: adds its constants to `known`."""
    numbers = [sums(stage, tiles.of(chunk), sliced(known, chunk)) for chunk in tiles.chunks()]
    made = combine(stage, tiles.objective, part.gather(torch.cat(numbers, 1)), alpha, part.compared)
    vars(known).update(made)


def sliced(known, chunk):
    return SimpleNamespace(**{name: x[chunk] for name, x in vars(known).items()})


class Tiles:
    """The tiles of a block, whose logits are made chunk by chunk, in float64: parts are joined without a trace."""

    def __init__(self, objective, student, teacher, noisy, labels, first):
        self.objective, self.labels, self.first = objective, labels, first
        self.tiles = student, teacher, noisy

    def chunks(self):
        rows, width = self.tiles[0].shape
        step = max(1, WORKSPACE // (12 * 8 * max(width, 1)))
        return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]

    def of(self, chunk):
        """The logits of some rows: x, the student's tile; student, clean, noisy, its and the teacher's logits."""
        objective = self.objective
        student, teacher, noisy = (None if t is None else t[chunk].to(torch.float64, copy=True) for t in self.tiles)
        offset = student if objective.difference else 0
        return SimpleNamespace(
            objective=objective,
            x=student,
            student=logits(student, objective.student),
            clean=logits(teacher + offset, objective.teacher),
            noisy=None if noisy is None else logits(noisy + offset, objective.noisy),
            labels=None if self.labels is None else self.labels[chunk],
            first=self.first,
        )


# what a process makes of its own tokens


def sums(stage, t, known):
    """(K, n) float64: this process's numbers of some rows."""
    return torch.stack([x.double() for x in SUMS[stage](t, known)])


def branches_sums(t, known):
    """Clean: peak, sum, moment, logit of the label. Noisy: peak, sum."""
    peak, total, moment, _ = exponentials(t.clean)
    return peak, total, moment, at_label(t.clean, t.labels, t.first), *exponentials(t.noisy)[:2]


def set_sums(t, known):
    """Over the tokens of the plausibility set: peak and sum of the clean probabilities, and of the contrast's odds."""
    log_clean, inside = log_clean_of(t, known), in_set(t, known)
    inner, odds = (x.masked_fill(~inside, LOW) for x in (log_clean, contrasted(t, known)))
    return *exponentials(inner)[:2], *exponentials(odds)[:2]


def softmax_sums(t, known):
    """Student: peak, sum, moment, all at the temperature; sum at temperature 1; logit of the label; most likely token.
    Teacher: peak, sum, moment, most likely token. And for a KL the sum of p or q times the gap of their logits."""
    objective, y = t.objective, teacher_logits(t, known)
    rate = 1 / objective.temperature
    q_peak, q_sum, q_moment, q = exponentials(t.student, rate)
    p_peak, p_sum, p_moment, p = exponentials(y, rate)
    lead = p if objective.divergence == "forward_kl" else q
    gap = torch.where(lead == 0, 0, lead * (y - t.student)).sum(-1)
    return (
        q_peak, q_sum, q_moment, exponentials(t.student)[1], at_label(t.student, t.labels, t.first),
        most_likely(t.student, t.first), p_peak, p_sum, p_moment, most_likely(y, t.first), gap,
    )  # fmt: skip


def terms_sums(t, known):
    """The sums over the tokens of a divergence's value, of q, and of the value's derivative by log q."""
    value, slope, log_q = terms(t, known)
    return value.sum(-1), log_q.exp().sum(-1), slope.sum(-1)


SUMS = {"branches": branches_sums, "set": set_sums, "softmax": softmax_sums, "terms": terms_sums}


def exponentials(x, rate=1.0):
    """(peak, sum of e, sum of d e, e) for d = x - peak and e = exp(rate d). A row without tokens has the peak -inf."""
    if not x.shape[-1]:
        zero = x.new_zeros(len(x))
        return zero + LOW, zero, zero, x
    peak = x.amax(-1)
    d = x - finite(peak)[:, None]
    e = (d * rate).exp()
    return peak, e.sum(-1), torch.where(e == 0, 0, d * e).sum(-1), e


def finite(x):
    """-inf is replaced by 0; a NaN stays."""
    return torch.where(x == LOW, 0, x)


def at_label(x, labels, first):
    """The logit of the row's label, -inf where another process has it."""
    if labels is None or not x.shape[-1]:
        return x.new_full((len(x),), LOW)
    place = labels - first
    own = (place >= 0) & (place < x.shape[-1])
    return x.gather(-1, place.clamp(0, x.shape[-1] - 1)[:, None])[:, 0].where(own, LOW)


def most_likely(x, first):
    return x.argmax(-1) + first if x.shape[-1] else x.new_full((len(x),), math.inf)


def log_clean_of(t, known):
    return (t.clean - known.clean_peak[:, None]) - known.clean_log_sum[:, None]


def in_set(t, known):
    return log_clean_of(t, known) >= known.least[:, None]


def contrasted(t, known):
    """The contrast of clean and noisy log-probabilities, as in `reference.contrasted`, before any plausibility."""
    log_clean = log_clean_of(t, known)
    log_noisy = (t.noisy - known.noisy_peak[:, None]) - known.noisy_log_sum[:, None]
    a = known.a[:, None]
    gain = 1 + a if t.objective.law.mode == "extrapolate" else torch.ones_like(a)
    both = (log_clean != LOW) & (log_noisy != LOW)
    return torch.where(both, gain * log_clean - a * log_noisy, log_clean)


def teacher_logits(t, known):
    """The teacher's logits; of a purified one its log-probabilities, up to a constant of the row."""
    law = t.objective.law
    if law is None:
        return t.clean
    z = contrasted(t, known)
    if not law.plausibility:
        return z
    inside = in_set(t, known)
    if law.outside == "drop":
        return z.masked_fill(~inside, LOW)
    return torch.where(inside, z + known.shift[:, None], log_clean_of(t, known))


def log_probs(t, known):
    """(log p, log q) at the temperature, of this process's tokens."""
    rate = 1 / t.objective.temperature
    log_p = (teacher_logits(t, known) - known.p_peak[:, None]) * rate - known.log_p_sum[:, None]
    return log_p, (t.student - known.q_peak[:, None]) * rate - known.log_q_sum[:, None]


def terms(t, known):
    """(value, its derivative by log q, log q) of each token."""
    objective = t.objective
    log_p, log_q = log_probs(t, known)
    floored = torch.where(log_q > LOW, log_p.clamp(min=objective.teacher_floor), log_p)
    with torch.enable_grad():
        x = log_q.detach().requires_grad_()
        value = DIVERGENCES[objective.divergence](floored, x, objective.beta)
        (slope,) = torch.autograd.grad(value.where(value.isfinite(), 0).sum(), x)
    return value.detach(), torch.where(log_q > LOW, slope, 0), log_q


# what all processes make of the numbers of all


def combine(stage, objective, gathered, alpha, words):
    """{name: (n,) float64 or bool}: constants of the rows.

    Args:
        gathered: (R, K, n) float64, the numbers of all processes.
        words: tokens of the whole vocabulary.
    """
    numbers = gathered.unbind(1)
    if stage == "branches":
        return combine_branches(objective.law, numbers, alpha, words)
    if stage == "set":
        mass, mass_sum = joined(*numbers[:2])
        odds, odds_sum = joined(*numbers[2:])
        return {"shift": mass + mass_sum.log() - odds - odds_sum.log()}
    if stage == "softmax":
        return combine_softmax(objective, numbers)
    value, share, slope = (x.sum(0) for x in numbers)
    return {"value": value, "mean_slope": slope / share}


def weights(peaks, rate=1.0):
    """(peak of all, factor of each process's sums)."""
    peak = peaks.amax(0)
    return peak, torch.where(peaks == LOW, 0, ((peaks - finite(peak)) * rate).exp())


def joined(peaks, totals, rate=1.0):
    """(peak, sum) over all processes."""
    peak, factor = weights(peaks, rate)
    return peak, (factor * totals).sum(0)


def joined_moment(peaks, totals, moments, rate=1.0):
    """(peak, sum, moment) over all processes."""
    peak, factor = weights(peaks, rate)
    shift = torch.where(peaks == LOW, 0, peaks - finite(peak))
    return peak, (factor * totals).sum(0), (factor * (moments + shift * totals)).sum(0)


def combine_branches(law, numbers, alpha, words):
    peak, total, moment = joined_moment(*numbers[:3])
    log_sum = total.log()
    noisy_peak, noisy_total = joined(*numbers[4:])
    confidence = {
        "max_prob": lambda: (-log_sum).exp(),
        "entropy": lambda: 1 - (log_sum - moment / total) / math.log(max(words, 2)),
        "target": lambda: (numbers[3].amax(0) - peak - log_sum).exp(),
    }[law.confidence]()
    found = {"clean_peak": peak, "clean_log_sum": log_sum, "confidence": confidence}
    found |= {"noisy_peak": noisy_peak, "noisy_log_sum": noisy_total.log()}
    found["a"] = contrast_weight(law, confidence, alpha)
    if law.plausibility:
        found["least"] = math.log(law.plausibility) - log_sum
    return found


def combine_softmax(objective, numbers):
    q_peaks, q_sums, q_moments, sums_1, labels, q_tops, p_peaks, p_sums, p_moments, p_tops, gaps = numbers
    rate = 1 / objective.temperature
    q_peak, q_sum, q_moment = joined_moment(q_peaks, q_sums, q_moments, rate)
    p_peak, p_sum, p_moment = joined_moment(p_peaks, p_sums, p_moments, rate)
    log_q, log_p = q_sum.log(), p_sum.log()
    peak, total = joined(q_peaks, sums_1)
    found = {
        "q_peak": q_peak, "log_q_sum": log_q, "p_peak": p_peak, "log_p_sum": log_p,
        "student_entropy": log_q - rate * q_moment / q_sum, "teacher_entropy": log_p - rate * p_moment / p_sum,
        "log_sum_1": total.log(), "hard": total.log() + peak - labels.amax(0),
        "agree": first_of(q_peaks, q_tops) == first_of(p_peaks, p_tops),
    }  # fmt: skip
    if objective.law is None:
        found |= {"confidence": (-log_p).exp(), "a": torch.zeros_like(log_p)}
    forward = objective.divergence == "forward_kl"
    _, factor = weights(p_peaks if forward else q_peaks, rate)
    mean = (factor * gaps).sum(0) / (p_sum if forward else q_sum)
    value = (mean - (p_peak - q_peak)) * rate - (log_p - log_q)
    found["value"] = value if forward else -value  # of a KL without a floor; else the stage "terms" gives it
    return found


def first_of(peaks, tops):
    """The first of the most likely tokens of all processes."""
    return torch.where(peaks == peaks.amax(0), tops, math.inf).amin(0)


# the gradient of a process's own tokens


def write_gradient(t, known, total, live, factor, grad):
    """The gradient of the rows' losses times `factor`, as `reference.rows` writes it."""
    objective = t.objective
    exact = soft_gradient(t, known) * (objective.soft_weight / objective.temperature)
    if t.labels is not None and objective.hard_weight:
        exact = exact + objective.hard_weight * hard_gradient(t, known)
    if objective.student.softcap is not None:
        exact = exact * (1 - (t.student / objective.student.softcap) ** 2)
    exact = (exact * objective.student.scale * factor[:, None]).where(t.x != LOW, 0)
    sound = (total.isfinite() & factor.isfinite())[:, None]
    without = ~live | total.isinf() | (factor == 0)
    exact = exact.where(sound, math.nan).where(~without[:, None], 0)
    grad.copy_(grad.to(exact.dtype) + exact if objective.accumulate else exact)


def soft_gradient(t, known):
    """The derivative of the divergence by the student's logits at the temperature."""
    log_p, log_q = log_probs(t, known)
    q = log_q.exp()
    if t.objective.divergence == "forward_kl" and t.objective.teacher_floor == LOW:
        return q - log_p.exp()
    if t.objective.divergence == "reverse_kl" and t.objective.teacher_floor == LOW:
        return torch.where(q > 0, q * (log_q - log_p - known.value[:, None]), 0)
    return terms(t, known)[1] - q * known.mean_slope[:, None]


def hard_gradient(t, known):
    """The derivative of the cross entropy by the student's logits."""
    made = ((t.student - known.q_peak[:, None]) - known.log_sum_1[:, None]).exp()
    place = t.labels - t.first
    own = (place >= 0) & (place < made.shape[-1])
    if made.shape[-1]:
        made.scatter_add_(1, place.clamp(0, made.shape[-1] - 1)[:, None], -own.to(made.dtype)[:, None])
    return made * (t.labels >= 0)[:, None]
