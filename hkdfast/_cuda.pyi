from .objective import Objective

Tile = tuple[int, str, int]  # address, dtype, elements from one row to the next
Request = tuple[int, int, int, int, int]  # cluster, blocks, warps, chunk, slots; 0: chosen

def missing(device: int) -> str: ...  # why the kernels do not run on this device; "" if they do
def machine(device: int) -> tuple[int, int, int]: ...  # block, sm, reserved: bytes of shared memory
def plan(  # the layout for such tiles on such a machine; None if a row does not fit
    tiles: list[Tile], vocab: int, request: Request, block: int, sm: int, reserved: int, largest_cluster: int = 16
) -> dict[str, int] | None: ...
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
    plan: Request,
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
    plan: Request,
    device: int,
    stream: int,
) -> bool: ...
