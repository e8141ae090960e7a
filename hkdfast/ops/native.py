"""How tensors are handed to the compiled modules: as addresses. And why a compiled module is missing."""

import json
from importlib.resources import files

import torch


def not_built(module):
    """Why the installation of hkdfast did not build "_cpu" or "_cuda", and how to get it, in words.

    setup.py writes it to hkdfast/_build.json, because pip hides what a build prints.
    """
    notes = files("hkdfast") / "_build.json"
    why = json.loads(notes.read_text()).get(module) if notes.is_file() else None
    return why or "install hkdfast again to build it; pip install -v shows what the build says"


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


def rows(call, objective, student, teacher, noisy, alpha, labels, row_weight, loss, grad, metrics, *how):
    """What a compiled row operation returns. how: its last arguments; the rest as in `hkdfast.ops.reference.rows`."""
    ours = [unit_stride(x) for x in (student, teacher, noisy, grad)]
    vectors = [
        vector(x, dtype) for x, dtype in ((alpha, torch.float32), (labels, torch.int64), (row_weight, torch.float32))
    ]
    outputs = [vector(x, torch.float32) for x in (loss, metrics)]
    done = call(
        objective,
        *(tile(x) for x in ours[:3]),
        *(pointer(x) for x in vectors),
        pointer(outputs[0]),
        tile(ours[3]),
        pointer(outputs[1]),
        *student.shape,
        *how,
    )
    for given, used in zip((grad, loss, metrics), (ours[3], *outputs), strict=True):
        if used is not given:
            given.copy_(used)
    return done


def contrast(call, objective, clean, noisy, alpha, labels, out, *how):
    """Likewise, for `hkdfast.ops.reference.contrast`."""
    clean, noisy, used = (unit_stride(x) for x in (clean, noisy, out))
    alpha, labels = vector(alpha, torch.float32), vector(labels, torch.int64)
    done = call(objective, tile(clean), tile(noisy), pointer(alpha), pointer(labels), tile(used), *clean.shape, *how)
    if used is not out:
        out.copy_(used)
    return done
