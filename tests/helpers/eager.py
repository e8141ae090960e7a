"""Models that learn from each other, pair by pair in plain PyTorch: full logits in float64, derivatives by autograd."""

import torch

from hkdfast import DIVERGENCES, Head
from hkdfast.batch import answer_rows


class Speaker(torch.nn.Module):
    """Sums the words so far; logits or a Head at the answer rows, of a hidden size and a vocabulary of its own."""

    def __init__(self, width, vocab, seed, heads=True):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(29, width)
        self.head = torch.nn.Linear(width, vocab)
        self.heads, self.grads = heads, None

    def forward(self, batch):
        self.grads = torch.is_grad_enabled()  # as it last ran
        hidden = torch.tanh(self.embedding(batch["input_ids"]).cumsum(1))[answer_rows(batch)[0]]
        return Head(hidden, self.head.weight, self.head.bias) if self.heads else self.head(hidden)


def batch(labeled=True, unlabeled=()):
    """Five sentences: the last three words are labeled, or the next one is to be distilled, for `unlabeled`."""
    ids = torch.randint(0, 29, (5, 6), generator=torch.Generator().manual_seed(3))
    found = {"input_ids": ids}
    if labeled:
        found["labels"] = ids.clone()
        found["labels"][:, :3] = -100
    if unlabeled:
        found["labels"][list(unlabeled)] = -100
        found["distill_only"] = torch.zeros_like(ids, dtype=torch.bool)
        found["distill_only"][list(unlabeled), -1] = True
    return found


def logits_of(model, batch):
    out = model(batch)
    return out.hidden @ out.weight.T + out.bias if isinstance(out, Head) else out


def coupled(logits, edges, labels, hard, *, temperature=1.0, unlabeled_weight=1.0, num_items=None, vocab=None):
    """The loss of models coupled by edges: mean over the rows, those with a negative label without cross entropy.

    Args:
        logits: list of (N, V_i).
        edges: list of (learner, source, weight, divergence, beta, detach).
        labels: (N,) or None.
        hard: weight of each model's cross entropy.
    """
    logits = [z[:, :vocab].double() for z in logits]
    rows = torch.zeros(len(logits[0]), dtype=torch.float64)
    for i, j, weight, divergence, beta, detach in edges:
        log_p, log_q = ((logits[k] / temperature).log_softmax(-1) for k in (j, i))
        rows = rows + weight * DIVERGENCES[divergence](log_p.detach() if detach else log_p, log_q, beta).sum(-1)
    if labels is not None:
        known = labels >= 0
        rows = rows * torch.where(known, 1.0, unlabeled_weight)
        for z, weight in zip(logits, hard, strict=True):
            found = -z.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
            rows = rows + weight * found.where(known, 0)
    return rows.sum() / (num_items or len(rows))


def gradients(loss, models):
    """One list of gradients per model; zeros where there is none."""
    loss.backward()
    found = [
        [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()] for model in models
    ]
    for model in models:
        model.zero_grad()
    return found


def assert_same(models, ours, truth, rtol=1e-4):
    """The same loss, and the same gradients of every model, relative to its largest."""
    assert torch.isclose(ours.double(), truth, rtol=rtol)
    for model, got, exact in zip(models, *(gradients(loss, models) for loss in (ours, truth)), strict=True):
        scale = max(grad.abs().max() for grad in exact)
        assert all((g - e).abs().max() <= rtol * scale for g, e in zip(got, exact, strict=True)), type(model).__name__
