"""Two steps of whole trainers: a language model with the head of Qwen2.5-0.5B under the fused loss and under PyTorch's,
and SEED on a small vision-language model. How to run: see bench_logits.py."""

import pytest
import torch
from shapes import DEVICE, TINY

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
import transformers

from hkdfast.batch import answer_rows
from hkdfast.hf import DistillConfig, DistillTrainer, SeedConfig, SeedTrainer

STEPS, ACCUMULATION, ROUNDS = 2, 2, 3
SMALL = TINY or DEVICE == "cpu"
VOCAB, WIDTH, LAYERS = (2048, 64, 1) if SMALL else (151_936, 896, 4)
BATCH, LENGTH = (2, 16) if SMALL else (8, 1024)


def common(folder):
    """Options of TrainingArguments for both trainers."""
    return dict(
        output_dir=str(folder),
        max_steps=STEPS,
        gradient_accumulation_steps=ACCUMULATION,
        per_device_train_batch_size=BATCH,
        logging_steps=1,
        bf16=True,
        use_cpu=DEVICE == "cpu",
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )


def language_model(seed):
    torch.manual_seed(seed)
    heads = WIDTH // 64
    config = transformers.Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 7),
        tie_word_embeddings=True,
    )
    return transformers.Qwen2ForCausalLM(config)


class Eager(transformers.Trainer):
    """Forward KL from the logits of both models, as people write it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows, _ = answer_rows(inputs)
        ids = inputs["input_ids"]
        with torch.no_grad():
            p = self.teacher(input_ids=ids).logits[rows].float().log_softmax(-1)
        q = model(input_ids=ids).logits[rows].float().log_softmax(-1)
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        loss = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).sum()
        return loss / (len(q) if num_items_in_batch is None else num_items_in_batch)


def texts():
    ids = torch.randint(VOCAB, (STEPS * ACCUMULATION * BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def made(who, folder):
    """A trainer of two steps, anew: its student is that of every other."""
    student, teacher = language_model(0), language_model(1)
    if who == "hkdfast":
        return DistillTrainer(student, teacher, DistillConfig(**common(folder)), train_dataset=texts())
    trainer = Eager(student, transformers.TrainingArguments(**common(folder)), train_dataset=texts())
    trainer.teacher = teacher.to(trainer.args.device).eval()
    return trainer


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("who", ("hkdfast", "eager"))
@pytest.mark.parametrize("shape", [f"{BATCH} x {LENGTH} tokens, {WIDTH} x {VOCAB}, {LAYERS} layers"])
def bench_language_model(benchmark, timed, tmp_path, shape, who):
    info = {"who": who, "what": f"{STEPS} steps of a language model, bf16 autocast", "shape": shape}
    found = timed(lambda: losses(made(who, tmp_path)), rounds=ROUNDS, **info)
    benchmark.extra_info["losses"] = found
    assert len(found) == STEPS and all(loss > 0 for loss in found)


@pytest.mark.parametrize("shape", [f"{BATCH} questions, 1.4 million parameters"])
def bench_seed(benchmark, timed, tmp_path, shape):
    from PIL import Image

    from world.tinyllava import make_model, make_processor

    processor = make_processor()
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    questions = [{"image": picture, "text": "Is there a cat in the image?"}] * (STEPS * ACCUMULATION * BATCH)

    def run():
        config = SeedConfig(**common(tmp_path), lora_r=8)
        model = make_model(processor.tokenizer)
        return losses(SeedTrainer(model, config, train_dataset=questions, processing_class=processor))

    found = timed(run, rounds=ROUNDS, who="hkdfast", what=f"{STEPS} steps of SEED, bf16 autocast", shape=shape)
    benchmark.extra_info["losses"] = found
    assert len(found) == STEPS
