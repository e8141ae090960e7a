"""SEED on a folder of your images and a file of questions, in Python; `hkdfast seed` does the same from the shell.

    python examples/seed_on_a_folder.py --model NAME --images DIR --questions FILE --output DIR
    python examples/seed_on_a_folder.py                 # a tiny model, made here, on four images made here

The file has one JSON object a line: {"question_id": 1, "image": "street.png", "text": "Is there a cat in the image?"}.
Labels are not read.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hkdfast.evaluate import pope
from hkdfast.hf import SeedConfig, SeedTrainer


def examples(questions, images):
    """The training data: a list of dicts with the path of an image and a question. An error names a wrong line."""
    asked = pope.read_questions(questions, images=images, labels=False)
    return [{"image": str(Path(images) / one.image), "text": one.text} for one in asked]


def seed(model, images, questions, output, **options):
    """Train an adapter and save it in a folder. Returns the log."""
    data = examples(questions, images)
    processor = AutoProcessor.from_pretrained(model)
    model = AutoModelForImageTextToText.from_pretrained(model)
    config = SeedConfig(
        str(Path(output) / "checkpoints"),
        alpha=[1.5],  # strength of the contrast
        noise_step=500,  # how much noise hides the image
        yes_rate=True,  # log how often the model leans to yes
        report_to="none",
        **options,
    )
    trainer = SeedTrainer(model, config, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.save_model(str(Path(output) / "adapter"))
    return trainer.state.log_history


def tiny(folder):
    """A model, its processor, four images and a question about each, in a folder."""
    from tiny_models import image_processor, vision_language_model  # random weights

    vision_language_model().save_pretrained(folder / "model")
    image_processor().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    lines = []
    for number, color in enumerate(("red", "green", "blue", "yellow")):
        Image.new("RGB", (64, 64), color).save(folder / "images" / f"{color}.png")
        lines.append({"question_id": number, "image": f"{color}.png", "text": "is there a cat in the image ?"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "model", folder / "images", folder / "questions.jsonl"


def main(argv=None):
    parser = argparse.ArgumentParser(description="SEED on a folder of images.")
    for name in ("model", "images", "questions", "output"):
        parser.add_argument(f"--{name}")
    args = parser.parse_args(argv)
    given = (args.model, args.images, args.questions, args.output)
    if all(given):
        return seed(*given)
    if any(given):
        parser.error("give --model, --images, --questions and --output, or none of them")
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        made = tiny(Path(folder))
        return seed(*made, Path(folder) / "out", max_steps=4, per_device_train_batch_size=4, logging_steps=1)


if __name__ == "__main__":
    main()
