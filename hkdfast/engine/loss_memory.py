"""How much memory a loss of two heads takes, by arithmetic, and what the same loss from whole logits would take."""

from dataclasses import dataclass, replace

from .options import LossOptions
from .terms import build, loss_term, resolve
from .tile_loop import memory_needed

# float32 numbers for each position and token that a KL in plain PyTorch holds at its peak, in backward: counted by the
# profiler on a CPU, 5 with bfloat16 heads, 6 or 7 with float32 heads (tests/engine/test_loss_memory.py)
EAGER_COPIES = 5


@dataclass(frozen=True)
class LossMemory:
    """Bytes at the peak, beside the models: the gradients of hidden states and head are included."""

    fused: int  # of `distill_loss` and its gradients
    eager: int  # of the same from logits in PyTorch, at least


def loss_memory(student, teacher, rows, positions, divergence="forward_kl", **options):
    """The memory of one call of `distill_loss` with its backward.

    Args:
        student, teacher: Head of any hidden states (N, H), whose values are not read.
        rows: the call's rows.
        positions: for which eager code makes logits: every position of a batch.
        divergence, options: of `distill_loss`, no tensors among them.
    """
    heads = [resized(head, rows) for head in (student, teacher)]
    beta = options.pop("beta", 0.5)
    weight, _ = options.pop("divergence_weight", 1.0), options.pop("hard_weight", 0.0)  # labels change no size
    term = loss_term(0, 1, divergence, beta, weight)
    found = resolve(("student", "teacher"), heads, [term], LossOptions(**options))
    spec, tensors, wants = build(heads, [term], LossOptions(**options), found)
    fused = memory_needed(spec, tensors, wants, options.get("return_metrics", False))
    logits = positions * found.vocab
    head = sum(t.numel() for t, wanted in list(zip(tensors[0], wants[0], strict=True))[1:] if wanted)
    size = heads[0].weight.element_size()  # the head's gradient is made when all but one of the copies are gone
    return LossMemory(fused, max(4 * EAGER_COPIES * logits, size * (logits + head)))


def resized(head, rows):
    """The same head for so many rows, in the memory of one."""
    hidden = head.hidden.detach().new_zeros(1, head.hidden.shape[-1]).requires_grad_(head.hidden.requires_grad)
    return replace(head, hidden=hidden.expand(rows, -1))
