"""A text-only teacher and student: instruction data, a loss on the answers alone, and a student that is saved.

    python examples/text_teacher_student.py [--teacher NAME --student NAME] [--steps N] [--output DIR]

Without names it makes two tiny models and a tokenizer. Teacher and student must have one tokenizer. Their heads may be
padded to different sizes: vocab="common" compares the tokens that both have.
"""

import argparse
import tempfile

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hkdfast import Head, distill_loss

DATA = [  # (prompt, answer)
    ("the capital of france is", "paris"),
    ("the capital of italy is", "rome"),
    ("two plus two is", "four"),
    ("the color of snow is", "white"),
]


def tiny_pair():
    """(teacher, student, tokenizer): a Qwen2 and a Llama of other width, depth and padded vocabulary."""
    words = sorted({word for pair in DATA for text in pair for word in text.split()})
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    teacher = Qwen2Config(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, **sizes)
    student = LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1, **sizes)
    return Qwen2ForCausalLM(teacher), LlamaForCausalLM(student), tokenizer


def batch_of(tokenizer):
    """Token ids, the mask, and the next token of each position of an answer; -100 elsewhere."""
    rows, answers = [], []
    for prompt, answer in DATA:
        start = tokenizer(prompt).input_ids
        end = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append(start + end)
        answers.append([-100] * len(start) + end)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in answers])
    return ids, mask, torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def head_of(model, ids, mask):
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    return Head(hidden, model.get_output_embeddings().weight)


def train(model, ids, mask, labels, steps, rate, teacher=None):
    """Teach a model: by the labels, or by a teacher. Returns the losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=rate), []
    for _ in range(steps):
        student = head_of(model.train(), ids, mask)
        if teacher is None:  # plain cross entropy, as in any training
            logits = student.hidden @ student.weight.T
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        else:
            with torch.no_grad():
                target = head_of(teacher.eval(), ids, mask)
            loss = distill_loss(student, target, "reverse_kl", labels=labels, hard_weight=0.1, vocab="common")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(argv=None):
    parser = argparse.ArgumentParser(description="Distill a text-only teacher into a student.")
    parser.add_argument("--teacher", help="folder or Hub name; without it two tiny models are made")
    parser.add_argument("--student", help="folder or Hub name")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", help="folder for the student; without it a temporary one")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.teacher and args.student:
        teacher, student = (AutoModelForCausalLM.from_pretrained(name) for name in (args.teacher, args.student))
        tokenizer, rate = AutoTokenizer.from_pretrained(args.teacher), 1e-5
        batch = batch_of(tokenizer)
    else:
        (teacher, student, tokenizer), rate = tiny_pair(), 1e-2
        batch = batch_of(tokenizer)
        train(teacher, *batch, steps=60, rate=1e-2)  # a teacher that knows the answers
    losses = train(student, *batch, steps=args.steps, rate=rate, teacher=teacher)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(args.output or folder)
        tokenizer.save_pretrained(args.output or folder)
        print(f"saved in {args.output or folder}")
    ids, mask, labels = batch
    with torch.no_grad():
        found = student.eval()(input_ids=ids, attention_mask=mask).logits.argmax(-1)
    right = (found == labels)[labels != -100].float().mean().item()
    print(f"answers right: {right:.0%}")
    return losses, right


if __name__ == "__main__":
    main()
