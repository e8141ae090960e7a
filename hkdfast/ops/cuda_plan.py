"""How the CUDA kernels lay out a row in shared memory, and HKDFAST_CUDA_PLAN, which sets it for the process.

HKDFAST_CUDA_PLAN="cluster=8,blocks=2,warps=8,chunk=512,slots=12", any of them, for measurements; what is left out is
chosen by csrc/cuda/plan.h:
    cluster: thread blocks that hold a row together.
    blocks: thread blocks on one multiprocessor, which share its shared memory and its 16 warps.
    warps: of a block.
    chunk: tokens of a row that are loaded at a time.
    slots: chunks that a warp has room for.
"""

import os
from functools import lru_cache

NAME = "HKDFAST_CUDA_PLAN"
MAX_WARPS = 16  # of a multiprocessor: its registers have room for no more
VALUES = {
    "cluster": (1, 2, 4, 8, 16),
    "blocks": (1, 2, 4, 8, 16),
    "warps": range(1, MAX_WARPS + 1),
    "chunk": range(256, 4096 + 1, 256),
    "slots": range(1, 256 + 1),
}
H200 = (232_448, 233_472, 1024)  # bytes of shared memory: of a block at most, of a multiprocessor, taken for each block
VOCABULARIES = {"llama-2": 32_000, "llama-3": 128_256, "qwen-2.5": 151_936, "gemma-2": 256_000, "gemma-3": 262_144}
TILES = (("bfloat16", 2), ("bfloat16", 3), ("float32", 2))  # what rows of these vocabularies mostly consist of


def text():
    return os.environ.get(NAME) or ""


@lru_cache
def request(text):
    """The numbers of such a text in the order of VALUES, 0 for what it leaves out; a ValueError if it is wrong."""
    given = {}
    for part in filter(None, text.split(",")):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in VALUES:
            raise ValueError(f"{NAME}={text!r} has {part.strip()!r}, expected name=number with {', '.join(VALUES)}")
        if key in given:
            raise ValueError(f"{NAME}={text!r} has {key} twice")
        if not value.isdecimal() or int(value) not in VALUES[key]:
            values = VALUES[key]
            expected = ", ".join(map(str, values)) if isinstance(values, tuple) else f"{values[0]} to {values[-1]}"
            step = f" in steps of {values.step}" if isinstance(values, range) and values.step > 1 else ""
            raise ValueError(f"{NAME}={text!r} has {key}={value}, expected {expected}{step}")
        given[key] = int(value)
    if given.get("blocks", 1) * given.get("warps", 1) > MAX_WARPS:
        raise ValueError(
            f"{NAME}={text!r} has blocks times warps = {given['blocks'] * given['warps']}, expected {MAX_WARPS} at most"
        )
    return tuple(given.get(key, 0) for key in VALUES)


def plans(plan, machine, asked):
    """{"llama-3, 2 bfloat16 tiles of 128,256": the layout in the form of HKDFAST_CUDA_PLAN, ...}

    Args:
        plan: `hkdfast._cuda.plan`.
        machine: as H200.
        asked: what `request` returns.
    """
    facts = {}
    for model, vocab in VOCABULARIES.items():
        for dtype, count in TILES:
            chosen = plan([(4096, dtype, -(-vocab // 8) * 8)] * count, vocab, asked, *machine)
            facts[f"{model}, {count} {dtype} tiles of {vocab:,}"] = describe(chosen) if chosen else "does not fit"
    return facts


def describe(plan):
    numbers = ",".join(f"{key}={plan[key]}" for key in VALUES)
    warps = plan["cluster"] * plan["warps"]
    row_slots, rows = -(-plan["chunks"] // warps), plan["slots"] * warps / plan["chunks"]
    return f"{numbers} (a row takes {row_slots} slots of a warp; {rows:.2f} rows fit)"
