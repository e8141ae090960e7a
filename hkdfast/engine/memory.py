"""Allocate memory for tiles and gradients, and detect the capture of a CUDA graph."""

import ctypes
import mmap

import torch

LARGE = 8 << 20  # bytes; malloc serves smaller buffers from memory that is already mapped
HUGE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


def empty_hugepages(shape, *, dtype, device):
    """torch.empty, in huge pages where the system supports them.

    malloc maps a large buffer anew every time, and the first touch of each page costs more than the row operation on
    it: half the time of loss and gradient from 256 x 128256 bf16 logits on two cores.
    """
    x = torch.empty(shape, dtype=dtype, device=device)
    if HUGE is not None and x.is_cpu and x.nbytes >= LARGE:
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (x.data_ptr() + x.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        # a hint: a kernel without support returns an error, which is ignored
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), HUGE)
    return x


def capturing(device):
    """Whether the device's current stream captures a CUDA graph. Then the host must not wait for the device, and
    allocated memory belongs to the graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
