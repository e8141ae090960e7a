"""Vocabulary-wide distillation at the cost of its matrix products."""

from .contrastive import contrast, purify
from .heads import Head
from .losses import Edge, coupled_loss, distill_loss
from .noise import diffuse
from .ops.dispatch import backends
from .ops.objective import UNLABELED
from .ops.reference import DIVERGENCES

__version__ = "0.1.0"
__all__ = [
    "DIVERGENCES",
    "Edge",
    "Head",
    "UNLABELED",
    "backends",
    "contrast",
    "coupled_loss",
    "diffuse",
    "distill_loss",
    "purify",
]
