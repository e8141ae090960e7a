"""The C++ kernels of csrc/, called with raw pointers: the row operation of reference.py for CPU tensors.

Tiles are float32, bfloat16 or float16, each with its own dtype; the arithmetic is float32 with sums in double beyond a
block. Results do not depend on the number of threads; torch sets it.
"""

import torch

from . import native

try:
    from .. import _cpu
except ImportError as error:
    raise ImportError(f"{error}: {native.not_built('_cpu')}") from error


def threads(x):
    """torch's number of threads, but at most one per 2**15 elements: waking a thread costs more than such a share."""
    return max(1, min(torch.get_num_threads(), x.numel() >> 15))


def rows(objective, student, *tensors, instruction_set=""):
    """hkdfast.ops.reference.rows, on the fastest instruction set here or the one named (_cpu.instruction_sets())."""
    native.rows(_cpu.rows, objective, student, *tensors, threads(student), instruction_set)


def contrast(objective, clean, *tensors, instruction_set=""):
    """hkdfast.ops.reference.contrast, likewise."""
    native.contrast(_cpu.contrast, objective, clean, *tensors, threads(clean), instruction_set)
