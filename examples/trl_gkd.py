"""hkdfast in TRL's GKDTrainer, which learns from answers of the data and of the student: python examples/trl_gkd.py"""

from datasets import Dataset
from tiny_models import language_model, tokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from hkdfast.hf import apply


def main(folder="out/trl_gkd"):
    args = GKDConfig(folder, max_new_tokens=8, max_steps=20, learning_rate=1e-2, logging_steps=1, bf16=False)
    chat = [{"role": "user", "content": "is there a cat ?"}, {"role": "assistant", "content": "no cat in the image"}]
    models = language_model(width=32), language_model(width=64, spread=0.5)
    data = Dataset.from_dict({"messages": [chat] * 160})
    trainer = GKDTrainer(*models, args, train_dataset=data, processing_class=tokenizer())
    apply(trainer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
