"""Vocabulary-wide distillation at the cost of its matrix products."""

from .backends import backends
from .contrast import contrast, purify
from .distill import Edge, coupled_loss, distill_loss
from .noise import diffuse
from .objective import UNLABELLED
from .reference import DIVERGENCES
from .sources import Head

__version__ = "0.1.0"
__all__ = [
    "DIVERGENCES",
    "Edge",
    "Head",
    "UNLABELLED",
    "backends",
    "contrast",
    "coupled_loss",
    "diffuse",
    "distill_loss",
    "purify",
]
