"""Distillation losses over the full vocabulary, without [tokens, vocab] logits in memory; SEED and HKD4VLM."""

from importlib import import_module
from typing import TYPE_CHECKING

from .contrastive import contrast, purify
from .heads import Head
from .losses import DistillLoss, Edge, coupled_loss, distill_loss
from .noise import diffuse
from .ops.dispatch import backends
from .ops.objective import UNLABELED
from .ops.reference import DIVERGENCES
from .split import Split

if TYPE_CHECKING:
    from .hf import (  # noqa: F401
        DistillConfig,
        DistillTrainer,
        LanguageHead,
        PyramidConfig,
        PyramidTrainer,
        SeedConfig,
        SeedTrainer,
        TernaryConfig,
        TernaryTrainer,
        hidden_states,
        loss_in_head,
    )

__version__ = "0.2.0"
__all__ = [
    "DIVERGENCES",
    "DistillLoss",
    "Edge",
    "Head",
    "Split",
    "UNLABELED",
    "backends",
    "contrast",
    "coupled_loss",
    "diffuse",
    "distill_loss",
    "purify",
]
# Names of hkdfast.hf, imported at first use: `import hkdfast` needs torch alone.
FROM_HF = (
    "DistillConfig",
    "DistillTrainer",
    "LanguageHead",
    "PyramidConfig",
    "PyramidTrainer",
    "SeedConfig",
    "SeedTrainer",
    "TernaryConfig",
    "TernaryTrainer",
    "hidden_states",
    "loss_in_head",
)


def __getattr__(name: str) -> object:
    if name in FROM_HF:
        return getattr(import_module(".hf", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *FROM_HF])
