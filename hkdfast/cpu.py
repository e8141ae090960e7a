"""The C++ kernels of csrc/, called with raw pointers: the row operation of reference.py for CPU tensors.

Tiles are float32, bfloat16 or float16, each with its own dtype; the arithmetic is float32 with sums in double beyond a
block. Results do not depend on the number of threads, which is torch's.
"""

import torch

try:
    from . import _cpu
except ImportError as error:
    raise ImportError(
        f"{error}. Its C++ kernels are built when hkdfast is installed, if there is a C++17 compiler with OpenMP "
        "(Debian: g++); install one, then hkdfast again: pip install -v shows what the compiler says"
    ) from error


def tile(x):
    return None if x is None else (x.data_ptr(), str(x.dtype).removeprefix("torch."), x.stride(0))


def vector(x, dtype):
    """A contiguous tensor of this dtype, or None; to be held until its pointer has been used."""
    return None if x is None else x.to(dtype).contiguous()


def pointer(x):
    return 0 if x is None else x.data_ptr()


def unit_stride(x):
    """x, or a copy of it whose last dimension has unit stride."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def threads(x):
    """torch's number of threads, but no more than have 2**15 words each: waking one costs more than such a share."""
    return max(1, min(torch.get_num_threads(), x.numel() >> 15))


def rows(objective, student, teacher, noisy, alpha, labels, weight, loss, grad, metrics, *, instruction_set=""):
    """hkdfast.reference.rows, on the fastest instruction set here or the one named (_cpu.instruction_sets())."""
    ours = [unit_stride(x) for x in (student, teacher, noisy, grad)]
    vectors = [
        vector(x, dtype) for x, dtype in ((alpha, torch.float32), (labels, torch.int64), (weight, torch.float32))
    ]
    outputs = [vector(x, torch.float32) for x in (loss, metrics)]
    _cpu.rows(
        objective,
        *(tile(x) for x in ours[:3]),
        *(pointer(x) for x in vectors),
        pointer(outputs[0]),
        tile(ours[3]),
        pointer(outputs[1]),
        *student.shape,
        threads(student),
        instruction_set,
    )
    for given, used in zip((grad, loss, metrics), (ours[3], *outputs), strict=True):
        if used is not given:
            given.copy_(used)


def contrast(objective, clean, noisy, alpha, labels, out, *, instruction_set=""):
    """hkdfast.reference.contrast, likewise."""
    clean, noisy, used = (unit_stride(x) for x in (clean, noisy, out))
    alpha, labels = vector(alpha, torch.float32), vector(labels, torch.int64)
    _cpu.contrast(
        objective,
        tile(clean),
        tile(noisy),
        pointer(alpha),
        pointer(labels),
        tile(used),
        *clean.shape,
        threads(clean),
        instruction_set,
    )
    if used is not out:
        out.copy_(used)
