"""A patch of one trainer object: what it replaces, and how that comes back."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

MARK = "hkdfast_patch"  # attribute of a trainer that is patched
MISSING = object()
TRIED = {"trl": "1.16.0", "transformers": "5.19.0, 5.23.0 and 5.24.0"}  # with which the tests of apply passed


@dataclass(frozen=True)
class Kind:
    """A trainer class that can be patched.

    Args:
        methods: {name: its parameters} of the methods that are replaced, as they are in the versions of TRIED.
        prepare: function (trainer, Request) that checks them and returns {name: value} of what is set on the trainer.
        reads: {name: its parameters} of other methods and functions that the replacements call.
    """

    methods: dict[str, str]
    prepare: Callable
    reads: dict[str, str] = field(default_factory=dict)

    def check(self, owner, trainer):
        """Refuse a trainer of another version, or one that has methods of its own where these would be replaced."""
        package = owner.__module__.partition(".")[0]
        for name, parameters in (self.methods | self.reads).items():
            found = getattr(owner, name, None)
            have = "missing" if found is None else f"({', '.join(inspect.signature(found).parameters)})"
            if have != f"({parameters})":
                raise ValueError(
                    f"{owner.__name__}.{name} of {package} {version(package)} is {have}, expected ({parameters}): "
                    f"this patch was tried with {package} {TRIED[package]}"
                )
        for name in self.methods:
            if name in vars(trainer):
                raise ValueError(f"{name} of this {type(trainer).__name__} was replaced already: apply hkdfast first")
            if getattr(type(trainer), name) is not getattr(owner, name):
                raise ValueError(
                    f"{type(trainer).__name__} has its own {name}, which would not run any more: apply takes a trainer "
                    f"that uses {owner.__name__}'s"
                )


@dataclass(frozen=True)
class Request:
    """The arguments of `apply`."""

    divergence: str | None
    options: dict
    teacher: object = None


class Patch:
    """What `apply` did to a trainer. `undo()` takes it back; so does the end of a `with` block.

    Args:
        trainer: the trainer.
        values: {name: value} to set on it.
        methods: the names among them that nothing else may have replaced when they are taken back.
    """

    def __init__(self, trainer, values, methods):
        self.trainer, self.values, self.methods = trainer, values, methods
        self.before = {name: vars(trainer).get(name, MISSING) for name in values}
        for name, value in values.items():
            setattr(trainer, name, value)
        setattr(trainer, MARK, self)

    def undo(self) -> None:
        """Give the trainer back what it had, the very objects. Once undone, nothing more happens.

        Raises:
            RuntimeError: if something else has replaced a method since: undo that first.
        """
        if vars(self.trainer).get(MARK) is not self:
            return
        for name in self.methods:
            if vars(self.trainer).get(name) is not self.values[name]:
                raise RuntimeError(f"{name} was replaced again after hkdfast was applied: undo that first")
        delattr(self.trainer, MARK)
        for name, value in self.before.items():
            if value is MISSING:
                vars(self.trainer).pop(name, None)
            else:
                setattr(self.trainer, name, value)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
