"""hkdfast for Hugging Face models: the only folder that imports transformers and peft."""

try:
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f'hkdfast.hf needs Hugging Face libraries: pip install "hkdfast[hf]" ({error})') from error

from .adapter import language_linear_names, seed_lora_config
from .collator import QuestionCollator
from .configs import PyramidConfig, SeedConfig, TernaryConfig
from .head import LanguageHead, as_teacher, head_fn
from .pyramid import PyramidTrainer
from .seed import SeedTrainer
from .ternary import TernaryTrainer

__all__ = [
    "LanguageHead",
    "PyramidConfig",
    "PyramidTrainer",
    "QuestionCollator",
    "SeedConfig",
    "SeedTrainer",
    "TernaryConfig",
    "TernaryTrainer",
    "as_teacher",
    "head_fn",
    "language_linear_names",
    "seed_lora_config",
]
