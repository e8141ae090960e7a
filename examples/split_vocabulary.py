"""A loss over a vocabulary that is split over processes, as Megatron and tensor parallelism split an LM head.

    torchrun --nproc-per-node 2 examples/split_vocabulary.py

Each process holds some rows of the head's weight and sees all hidden states. All get the loss of the whole vocabulary
and the gradient of their part. The gradient of the hidden states is summed over the processes. No logits move.
"""

import torch
from torch import distributed

from hkdfast import Head, Split, distill_loss

TOKENS, WIDTH, VOCABULARY = 64, 32, 1000


def main():
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    first, last = VOCABULARY * rank // size, VOCABULARY * (rank + 1) // size
    torch.manual_seed(0)  # the same numbers in every process; a model would have them in its memory
    hidden, weight, teacher = (
        torch.randn(TOKENS, WIDTH),
        torch.randn(VOCABULARY, WIDTH),
        torch.randn(TOKENS, VOCABULARY),
    )

    mine = torch.nn.Parameter(weight[first:last].clone())
    hidden.requires_grad_()
    split = Split(None, first, VOCABULARY)  # None: the default group
    loss = distill_loss(Head(hidden, mine), teacher[:, first:last], "reverse_kl", split=split)
    loss.backward()

    whole, everything = hidden.detach().clone().requires_grad_(), weight.clone().requires_grad_()
    expected = distill_loss(Head(whole, everything), teacher, "reverse_kl")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, whole.grad)
    torch.testing.assert_close(mine.grad, everything.grad[first:last])
    if rank == 0:
        print(f"{size} processes: loss {loss.item():.4f}, as of the whole vocabulary: {expected.item():.4f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
