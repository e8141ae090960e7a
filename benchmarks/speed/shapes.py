"""What is timed: rows, vocabularies and hidden sizes. GPU vocabularies are those of released models.

HKDFAST_TINY=1 takes every benchmark through in seconds on any machine, in shapes whose times say nothing.
"""

import os

import torch

from hkdfast import backends
from hkdfast.ops.dispatch import ORDER

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = os.environ.get("HKDFAST_TINY") == "1"
SIZE = "tiny" if TINY else DEVICE
_usable = backends()
# the backends that run here, fastest first; the reference is what they are measured by
BACKENDS = [name for name in ORDER[DEVICE] if name != "reference" and _usable[name] == "ok"] or ["reference"]

# (rows, vocabulary) of logits
LOGITS = {
    "tiny": {"tiny": (4, 300)},
    "cpu": {"llama-2, 512 rows": (512, 32_000), "llama-3, 256 rows": (256, 128_256)},
    "cuda": {"llama-3": (8192, 128_256), "qwen-2.5": (8192, 151_936), "gemma-2": (8192, 256_000)},
}[SIZE]

# (rows, hidden size of the student, of the teacher, vocabulary) of heads
HEADS = {
    "tiny": {"A: tiny": (8, 16, 16, 300), "B: tiny": (8, 8, 16, 300), "C: tiny": (8, 16, 8, 300)},
    "cpu": {"1024 rows, 512 x 32000": (1024, 512, 512, 32_000)},
    "cuda": {
        "A: 8192 rows, 4096/4096 x 151936": (8192, 4096, 4096, 151_936),
        "B: 8192 rows, 896/3584 x 151936": (8192, 896, 3584, 151_936),
        "C: 8192 rows, 2048/3584 x 151936": (8192, 2048, 3584, 151_936),
        "D: 8192 rows, 4096/8192 x 128256": (8192, 4096, 8192, 128_256),
        "E: 8192 rows, 2304/3584 x 262144": (8192, 2304, 3584, 262_144),
    },
}[SIZE]

# (rows, hidden sizes, vocabulary) of three heads that learn from each other
COUPLED = {
    "tiny": {"tiny": (8, (16, 16, 8), 300)},
    "cpu": {"1024 rows, 3 x 512 x 32000": (1024, (512, 512, 512), 32_000)},
    "cuda": {
        "A: 8192 rows, 3 x 4096 x 151936": (8192, (4096, 4096, 4096), 151_936),
        "F: 8192 rows, 896/2048/3584 x 151936": (8192, (896, 2048, 3584), 151_936),
    },
}[SIZE]

# (vocabulary, hidden size of the student, of the teacher, sequences, tokens of a prompt, of an answer) of trainers
TRAINERS = {
    "tiny": {"tiny": (300, 32, 32, 2, 5, 4)},
    "cpu": {
        "4 x 64 answer tokens, 512 x 32000": (32_000, 512, 768, 4, 64, 64),
        "2 x 64 answer tokens, 512 x 128256": (128_256, 512, 768, 2, 64, 64),
    },
    "cuda": {"8 x 512 answer tokens, 2048 x 128256": (128_256, 2048, 4096, 8, 512, 512)},
}[SIZE]

# sweeps for the figures: the same number of words in rows of every length, and shape A with fewer and more rows
VOCABULARIES = {
    "tiny": [(4, 100)],
    "cpu": [],
    "cuda": [(2**29 // v, v) for v in (1024, 4096, 16_384, 32_000, 65_536, 128_256, 151_936, 262_144)],
}[SIZE]
TOKENS = {
    "tiny": [(4, 8, 8, 300)],
    "cpu": [],
    "cuda": [(n, 4096, 4096, 151_936) for n in (1024, 2048, 4096, 16_384)],
}[SIZE]

# (rows, vocabulary) of a step of decoding
DECODING = {
    "tiny": [(2, 300)],
    "cpu": [(1, 32_000), (64, 32_000)],
    "cuda": [(1, 151_936), (64, 151_936), (1024, 32_000)],
}[SIZE]

# heads on which the error is measured, and how far the teacher is: forward KL from 24 to 0.001
ERRORS = {
    "tiny": (4, 16, 16, 300),
    "cpu": (64, 256, 256, 8000),
    "cuda": (512, 1024, 1024, 32_768),
}[SIZE]
APART = (0.1,) if TINY else (3.0, 1.0, 0.3, 0.1, 0.03)


def draw(*size, generator=None):
    generator = generator or torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(size, generator=generator, device=DEVICE)


def logits(shape, dtype, branches=2, apart=1.0):
    """Student and others: each is the student + noise, as a student some way into its training has it."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    student = draw(*shape, generator=generator)
    others = ((student + apart * draw(*shape, generator=generator)).to(dtype) for _ in range(branches - 1))
    return student.to(dtype), *others


def heads(shape, dtype, apart=0.1, spread=3.0):
    """(hidden, weight, teacher's hidden, teacher's weight): logits of this standard deviation. Where the hidden sizes
    agree the teacher is the student plus noise, KL about 0.05: near convergence, where rounding shows."""
    rows, h_student, h_teacher, vocab = shape
    generator = torch.Generator(DEVICE).manual_seed(0)

    def weights(width):
        return (draw(vocab, width, generator=generator) * (spread / width**0.5)).to(dtype)

    hidden = draw(rows, h_student, generator=generator)
    weight = weights(h_student)
    if h_teacher == h_student:
        hidden_t, weight_t = hidden + apart * draw(rows, h_student, generator=generator), weight.clone()
    else:
        hidden_t, weight_t = draw(rows, h_teacher, generator=generator), weights(h_teacher)
    return hidden.to(dtype), weight, hidden_t.to(dtype), weight_t


def relative(got, exact):
    """Error of a gradient as a share of the true one."""
    return ((got.double() - exact).norm() / exact.norm()).item()
