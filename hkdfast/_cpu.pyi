from .objective import Objective

Tile = tuple[int, str, int]  # address, dtype, elements from one row to the next

def instruction_sets() -> list[str]: ...  # usable here, fastest first
def rows(
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
    threads: int,
    instruction_set: str,  # "" for the fastest
) -> None: ...
def contrast(
    objective: Objective,
    clean: Tile,
    noisy: Tile,
    alpha: int,
    labels: int,
    out: Tile,
    n: int,
    vocab: int,
    threads: int,
    instruction_set: str,
) -> None: ...
