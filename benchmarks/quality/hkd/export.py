"""Write stored models as ordinary model folders, with configuration, tokenizer and processor.

    python benchmarks/quality/run.py export chains/seed1/S --output out/models

The folder, here out/models/chains/seed1/S, loads with `LlavaForConditionalGeneration.from_pretrained` and
`AutoProcessor.from_pretrained`, and is what `hkdfast evaluate --model` takes. bases/seed1 is stored as such a folder.
"""

from pathlib import Path

from hkd import chains
from seed import bases


def names():
    """The stored models: bases/seed1, ..., chains/seed1/L, ..."""
    known = [f"bases/{folder.name}" for folder in sorted(bases.BASES.iterdir())]
    return known + [f"chains/{file.parent.name}/{file.stem}" for file in sorted(chains.CHAINS.glob("*/*.safetensors"))]


def load(name):
    """A stored model and its processor."""
    kind, seed, *size = name.split("/")
    if kind == "bases":
        return bases.load(seed)
    return chains.load(int(seed.removeprefix("seed")), *size)[0], chains.processor()


def write(name, folder):
    """Write a stored model to a folder that `from_pretrained` reads."""
    for part in load(name):
        part.save_pretrained(folder)


def add_arguments(parser):
    parser.add_argument("models", nargs="+", choices=names(), metavar="MODEL", help="bases/seed2, chains/seed1/L, ...")
    parser.add_argument("--output", type=Path, default=Path("out/models"), help="where their folders are written")


def run(options):
    for name in options.models:
        write(name, options.output / name)
        print(options.output / name)
