"""Options of the commands that train: made of the fields of a trainer's config, whose help and defaults they show."""

import argparse
from dataclasses import MISSING
from types import NoneType
from typing import get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from ..shell import check_writable

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
    "save_total_limit",
    "dataloader_num_workers",
    "use_cpu",
)
DEFAULTS = {"save_total_limit": 1}  # a checkpoint holds an optimizer too, twice the size of what is trained


def own(config, *bases):
    """Names of the fields of a config that neither TrainingArguments nor one of the bases has."""
    known = [base.__dataclass_fields__ for base in (TrainingArguments, *bases)]
    return tuple(name for name in config.__dataclass_fields__ if not any(name in fields for fields in known))


def add_options(parser, title, config, names, defaults=()):
    """A group of options, one for each of these fields of a config.

    Args:
        defaults: {name: default} of those whose default is not the config's.
    """
    group, hints = parser.add_argument_group(title), get_type_hints(config)
    for name in names:
        add_option(group, config.__dataclass_fields__[name], hints[name], dict(defaults))


def add_option(group, option, hint, defaults):
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) is not list else [hint]
    kind = next((k for k in (bool, str) if k in kinds), (kinds or [hint])[0])
    default = option.default if option.default is not MISSING else option.default_factory()
    how = {"default": defaults.get(option.name, default), "help": option.metadata["help"]}
    if kind is bool:
        how |= {"action": argparse.BooleanOptionalAction}
    elif get_origin(kind) is list:
        how |= {"nargs": "+", "type": get_args(kind)[0]}
    else:
        how |= {"type": kind, "choices": option.metadata.get("choices")}
    group.add_argument("--" + option.name.replace("_", "-"), **how)


def check_output(option, output, resume):
    """Refuse a folder that is not empty and not to be resumed, or cannot be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not resume:
        raise ValueError(f"--output {option} exists and is not an empty folder: name another, or --resume")
    check_writable(f"--output {option}", output)
