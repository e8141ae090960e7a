"""Distill a teacher into a student by DistillTrainer: two models, examples of text, three lines.

    python examples/distill_trainer.py [--student NAME --teacher NAME]

Without names two tiny models are made here. Teacher and student must have one tokenizer.
"""

import argparse
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hkdfast.hf import DistillConfig, DistillTrainer

EXAMPLES = [
    {"prompt": "two plus two is", "completion": " four"},
    {"prompt": "three plus one is", "completion": None},  # nobody knows: learned from the teacher alone
]


def distill(student, teacher, tokenizer, folder, steps=30):
    config = DistillConfig(
        folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no", report_to="none"
    )
    trainer = DistillTrainer(student, teacher, config, train_dataset=EXAMPLES, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(folder)
    return [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]


def tiny():
    """(student, teacher, tokenizer)."""
    words = sorted({word for each in EXAMPLES for text in each.values() for word in (text or "").split()})
    vocab = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocab, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    sizes = dict(vocab_size=64, num_attention_heads=4, num_hidden_layers=1, bos_token_id=None, eos_token_id=1)
    student, teacher = (
        LlamaForCausalLM(LlamaConfig(hidden_size=width, intermediate_size=2 * width, **sizes)) for width in (32, 64)
    )
    torch.nn.init.normal_(teacher.lm_head.weight, std=0.5)  # an untrained teacher has little to say
    return student, teacher, tokenizer


def main(argv=None):
    parser = argparse.ArgumentParser(description="Distill a teacher into a student.")
    parser.add_argument("--student", help="folder or Hub name; without it two tiny models are made")
    parser.add_argument("--teacher", help="folder or Hub name")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    models = (args.student, args.teacher, AutoTokenizer.from_pretrained(args.student)) if args.student else tiny()
    with TemporaryDirectory() as folder:
        found = distill(*models, folder)
    print(f"divergence {found[0]:.3f} -> {found[-1]:.3f} nats a position")
    return found


if __name__ == "__main__":
    main()
