"""The CUDA kernels of csrc/, for Hopper and later, called with raw pointers: the row operation of reference.py.

A row is held in the shared memory of a cluster of thread blocks, so that its logits are read from global memory once:
6 bytes per word of two bfloat16 tiles and their gradient, 8 with a third tile. Tiles are float32, bfloat16 or float16,
each with its own dtype; the arithmetic is float32 with the sums of a row in double. Results are the same from run to
run, bit for bit. No call waits for the device or allocates on it, so calls can be captured in a CUDA graph.

A row that does not fit (on Hopper more than 850,000 words of two bfloat16 tiles or 390,000 of two float32 ones, 590,000
or 262,144 of three) runs on the next backend of the table, Triton. So does work on a device that these kernels were not
compiled for, beside one that they were.
"""

from functools import lru_cache

import torch

from . import native
from .backends import after

try:
    from . import _cuda
except ImportError as error:
    raise ImportError(
        f"{error}. Its CUDA kernels are built when hkdfast is installed, if nvcc is found (CUDA_HOME, /usr/local/cuda, "
        "PATH; 12.8 or later for Blackwell): install the CUDA toolkit, then hkdfast again"
    ) from error


@lru_cache
def missing(index):
    """Why the kernels do not run on this device; empty if they do."""
    return _cuda.missing(index)


def unusable():
    """Why the kernels run on no device here; empty if they run on one."""
    if not torch.cuda.is_available():
        built = "is built for the CPU only" if torch.version.cuda is None else "finds no GPU that it can use"
        return f"torch {torch.__version__} {built}"
    reasons = {index: missing(index) for index in range(torch.cuda.device_count())}
    return "" if "" in reasons.values() else "; ".join(f"device {index}: {why}" for index, why in reasons.items())


if why := unusable():
    raise ImportError(why)


def launch(operation, objective, x, *tensors):
    """One operation on the stream that torch uses now, or on the next backend if x's device or row is not for us."""
    device = x.device
    if device.type != "cuda":
        raise ValueError(f"the cuda backend takes tensors on a CUDA device, not on {device}")
    done = False
    if not missing(device.index):
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            done = getattr(native, operation)(getattr(_cuda, operation), objective, x, *tensors, device.index, stream)
    if not done:
        getattr(after("cuda", device, x.dtype), operation)(objective, x, *tensors)


def rows(objective, student, *tensors):
    """hkdfast.reference.rows."""
    launch("rows", objective, student, *tensors)


def contrast(objective, clean, *tensors):
    """hkdfast.reference.contrast."""
    launch("contrast", objective, clean, *tensors)
