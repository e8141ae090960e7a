"""The CUDA kernels of csrc/, for Hopper and later, called with raw pointers: the row operation of reference.py.

A row is held in the shared memory of a cluster of thread blocks, so that its logits are read from global memory once:
6 bytes per token for two bfloat16 tiles and their gradient, 8 with a third tile. Tiles are float32, bfloat16 or
float16, each with its own dtype; the arithmetic is float32 with the sums of a row in double. Where the gradient is
rounded to bfloat16 it uses the GPU's approximate functions, within 2**-22. Results are the same from run to run, bit
for bit. No call waits for the device and no kernel allocates memory, so calls can be captured in a CUDA graph.

A row that does not fit in shared memory falls back to Triton; a warning is issued once. `hkdfast.backends()` gives the
longest rows that fit. Work on a device for which these kernels were not compiled falls back too. With backend="cuda"
both are a ValueError. How a row is laid out follows from its length; HKDFAST_CUDA_PLAN (cuda_plan.py) sets it, then
a row for which there is no room is a ValueError.
"""

from functools import cache, lru_cache, partial
from types import SimpleNamespace

import torch

from . import cuda_plan, native
from .dispatch import fallback_for

try:
    from .. import _cuda
except ImportError as error:
    raise ImportError(f"{error}: {native.not_built('_cuda')}") from error


@lru_cache
def missing(index):
    """Why the kernels do not run on this device; empty if they run."""
    return _cuda.missing(index)


@cache
def unusable():
    """Why the kernels run on no device of this machine; empty if they run on one."""
    if not torch.cuda.is_available():
        built = "is built for the CPU only" if torch.version.cuda is None else "finds no GPU that it can use"
        return f"torch {torch.__version__} {built}"
    reasons = {index: missing(index) for index in range(torch.cuda.device_count())}
    return "" if "" in reasons.values() else "; ".join(f"device {index}: {why}" for index, why in reasons.items())


def limits():
    """A text: the longest rows on the first device on which the kernels run."""
    index = next(i for i in range(torch.cuda.device_count()) if not missing(i))
    most = (
        f"{_cuda.longest([(16, dtype, 0)] * count, index):,} of {count} {dtype} tiles"
        for dtype in ("bfloat16", "float32")
        for count in (2, 3)
    )
    return f"tokens that fit: {', '.join(most)}; longer rows run on the next backend"


def unfit(tiles, device):
    """Why the kernels do not take these tiles, some of which may be None."""
    if why := missing(device.index):
        return f"device {device.index}: {why}"
    tiles = [tile for tile in tiles if tile is not None]
    most = _cuda.longest([native.tile(native.unit_stride(tile)) for tile in tiles], device.index)
    dtypes = ", ".join(str(tile.dtype).removeprefix("torch.") for tile in tiles)
    vocab = tiles[0].shape[1]
    if vocab <= most:
        return (
            f"device {device.index} cannot run a cluster of thread blocks that holds a row of {vocab:,} tokens "
            f"({dtypes}): too few of its multiprocessors are together, as in a part of a GPU (MIG)"
        )
    return f"rows of {vocab:,} tokens do not fit on chip, the longest of such tiles ({dtypes}) have {most:,}"


def launch(operation, count, required, objective, x, *tensors):
    """Run one operation on torch's current stream, or on the next backend if the kernels do not take x's device or row.

    Args:
        operation: "rows" or "contrast".
        count: how many of the tensors, including x, are tiles that a row needs on chip.
        required: whether this backend was required for by name: then what is not for us is a ValueError.
    """
    device = x.device
    if device.type != "cuda":
        raise ValueError(f"the cuda backend takes tensors on a CUDA device, not on {device}")
    done, runs, plan = False, not missing(device.index), cuda_plan.text()
    if runs:
        how = cuda_plan.request(plan), device.index
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            done = getattr(native, operation)(getattr(_cuda, operation), objective, x, *tensors, *how, stream)
    if done:
        return
    if runs and plan:
        raise ValueError(
            f"{cuda_plan.NAME}={plan!r} has no room for rows of {x.shape[1]:,} tokens, or this device does not run it; "
            "`hkdfast doctor` gives plans"
        )
    why = f"cuda: {unfit((x, *tensors[: count - 1]), device)}"
    if required:
        raise ValueError(f"{why}; without backend='cuda' the next backend runs")
    getattr(fallback_for("cuda", device, x.dtype, why), operation)(objective, x, *tensors)


rows = partial(launch, "rows", 3, False)  # hkdfast.ops.reference.rows
contrast = partial(launch, "contrast", 2, False)  # hkdfast.ops.reference.contrast
by_name = SimpleNamespace(rows=partial(launch, "rows", 3, True), contrast=partial(launch, "contrast", 2, True))
