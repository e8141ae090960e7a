"""What every public function asks of its arguments before it works: errors name the wrong value and the right ones."""

import math

from .backends import check as check_backend
from .sources import Head, device_of
from .tiles import TILES


def check_word(name, word, words):
    if word not in words:
        raise ValueError(f"unknown {name} {word!r}, expected one of {', '.join(words)}")


def check_options(*, temperature, tiles, backend):
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    check_word("tiles", tiles, TILES)
    check_backend(backend)


def check_same_place(name, source, other_name, other):
    for each, one in ((name, source), (other_name, other)):
        if not isinstance(one, Head) and not one.is_floating_point():
            raise ValueError(f"{each} must be floating point, got {one.dtype}")
    if device_of(source) != device_of(other):
        raise ValueError(f"{name} is on {device_of(source)} but {other_name} is on {device_of(other)}")


def check_vocab(sources, vocab):
    """Words to compare: all, if the sides agree; the common ones or a given number, if the caller says so."""
    sizes = [int(source.shape[-1]) for source in sources]
    if vocab is None:
        if len(set(sizes)) > 1:
            raise ValueError(
                f"vocabularies of {' and '.join(map(str, dict.fromkeys(sizes)))} words differ: "
                'vocab="common" compares the first words that all have, a number the first so many'
            )
        return sizes[0]
    if vocab == "common":
        return min(sizes)
    if isinstance(vocab, bool) or not isinstance(vocab, int) or not 1 <= vocab <= min(sizes):
        raise ValueError(f'vocab must be None, "common" or a number of words from 1 to {min(sizes)}, got {vocab!r}')
    return vocab
