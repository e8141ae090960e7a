"""The same loss by others, on the same inputs. Each is a function of the divergence's name and of the tensors."""

from functools import cache

import torch
import torch.nn.functional as F

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}  # of the generalised JSD in TRL and Liger


def eager(divergence, student, teacher):
    """What a training script writes: float32 log-softmax of both sides, then the formula."""
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    if divergence == "forward_kl":
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    if divergence == "reverse_kl":
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).mean()
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    both = F.kl_div(log_m, log_p, log_target=True, reduction="none") + F.kl_div(
        log_m, log_q, log_target=True, reduction="none"
    )
    return both.sum(-1).mean() / 2


compiled = torch.compile(eager)


def eager_heads(divergence, hidden, weight, hidden_t, weight_t):
    return eager(divergence, F.linear(hidden, weight), F.linear(hidden_t, weight_t))


compiled_heads = torch.compile(eager_heads)


@cache
def liger_loss(divergence, compile):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # its defaults mix in half a cross entropy
    return LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[divergence], compiled=compile, chunk_size=1024
    )


def liger(divergence, hidden, weight, hidden_t, weight_t, compile=False):
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return liger_loss(divergence, compile)(hidden, weight, hidden_t, weight_t, labels)


def liger_compiled(*args):
    return liger(*args, compile=True)


def trl(divergence, hidden, weight, hidden_t, weight_t):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    loss, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, hidden_t, weight_t, None, BETA[divergence])
    return loss.mean()


LOGITS = {"eager": eager, "torch.compile": compiled}
HEADS = {
    "eager": eager_heads,
    "torch.compile": compiled_heads,
    "Liger chunked": liger,
    "Liger chunked, compiled": liger_compiled,
    "TRL ChunkedDivergence": trl,
}
