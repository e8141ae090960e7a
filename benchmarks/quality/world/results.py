"""Where results are kept, and what they say about the machine that made them."""

import platform
from pathlib import Path

import torch
import transformers

import hkdfast

RESULTS = Path(__file__).parents[1] / "results"


def machine(device="cpu"):
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "versions": {module.__name__: module.__version__ for module in (hkdfast, torch, transformers)},
    }
