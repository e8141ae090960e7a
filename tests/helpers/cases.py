"""Inputs that every backend's row operation meets, and how close it has to come."""

from dataclasses import dataclass, field

import torch

from hkdfast.ops.dispatch import MODULES
from hkdfast.ops.objective import METRICS, UNLABELED, ContrastSpec, Objective, Transform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def home(module):
    """The device on which a backend's tiles live here; what a test puts in a backend's place runs on the CPU."""
    on_gpu = [name for backend, name in MODULES.items() if backend != "cpu"]
    return DEVICE if getattr(module, "__name__", None) in on_gpu else "cpu"


COMMON_OFFSETS = [1e3, 5e3, 1e5, -2e4]  # beyond 2**12 a float32 has no room for parts of 2**-12


@dataclass(frozen=True)
class Case:
    shape: tuple = (4, 1000)
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype | None = None  # None: the student's
    spread: float = 4.0  # standard deviation of the logits
    apart: float | None = None  # teacher = student + this much noise; None: independent of it
    common: float = 0.0  # added to the logits of all sides: a shift changes nothing
    offset: float = 0.0  # added to the teacher's logits, likewise
    masked: tuple = ((), (), ())  # words of student, teacher, noisy that are -inf
    labels: bool = False
    ignored: tuple = ()  # rows
    unlabeled: tuple = ()  # rows
    weighted: bool = False
    options: dict = field(default_factory=dict)  # of Objective


def law(**words):
    return {"law": ContrastSpec(**{"alpha": 1.5, **words})}


# Errors are compared by the largest over the rows: where PyTorch can be lucky on a few rows, there are more of them.
CASES = {
    "plain": Case(),
    "ragged": Case((3, 1031), options={"temperature": 0.5}),
    "bf16": Case(dtype=torch.bfloat16),
    "fp16": Case(dtype=torch.float16),
    "mixed dtypes": Case(dtype=torch.bfloat16, teacher_dtype=torch.float32),
    "one word": Case((2, 1)),
    "two words": Case((2, 2)),
    "no rows": Case((0, 100)),
    "long": Case((2, 20011), torch.bfloat16),
    "far": Case(spread=12.0),
    "near": Case(apart=0.1),
    "converged": Case((24, 1000), apart=0.01),
    "equal": Case(apart=0.0),
    "shifted": Case(apart=0.1, offset=100.0),
    "hot": Case(options={"temperature": 20.0}),
    "cold": Case(options={"temperature": 0.05}),
    "teacher masked": Case(masked=((), (0, 7, 999), ()), options={"teacher_floor": -30.0}),
    "both masked": Case(masked=((0, 7, 999), (0, 7, 999), ())),
    "labels": Case(labels=True, ignored=(1,), weighted=True, options={"hard_weight": 0.7, "temperature": 2.0}),
    "t squared": Case(weighted=True, options={"soft_weight": 4.0, "temperature": 2.0}),
    "skewed": Case(options={"beta": 0.1}),
    "accumulated": Case(options={"accumulate": True}),
    "accumulated bf16": Case(
        (24, 1031), torch.bfloat16, labels=True, ignored=(1,), unlabeled=(0, 2),
        options={"accumulate": True, "hard_weight": 0.7},
    ),
    "scaled": Case(options={"student": Transform(0.5), "teacher": Transform(2.0)}),
    "softcap": Case(options={"student": Transform(1.0, 8.0), "teacher": Transform(0.5, 5.0)}),
    "some labels": Case((24, 1000), labels=True, ignored=(2,), unlabeled=(0, 1, 7), options={"hard_weight": 0.7}),
    "no labels, first word masked": Case(
        labels=True, unlabeled=(0, 3), masked=((0,), (0,), ()), options={"hard_weight": 0.7}
    ),
    "softcap and labels": Case(
        labels=True, unlabeled=(3,), options={"student": Transform(2.0, 8.0), "hard_weight": 0.3}
    ),
    "difference": Case(apart=None, spread=1.0, options={"difference": True}),
    "constant law": Case(options=law(), apart=0.5),
    "linear law": Case((24, 1000), options=law(schedule="linear", alpha=8.0), spread=2.0),
    "gate": Case(options=law(schedule="gate", threshold=0.2, alpha=2.0), spread=3.0),
    "entropy law": Case(options=law(schedule="linear", confidence="entropy", alpha=3.0), spread=2.0),
    "target law": Case(options=law(schedule="linear", confidence="target"), labels=True, ignored=(0,)),
    "weights of rows": Case(options=law(schedule="per_row"), dtype=torch.bfloat16),
    "subtract": Case(options=law(mode="subtract", alpha=0.6)),
    "plausible": Case(options={**law(plausibility=0.1), "temperature": 2.0}),
    "dropped": Case(options={**law(plausibility=0.1, outside="drop"), "teacher_floor": -30.0}),
    "masked law": Case(options={**law(), "teacher_floor": -30.0}, masked=((), (3, 4), (4, 5))),
    "softcap law": Case(options={**law(), "teacher": Transform(1.0, 6.0), "noisy": Transform(1.0, 6.0)}),
    "difference law": Case(options={**law(), "difference": True}, spread=1.0),
}  # fmt: skip


