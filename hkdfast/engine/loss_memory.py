"""Predict the memory of a loss of two heads, and of the same loss from full logits."""

from dataclasses import dataclass, replace

from .options import LossOptions
from .terms import build, loss_term, resolve
from .tile_loop import memory_needed

# float32 values per position and token that a KL in plain PyTorch holds at its peak, in backward. Counted by the
# profiler on a CPU: 5 with bfloat16 heads, 6 or 7 with float32 heads (tests/engine/test_loss_memory.py)
EAGER_COPIES = 5


@dataclass(frozen=True)
class LossMemory:
    """Peak bytes in addition to the models, including the gradients of hidden states and head."""

    fused: int  # of `distill_loss`
    eager: int  # of the same loss from logits in PyTorch, at least


def loss_memory(student, teacher, rows, positions, divergence="forward_kl", **options):
    """The memory of one call of `distill_loss` and its backward.

    Args:
        student, teacher: Head with any hidden states (N, H); their values are not read.
        rows: number of rows of the call.
        positions: number of positions for which eager code computes logits: all positions of a batch.
        divergence, options: as in `distill_loss`, without tensors.
    """
    heads = [resized(head, rows) for head in (student, teacher)]
    beta = options.pop("beta", 0.5)
    weight, _ = options.pop("divergence_weight", 1.0), options.pop("hard_weight", 0.0)  # labels take no memory
    term = loss_term(0, 1, divergence, beta, weight)
    found = resolve(("student", "teacher"), heads, [term], LossOptions(**options))
    spec, tensors, wants = build(heads, [term], LossOptions(**options), found)
    fused = memory_needed(spec, tensors, wants, options.get("return_metrics", False))
    logits = positions * found.vocab
    head = sum(t.numel() for t, wanted in list(zip(tensors[0], wants[0], strict=True))[1:] if wanted)
    size = heads[0].weight.element_size()  # the head's gradient is allocated when one of the copies is left
    return LossMemory(fused, max(4 * EAGER_COPIES * logits, size * (logits + head)))


def resized(head, rows):
    """The same head with `rows` hidden states, expanded from one."""
    hidden = head.hidden.detach().new_zeros(1, head.hidden.shape[-1]).requires_grad_(head.hidden.requires_grad)
    return replace(head, hidden=hidden.expand(rows, -1))
