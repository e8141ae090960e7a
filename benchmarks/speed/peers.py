"""The same loss by others, on the same inputs. Each is a function of the divergence's name and of the tensors."""

import math
import sys
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from shapes import DEVICE, TINY

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}  # of the generalised JSD in TRL and Liger


def kl(log_p, log_q):
    return F.kl_div(log_q, log_p, log_target=True, reduction="none")


def between(divergence, log_q, log_p):
    """Mean over the rows, in the formulas of the papers, the mixture being of equal parts."""
    if divergence == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(-1).mean() / 2
    if divergence == "forward_kl":
        return kl(log_p, log_q).sum(-1).mean()
    if divergence == "reverse_kl":
        return kl(log_q, log_p).sum(-1).mean()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    if divergence == "skew_kl":
        return kl(log_p, log_m).sum(-1).mean()
    if divergence == "skew_reverse_kl":
        return kl(log_q, log_m).sum(-1).mean()
    return (kl(log_p, log_m) + kl(log_q, log_m)).sum(-1).mean() / 2


def eager(divergence, student, teacher):
    """What a training script writes: float32 log-softmax of both sides, then the formula."""
    return between(divergence, F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1))


def eager_heads(divergence, hidden, weight, hidden_t, weight_t):
    return eager(divergence, F.linear(hidden, weight), F.linear(hidden_t, weight_t))


def eager_purified(divergence, student, clean, noisy, alpha=1.5):
    log_p = (1 + alpha) * F.log_softmax(clean.float(), -1) - alpha * F.log_softmax(noisy.float(), -1)
    return between(divergence, F.log_softmax(student.float(), -1), F.log_softmax(log_p, -1))


def eager_contrast(clean, noisy, alpha=1.0, beta=0.1):
    """Visual contrastive decoding's step, with its plausibility set."""
    clean, noisy = clean.float(), noisy.float()
    low = clean < clean.amax(-1, keepdim=True) + math.log(beta)
    return F.log_softmax(((1 + alpha) * clean - alpha * noisy).masked_fill(low, -math.inf), -1)


# static shapes: the best that it can do
compiled, compiled_heads, compiled_purified, compiled_contrast = (
    torch.compile(function, dynamic=False) for function in (eager, eager_heads, eager_purified, eager_contrast)
)


@cache
def liger_chunked(divergence, compile):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # its defaults mix in half a cross entropy; without a weight it is computed all the same, which no option leaves out
    return LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[divergence], compiled=compile, chunk_size=1024
    )


def liger(divergence, hidden, weight, hidden_t, weight_t, compile=False):
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return liger_chunked(divergence, compile)(hidden, weight, hidden_t, weight_t, labels)


def liger_compiled(*args):
    return liger(*args, compile=True)


@cache
def liger_module(name, beta):
    from liger_kernel.transformers import LigerFusedLinearJSD, LigerJSD

    return {"fused": LigerFusedLinearJSD, "rows": LigerJSD}[name](beta)


def liger_fused(divergence, hidden, weight, hidden_t, weight_t):
    return liger_module("fused", BETA[divergence])(hidden, weight, hidden_t, weight_t)


def liger_rows(divergence, student, teacher):
    """Its Triton kernel takes log-probabilities."""
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return liger_module("rows", BETA[divergence])(log_q, log_p)


@cache
def trl_function():
    """TRL's autograd function. Where datasets is missing (60 MB for a GPU machine without an index), which the rest of
    TRL imports, its kernels are imported alone; of the rest they ask only to gather a head that ZeRO-3 has split."""
    if find_spec("datasets") is None:
        folder = Path(find_spec("trl").origin).parent
        for name, path in (("trl", folder), ("trl.trainer", folder / "trainer"), ("trl.trainer.utils", None)):
            module = sys.modules[name] = ModuleType(name)
            module.__path__ = [] if path is None else [str(path)]
        sys.modules["trl.trainer.utils"].maybe_gather_lm_head_ctx = lambda *weights: nullcontext()
    return import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction


def trl(divergence, hidden, weight, hidden_t, weight_t):
    loss, _ = trl_function().apply(hidden, weight, None, hidden_t, weight_t, None, BETA[divergence])
    return loss.mean()


LOGITS = {"eager": eager, "torch.compile": compiled}
HEADS = {
    "eager": eager_heads,
    "torch.compile": compiled_heads,
    "Liger chunked": liger,
    "Liger chunked, compiled": liger_compiled,
    "TRL ChunkedDivergence": trl,
}
PURIFIED = {"eager": eager_purified, "torch.compile": compiled_purified}
CONTRAST = {"eager": eager_contrast, "torch.compile": compiled_contrast}
if DEVICE == "cuda":
    LOGITS["Liger JSD"] = liger_rows
    HEADS["Liger fused JSD"] = liger_fused
if TINY:  # seconds of compiling for nothing
    LOGITS, HEADS, PURIFIED, CONTRAST = (
        {who: loss for who, loss in table.items() if "compile" not in who}
        for table in (LOGITS, HEADS, PURIFIED, CONTRAST)
    )


def knows(who, divergence):
    """Whether a peer has the divergence; hkdfast and the formulas have them all."""
    return divergence in BETA or not who.startswith(("Liger", "TRL"))
