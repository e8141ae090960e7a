from .objective import Objective

Tile = tuple[int, str, int]  # address, dtype, elements from one row to the next

def missing(device: int) -> str: ...  # why the kernels do not run on this device; "" if they do
def longest(tiles: list[Tile], device: int) -> int: ...  # the most words of a row of two or three such tiles
def rows(  # False, and nothing is done, if a row does not fit on chip
    objective: Objective,
    student: Tile,
    teacher: Tile,
    noisy: Tile | None,
    alpha: int,  # an address, 0 for none; likewise below
    labels: int,
    weight: int,
    loss: int,
    grad: Tile | None,
    metrics: int,
    n: int,
    vocab: int,
    device: int,
    stream: int,  # a cudaStream_t
) -> bool: ...
def contrast(
    objective: Objective,
    clean: Tile,
    noisy: Tile,
    alpha: int,
    labels: int,
    out: Tile,
    n: int,
    vocab: int,
    device: int,
    stream: int,
) -> bool: ...
