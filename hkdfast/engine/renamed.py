"""Option names of version 0.1 and their new names. An old name is an error that names the new one."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])

LOSS = {
    "weight": "row_weight",
    "tiles": "precision",
    "memory": "tile_memory",
    "metrics": "return_metrics",
    "floor": "teacher_floor",
}
COUPLED = LOSS | {
    "weight": "divergence_weight",
    "between": "teacher_coupling",
    "unlabelled_weight": "unlabeled_weight",
}
CONTRAST = {"tiles": "precision", "memory": "tile_memory"}
PURIFY = {"weight": "schedule"}
CHOICES = {"form": "method", "combine": "aggregate", "tell": "on_batch"}
CONFIG = {
    "weight": "alpha_schedule",
    "unlabelled_weight": "unlabeled_weight",
    "source_weights": "teacher_weights",
    "between": "teacher_coupling",
    "frozen": "freeze",
    "tiles": "precision",
    "memory": "tile_memory",
    "floor": "teacher_floor",
}


def refuses(old: dict[str, str]) -> Callable[[T], T]:
    """Decorate a function or a dataclass: a keyword in `old` raises a TypeError that names the new one.

    A keyword that is a parameter of the function is accepted.
    """

    def decorate(target: T) -> T:
        if isinstance(target, type):
            target.__init__ = decorate(target.__init__)  # type: ignore[misc]
            return target
        known = {name for name, one in signature(target).parameters.items() if one.kind is not Parameter.VAR_KEYWORD}
        renamed = {name: new for name, new in old.items() if name not in known}
        name = target.__qualname__.removesuffix(".__init__")

        @wraps(target)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for keyword in kwargs:
                if keyword in renamed:
                    raise TypeError(f"{name}() has no option {keyword!r}: it is called {renamed[keyword]} now")
            return target(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate
