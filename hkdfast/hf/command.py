"""hkdfast seed: SEED on a user's own model, images and questions. Options are SeedConfig's; none is described twice."""

import argparse
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from ..evaluate import pope
from ..evaluate.decoding import Decoding
from . import answer
from .collator import QuestionCollator, Questions
from .config import SeedConfig
from .seed import SeedTrainer

# of TrainingArguments: those that a run on one's own files is likely to need
TRAINING = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "seed",
    "bf16",
    "activation_checkpointing",
    "logging_steps",
    "save_steps",
    "dataloader_num_workers",
    "use_cpu",
)
OWN = tuple(name for name in SeedConfig.__dataclass_fields__ if name not in TrainingArguments.__dataclass_fields__)
DEFAULTS = {"yes_rate": True}  # questions of POPE's form ask for yes or no


def add_arguments(parser):
    """Options of the command. Their help shows the defaults if the parser's formatter does."""
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="vision-language model: a folder or a Hub name; not changed")
    add("--images", required=True, metavar="DIR", help="folder of the questions' images")
    add("--questions", required=True, metavar="FILE", help="JSON lines: question_id, image, text; label with --labels")
    add("--output", required=True, metavar="DIR", help="new folder for the adapter and the processor")
    add("--labels", action="store_true", help="learn at the tokens of the labels; without it no label is read")
    add("--instruction", default=Decoding.instruction, help="text that follows every question, '' for none")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: as the model is saved",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    hints = get_type_hints(SeedConfig)
    for title, names in (("SEED", OWN), ("training", TRAINING)):
        group = parser.add_argument_group(title)
        for name in names:
            add_option(group, SeedConfig.__dataclass_fields__[name], hints[name])


def add_option(group, option, hint):
    """The command-line option of one field of SeedConfig."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) is not list else [hint]
    kind = next((k for k in (bool, str) if k in kinds), (kinds or [hint])[0])
    default = option.default if option.default is not MISSING else option.default_factory()
    how = {"default": DEFAULTS.get(option.name, default), "help": option.metadata["help"]}
    if kind is bool:
        how |= {"action": argparse.BooleanOptionalAction}
    elif get_origin(kind) is list:
        how |= {"nargs": "+", "type": get_args(kind)[0]}
    else:
        how |= {"type": kind, "choices": option.metadata.get("choices")}
    group.add_argument("--" + option.name.replace("_", "-"), **how)


def run(args):
    """Everything is read and checked first; then the adapter is trained and saved in --output."""
    if args.hard_weight and not args.labels:
        raise ValueError(f"--hard-weight {args.hard_weight} needs --labels")
    if args.confidence == "target" and not args.labels:
        raise ValueError("--confidence target needs --labels")
    output = Path(args.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not args.resume:
        raise ValueError(f"--output {args.output} exists and is not an empty folder: name another, or --resume")
    if args.resume and not list(output.glob("**/checkpoint-*")):
        raise ValueError(f"--resume: no checkpoint in {args.output}")
    config = SeedConfig(str(output), **{name: getattr(args, name) for name in (*OWN, *TRAINING)})
    questions = pope.read_questions(args.questions, images=args.images, labels=args.labels)
    answer.check_images(questions, args.images)
    model, processor = answer.load(args.model, device="cpu" if args.use_cpu else None, dtype=args.dtype)
    trainer = SeedTrainer(
        model,
        config,
        train_dataset=Questions(questions, Path(args.images), args.labels),
        data_collator=QuestionCollator(processor, args.labels, args.instruction),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        print(
            f"The adapter is in {output}. To score it beside the model it stands on:\n"
            f"hkdfast evaluate pope --model {args.model} --adapter {output} --base --images DIR --questions FILE "
            "--output FILE"
        )
