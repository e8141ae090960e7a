"""hkdfast in TRL's DistillationTrainer, which learns from its own answers: python examples/trl_distillation.py"""

from datasets import Dataset
from tiny_models import language_model, tokenizer
from trl import DistillationConfig, DistillationTrainer

from hkdfast.hf import apply


def main(folder="out/trl_distillation"):
    args = DistillationConfig(
        folder, beta=1.0, max_completion_length=8, max_steps=20, learning_rate=1e-2, logging_steps=1, bf16=False
    )
    prompts = Dataset.from_dict({"prompt": ["is there a cat ?", "is there a dog in the image ?"] * 40})
    models = language_model(width=32), language_model(width=64, spread=0.5)
    trainer = DistillationTrainer(*models, args, train_dataset=prompts, processing_class=tokenizer())
    apply(trainer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
