"""hkdfast for Hugging Face models: the only folder that imports transformers and peft."""

from importlib import import_module

try:
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f'hkdfast.hf needs Hugging Face libraries: pip install "hkdfast[hf]" ({error})') from error

from .adapter import language_linear_names, seed_lora_config
from .apply import apply
from .collator import QuestionCollator
from .configs import PyramidConfig, SeedConfig, TernaryConfig
from .distill import DistillMixin, DistillTrainer
from .distill_config import DistillArguments, DistillConfig
from .head import LanguageHead, as_teacher, head_fn, hidden_states, loss_in_head
from .pyramid import PyramidTrainer
from .seed import SeedTrainer
from .ternary import TernaryTrainer
from .text_collator import TextCollator

__all__ = [
    "DistillArguments",
    "DistillConfig",
    "DistillMixin",
    "DistillTrainer",
    "LanguageHead",
    "PyramidConfig",
    "PyramidTrainer",
    "QuestionCollator",
    "SeedConfig",
    "SeedTrainer",
    "TernaryConfig",
    "TernaryTrainer",
    "TextCollator",
    "apply",
    "as_teacher",
    "head_fn",
    "hidden_states",
    "language_linear_names",
    "loss_in_head",
    "seed_lora_config",
]
# {name: its module}: these need TRL, and are imported at first use
TRL_TRAINERS = {"DistillationTrainer": "trl_trainers", "GKDTrainer": "trl_gkd"}


def __getattr__(name: str) -> object:
    if name not in TRL_TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{TRL_TRAINERS[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f'hkdfast.hf.{name} needs TRL: pip install "hkdfast[trl]" ({error})') from error


def __dir__() -> list[str]:
    return sorted([*globals(), *TRL_TRAINERS])