def inputs(case):
    """(student, teacher, noisy, alpha, labels, weight) of a case, in its dtypes, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(like=None, offset=0.0, masked=(), dtype=None):
        x = case.spread * torch.randn(case.shape, generator=generator)
        if like is not None and case.apart is not None:
            x = like.float() + case.apart * x / case.spread
        else:
            x = x + case.common
        x = (x + offset).to(dtype or case.dtype)
        x[:, list(masked)] = float("-inf")
        return x

    n, vocab = case.shape
    student = draw(masked=case.masked[0])
    teacher = draw(student, case.offset, case.masked[1], case.teacher_dtype)
    noisy = draw(student, case.offset, case.masked[2], case.teacher_dtype) if case.options.get("law") else None
    alpha = torch.rand(n, generator=generator) * 2
    labels = torch.randint(vocab, (n,), generator=generator) if case.labels else None
    if labels is not None:
        labels[list(case.ignored)] = -100
        labels[list(case.unlabeled)] = UNLABELED
    weight = torch.linspace(0.5, 2, n) if case.weighted else None
    return student, teacher, noisy, alpha, labels, weight


def run_rows(module, case, divergence, exact=False, **options):
    """(loss, gradient, metrics) of a backend's row operation, brought to the CPU; exact: in float64."""
    device = home(module)
    student, teacher, noisy, alpha, labels, weight = (t if t is None else t.to(device) for t in inputs(case))
    objective = Objective(divergence=divergence, **{"beta": 0.3, **case.options, **options})
    if exact:
        student, teacher, noisy = (t if t is None else t.double() for t in (student, teacher, noisy))
    wide = torch.float64 if exact else torch.float32
    kept = torch.float64 if exact else torch.float32 if student.dtype == torch.float16 else student.dtype
    n = len(student)
    loss, metrics = (torch.empty(*shape, dtype=wide, device=device) for shape in ((n,), (len(METRICS), n)))
    grad = torch.empty_like(student, dtype=kept)
    if objective.accumulate:  # to a gradient of about the same size, the same numbers in every dtype
        before = 1e-3 * torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
        grad.copy_(before.to(case.dtype))
    by_rows = objective.law is not None and objective.law.schedule == "per_row"
    module.rows(objective, student, teacher, noisy, alpha if by_rows else None, labels, weight, loss, grad, metrics)
    return loss.cpu(), grad.cpu(), metrics.cpu()


def worst(x):
    return x.abs().max().item() if x.numel() else 0.0


def assert_as_close_as_torch(got, plain, exact, what="", roundings=4):
    """The error to float64 is at most twice that of plain PyTorch in the same dtype, give or take some roundings."""
    assert got.shape == exact.shape
    assert not got.isnan().any(), what
    same = got == exact  # infinities too
    error, bound = worst((got - exact)[~same]), worst((plain - exact)[plain != exact])
    most = worst(exact[exact.isfinite()])
    assert error <= 2 * bound + roundings * torch.finfo(torch.float32).eps * most, (
        f"{what}: error {error:.3g}, PyTorch's {bound:.3g}, largest {most:.3g}"
    )
