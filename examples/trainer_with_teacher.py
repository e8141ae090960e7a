"""A teacher in transformers' Trainer, by one line: python examples/trainer_with_teacher.py"""

from tiny_models import language_model, tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hkdfast.hf import apply


def main(folder="out/trainer_with_teacher"):
    args = TrainingArguments(folder, max_steps=20, learning_rate=1e-2, logging_steps=1)
    words = tokenizer()
    data = [words(text) for text in ("is there a cat ? yes", "is there a dog in the image ? no")] * 8
    trainer = Trainer(language_model(width=32), args, DataCollatorForLanguageModeling(words, mlm=False), data)
    teacher = language_model(width=64, spread=0.5).to(args.device)
    apply(trainer, "forward_kl", teacher=teacher, hard_weight=0.1)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
