"""What is asked of a row of the vocabulary: every scalar that a backend's row operation receives, in one place.

The C++ and Triton launchers read these fields by name; a name here is the name on every layer.
"""

from dataclasses import dataclass, field

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation")

# Rows of the metrics tensor, in this order. All are float32, one number per row of the vocabulary.
METRICS = (
    "divergence",  # nats at the temperature, before any weight
    "cross_entropy",  # of the student against the label at temperature 1, nats; 0 without labels
    "student_entropy",  # of q at the temperature, nats
    "teacher_entropy",  # of p, purified if it is, at the temperature, nats
    "confidence",  # of the clean teacher by the law's measure; without a law the largest p at the temperature
    "purification",  # the weight a of the disturbed branch; 0 without a law
    "agreement",  # 1 where student and (purified) teacher have the same most probable word, else 0
)


@dataclass(frozen=True)
class Transform:
    """How the numbers of a tile become logits: x * scale, then softcap * tanh(x / softcap) if there is a softcap."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Law:
    """How strongly, and where, the disturbed branch is subtracted. `hkdfast.purify` explains the words."""

    weight: str = "constant"  # constant | linear | gate | rows (a tensor gives the weight of each row)
    alpha: float = 1.0
    confidence: str = "max_prob"  # max_prob | entropy | target
    threshold: float = 0.5  # the gate opens below this confidence
    mode: str = "extrapolate"  # extrapolate | subtract
    plausibility: float = 0.0  # beta of the plausibility set; 0: no set
    outside: str = "clean"  # clean | drop


@dataclass(frozen=True)
class Objective:
    """The scalars of one distillation loss."""

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    soft_weight: float = 1.0  # times the divergence
    hard_weight: float = 0.0  # times the cross entropy at temperature 1
    ignore_index: int = -100
    floor: float = float("-inf")  # least log p of a word that the student does not mask
    difference: bool = False  # teacher and noisy tiles hold differences to the student's tile
    student: Transform = field(default=Transform())
    teacher: Transform = field(default=Transform())
    noisy: Transform = field(default=Transform())
    law: Law | None = None  # None: the teacher as it is
