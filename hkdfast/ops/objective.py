"""Every scalar that a backend's row operation receives, in one place.

The C++ and Triton launchers read these fields by name: a name here is the name on every layer.
"""

from ast import literal_eval
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

UNLABELED = -101  # label of a row without one: it has a divergence and no cross entropy

# Rows of the metrics tensor, in this order. All are float32, one number per row of the vocabulary.
METRICS = (
    "divergence",  # nats at the temperature, before any weight
    "cross_entropy",  # of the student against the label at temperature 1, nats; 0 without labels
    "student_entropy",  # of q at the temperature, nats
    "teacher_entropy",  # of p, purified if it is, at the temperature, nats
    "confidence",  # of the clean teacher by the contrast's measure; else the largest p at the temperature
    "contrast_weight",  # the weight a of the noisy branch; 0 without a contrast
    "agreement",  # 1 where student and (purified) teacher have the same most probable token, else 0
)


@dataclass(frozen=True)
class Transform:
    """How a tile's values become logits: x * scale, then softcap * tanh(x / softcap) if there is a softcap."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class ContrastSpec:
    """How strongly, and for which tokens, the noisy branch is subtracted; see `hkdfast.purify`."""

    schedule: str = "constant"  # constant | linear | gate | per_row (a tensor gives the weight of each row)
    alpha: float = 1.0
    confidence: str = "max_prob"  # max_prob | entropy | target
    threshold: float = 0.5  # of the gate: it contrasts rows whose confidence is lower
    mode: str = "extrapolate"  # extrapolate | subtract
    plausibility: float = 0.0  # beta of the plausibility set; 0: no set
    outside: str = "clean"  # clean | drop

    @property
    def reads_labels(self) -> bool:
        return self.confidence == "target" and self.schedule in ("linear", "gate")


@dataclass(frozen=True)
class Objective:
    """The scalars of one distillation loss."""

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    soft_weight: float = 1.0  # factor of the divergence
    hard_weight: float = 0.0  # factor of the cross entropy at temperature 1
    ignore_index: int = -100
    teacher_floor: float = float("-inf")  # lower bound of log p for tokens that the student does not mask
    difference: bool = False  # teacher and noisy tiles hold differences to the student's tile
    accumulate: bool = False  # add the gradient to the output's values instead of overwriting them
    student: Transform = Transform()
    teacher: Transform = Transform()
    noisy: Transform = Transform()
    law: ContrastSpec | None = None  # None: no contrast

    def encode(self) -> tuple[str, list[float]]:
        """(text, numbers), because an operator takes no dataclass.

        Floats stay numbers, so that torch.compile makes no new graph for each value of a schedule. It cannot trace json
        or dataclasses.asdict.
        """
        law = [] if self.law is None else [getattr(self.law, name) for name in CONTRAST_FIELDS]
        transforms = [[t.scale, t.softcap] for t in (self.student, self.teacher, self.noisy)]
        return encode([[getattr(self, name) for name in SCALARS], law, *transforms])

    @staticmethod
    def decode(text: str, numbers: Iterator[float]) -> "Objective":
        """The Objective that `encode` packed; numbers is an iterator."""
        scalars, contrast, *transforms = decode(text, numbers)
        student, teacher, noisy = (Transform(*group) for group in transforms)
        law = ContrastSpec(*contrast) if contrast else None
        return replace(Objective(*scalars), student=student, teacher=teacher, noisy=noisy, law=law)


CONTRAST_FIELDS = tuple(field.name for field in fields(ContrastSpec))
SCALARS = tuple(field.name for field in fields(Objective) if field.name not in ("student", "teacher", "noisy", "law"))


NUMBER = "#"  # the place of the next number in an encoded text


def encode(groups: list[list[Any]]) -> tuple[str, list[float]]:
    """(text, numbers) of lists of scalars."""
    text = ";".join([",".join([NUMBER if isinstance(x, float) else str(x) for x in group]) for group in groups])
    return text, [x for group in groups for x in group if isinstance(x, float)]


def decode(text: str, numbers: Iterator[float]) -> list[list[Any]]:
    """The lists that `encode` packed; numbers is an iterator."""
    return [[next(numbers) if x == NUMBER else literal(x) for x in part.split(",") if x] for part in text.split(";")]


def literal(word: str) -> Any:
    """The value whose str() this is: a whole number, True, False, None, or else a word."""
    try:
        return literal_eval(word)
    except ValueError:
        return word
