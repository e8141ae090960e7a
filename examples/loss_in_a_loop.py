"""Distillation in a loop of your own: a small classifier of the next token learns from a larger one, without logits.

    python examples/loss_in_a_loop.py

Replace `Model` by your own: all that the loss needs are the hidden states before the LM head, and the head's weight.
"""

import torch
from torch import nn

from hkdfast import Head, distill_loss

VOCABULARY = 5000


class Model(nn.Module):
    """A recurrent language model."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def head(self, ids):
        """The Head at every position but the last: nothing is known about what follows it."""
        hidden, _ = self.body(self.embedding(ids))
        return Head(hidden[:, :-1], self.lm_head.weight)


def main(steps=60):
    torch.manual_seed(0)
    teacher, student = Model(width=64).eval(), Model(width=32)
    nn.init.normal_(teacher.lm_head.weight, std=1.0)  # an untrained teacher has little to say: let it have opinions
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    ids = torch.randint(VOCABULARY, (8, 17))  # your tokens; -100 in the labels marks padding
    labels = ids[:, 1:]
    losses = []
    for step in range(steps):
        with torch.no_grad():
            teacher_head = teacher.head(ids)
        loss, metrics = distill_loss(
            student.head(ids), teacher_head, "forward_kl", labels=labels, hard_weight=0.1, return_metrics=True
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            agreement = metrics["agreement"].mean()
            print(f"step {step:3}  loss {loss.item():.3f}  same first choice as the teacher {agreement:.0%}")
    return losses


if __name__ == "__main__":
    main()
