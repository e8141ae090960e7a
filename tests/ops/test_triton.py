"""What is Triton's own: steps and tails, strides, the gradient in the student's place, rows that are taken back."""

import mmap
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from cases import Case, assert_as_close_as_torch, law, run_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from hkdfast.ops import reference
from hkdfast.ops.objective import METRICS, ContrastSpec, Objective, Transform
from hkdfast.ops.reference import DIVERGENCES

pytest.importorskip("triton")
from hkdfast.kernels import distill
from hkdfast.kernels.launch import tile_choice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = tile_choice((torch.empty(1, 1),))["BLOCK"]


def draw(n, vocab, dtype=torch.float32, seed=0, spread=4.0):
    return (spread * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def outputs(n, vocab, dtype=torch.float32):
    return torch.empty(n, device=DEVICE), torch.empty(n, vocab, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("vocab", [1, 7, 8, 9, BLOCK - 1, BLOCK, BLOCK + 1, 8 * BLOCK + 9])
def test_every_word_is_met_once(vocab):
    """Tails of a lane and of a block, in forward and in backward sweeps, and the longer block of long rows."""
    case = Case((2, vocab))
    for divergence in ("reverse_kl", "jensen_shannon"):
        exact, plain, ours = (
            run_rows(reference, case, divergence, exact=True),
            run_rows(reference, case, divergence),
            run_rows(distill, case, divergence),
        )
        for truth, torch_, got in zip(exact, plain, ours, strict=True):
            assert_as_close_as_torch(got, torch_, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_in_the_students_place(divergence, dtype):
    """Also where a softcap and a label read the student again, and where rows are not neighbors in memory."""
    n, vocab = 3, BLOCK + 77
    objective = Objective(divergence, beta=0.3, hard_weight=0.5, student=Transform(1.0, 20.0))
    memory = draw(n, vocab + 51, dtype)
    student, teacher = memory[:, :vocab], draw(n, vocab + 3, dtype, 1)[:, 3:]
    labels = torch.tensor([5, vocab - 1, -100], device=DEVICE)
    beside = memory[:, vocab:].clone()
    loss, grad = outputs(n, vocab, dtype)
    distill.rows(objective, student.clone(), teacher, None, None, labels, None, loss, grad, None)
    again = torch.empty_like(loss)
    distill.rows(objective, student, teacher, None, None, labels, None, again, student, None)
    assert torch.equal(loss, again) and torch.equal(grad, student)
    assert torch.equal(memory[:, vocab:], beside) and grad[2].eq(0).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation"])
def test_each_tile_has_its_own_dtype(divergence):
    n, vocab = 2, 300
    objective = Objective(divergence, law=ContrastSpec(alpha=1.0))
    tiles = [draw(n, vocab, dtype, seed) for seed, dtype in enumerate(DTYPES)]
    loss, grad = outputs(n, vocab, torch.float16)
    exact, exact_grad = (t.double() for t in outputs(n, vocab))
    distill.rows(objective, *tiles, None, None, None, loss, grad, None)
    reference.rows(objective, *(t.double() for t in tiles), None, None, None, exact, exact_grad, None)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.05}, {"student": Transform(0.7, 9.0), "teacher": Transform(0.7, 9.0)}]
)
def test_equal_tiles_have_no_gradient_at_all(divergence, options):
    student = draw(2, 500)
    loss, grad = outputs(2, 500)
    distill.rows(Objective(divergence, **options), student, student.clone(), None, None, None, None, loss, grad, None)
    assert loss.eq(0).all() and grad.eq(0).all()


def test_a_row_that_is_not_finite_stays_alone():
    """NaN or an infinite logit: loss and gradient are NaN. Infinite divergence or cross entropy: the gradient is 0."""
    n, vocab = 5, 200
    student, teacher = draw(n, vocab), draw(n, vocab, seed=1)
    labels = torch.full((n,), 3, device=DEVICE)
    student[0, 7], teacher[1, 7], teacher[2, 7], student[3, 3] = (
        float("nan"),
        float("inf"),
        float("-inf"),
        float("-inf"),
    )
    for divergence in DIVERGENCES:
        objective = Objective(divergence, hard_weight=1.0)
        loss, grad = outputs(n, vocab)
        distill.rows(objective, student, teacher, None, None, labels, None, loss, grad, None)
        assert loss[[0, 1]].isnan().all() and grad[[0, 1]].isnan().all()
        assert loss[3].isinf() and grad[3].eq(0).all()
        alone, alone_grad = outputs(1, vocab)
        distill.rows(objective, student[4:], teacher[4:], None, None, labels[4:], None, alone, alone_grad, None)
        assert torch.equal(alone, loss[4:]) and torch.equal(alone_grad, grad[4:])
        if divergence == "reverse_kl":
            assert loss[2] == float("inf") and grad[2].eq(0).all()
        else:
            assert loss[2].isfinite() and grad[2].ne(0).any()


@pytest.mark.parametrize("options", [{}, {"hard_weight": 0.5}, {"teacher_floor": -60.0}, law(), law(schedule="linear")])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_infinite_rows_are_not_added(divergence, options):
    """A NaN or an infinite logit adds NaN, an infinite divergence nothing; logits may be as far apart as they like."""
    n, vocab = 8, BLOCK + 9
    student, teacher, noisy, before = (draw(n, vocab, seed=seed) for seed in range(4))
    student[0, 3], teacher[1, -1] = float("nan"), float("inf")
    teacher[2, 5] = student[3, 6] = float("-inf")
    student[4, 7] = teacher[4, 7] = float("-inf")
    teacher[5, 8] = -1e30
    labels = torch.tensor([1, 2, 3, 4, 5, 6, 7, -100], device=DEVICE)
    weight = torch.linspace(0.5, 2, n, device=DEVICE)
    objective = Objective(divergence, beta=0.3, accumulate=True, **options)
    results = []
    for module in (distill, reference):
        loss, grad = torch.empty(n, device=DEVICE), before.clone()
        third = noisy if objective.law else None
        module.rows(objective, student, teacher, third, None, labels, weight, loss, grad, None)
        results.append((loss, grad))
    (loss, grad), (expected, exact) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert loss[:2].isnan().all() and grad[:2].isnan().all()
    still = [i for i in range(n) if loss[i].isinf()] + [7]
    assert {7} <= set(still) <= {2, 3, 7} and torch.equal(grad[still], before[still])
    assert not any(torch.equal(grad[i], before[i]) for i in (4, 5, 6))


def test_words_that_only_the_noisy_branch_masks():
    """They send a row through two sweeps more; its neighbor, without any, has to come out as if alone."""
    n, vocab = 2, BLOCK + 30
    student, clean, noisy = (draw(n, vocab, seed=seed) for seed in range(3))
    noisy[0, 5] = noisy[0, -1] = clean[1, 9] = float("-inf")
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
        for mode in ("extrapolate", "subtract"):
            objective = Objective(
                divergence, teacher_floor=-40.0 if divergence == "reverse_kl" else float("-inf"), **law(mode=mode)
            )
            results = []
            for module, dtype in ((distill, torch.float32), (reference, torch.float32), (reference, torch.float64)):
                tiles = [tile.to(dtype) for tile in (student, clean, noisy)]
                shapes = ((n,), (n, vocab), (len(METRICS), n))
                loss, grad, metrics = (torch.empty(*s, dtype=dtype, device=DEVICE) for s in shapes)
                module.rows(objective, *tiles, None, None, None, loss, grad, metrics)
                results.append((loss, grad, metrics))
            for got, plain, exact in zip(*results, strict=True):
                assert_as_close_as_torch(got, plain, exact)


def test_ends_of_beta_are_their_divergences():
    for name, beta, same in (("skew_kl", 0.0, "forward_kl"), ("skew_reverse_kl", 1.0, "reverse_kl")):
        case = Case((2, 100), masked=((), (), ()))
        for got, wanted in zip(run_rows(distill, case, name, beta=beta), run_rows(distill, case, same), strict=True):
            assert torch.equal(got, wanted)


def test_rows_beyond_two_to_the_31():
    """Row 2 begins past 2**31 elements of a tile of which only three rows are ever touched."""
    vocab, stride = 64, 2**30 + 16
    size = 2 * (2 * stride + vocab)
    keep_nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE: 4 GiB of addresses, no memory
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=keep_nothing), dtype=torch.bfloat16)
    student = memory.as_strided((3, vocab), (stride, 1))
    student.copy_(draw(3, vocab, torch.bfloat16).cpu())
    teacher = draw(3, vocab, torch.bfloat16, 1).cpu()
    if DEVICE != "cpu":
        pytest.skip("host memory, for the interpreter")
    loss, grad = outputs(3, vocab, torch.bfloat16)
    distill.rows(Objective("jensen_shannon"), student.clone(), teacher, None, None, None, None, loss, grad, None)
    far = torch.empty_like(loss)
    distill.rows(Objective("jensen_shannon"), student, teacher, None, None, None, None, far, student, None)
    assert torch.equal(loss, far) and torch.equal(grad, student)


LAWS = st.none() | st.builds(
    ContrastSpec,
    schedule=st.sampled_from(["constant", "linear", "gate"]),
    alpha=st.floats(0, 3),
    confidence=st.sampled_from(["max_prob", "entropy", "target"]),
    threshold=st.floats(0, 1),
    mode=st.sampled_from(["extrapolate", "subtract"]),
    plausibility=st.sampled_from([0.0, 0.01, 0.1]),
    outside=st.sampled_from(["clean", "drop"]),
)
TRANSFORMS = st.builds(Transform, st.floats(0.3, 2), st.none() | st.floats(3, 30))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    divergence=st.sampled_from(list(DIVERGENCES)),
    beta=st.floats(0.05, 0.95),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 700)),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    temperature=st.floats(0.05, 20),
    weights=st.tuples(st.floats(0, 4), st.floats(0, 2)),
    transforms=st.tuples(*[TRANSFORMS] * 3),
    the_law=LAWS,
    difference=st.booleans(),
    spread=st.floats(0.01, 8),
    seed=st.integers(0, 99),
)
def test_any_row(divergence, beta, shape, dtypes, temperature, weights, transforms, the_law, difference, spread, seed):
    """Float32 tiles that hold the numbers of the drawn dtypes tell what rounding costs PyTorch."""
    student, teacher, noisy = (draw(*shape, dtype, seed + i, spread) for i, dtype in enumerate(dtypes))
    noisy = noisy if the_law else None
    labels = torch.arange(shape[0], device=DEVICE) % shape[1]
    objective = Objective(
        divergence,
        beta=beta,
        temperature=temperature,
        soft_weight=weights[0],
        hard_weight=weights[1],
        teacher_floor=-60.0,
        difference=difference,
        **dict(zip(("student", "teacher", "noisy"), transforms, strict=True)),
        law=the_law,
    )
    results = []
    for module, dtype in ((distill, None), (reference, torch.float32), (reference, torch.float64)):
        tiles = [t if t is None or dtype is None else t.to(dtype) for t in (student, teacher, noisy)]
        wide = dtype or torch.float32
        loss, grad = torch.empty(shape[0], dtype=wide, device=DEVICE), torch.empty(shape, dtype=wide, device=DEVICE)
        module.rows(objective, *tiles, None, labels, None, loss, grad, None)
        results.append((loss, grad))
    for got, plain, exact in zip(*results, strict=True):
        # a row or two is a small sample of PyTorch's error: it may have been lucky
        size = exact.abs().max().item()
        error, usual = (got - exact).abs().max().item(), (plain - exact).abs().max().item()
        assert error <= 4 * usual + 1e-5 * size + 1e-9 * (1 + 1 / temperature), (error, usual, size)


@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux")
def test_compiles_without_spills_for_a_gpu_that_is_not_here():
    script = Path(__file__).parents[1] / "tools" / "compile_triton.py"
    command = [sys.executable, str(script), "--targets", "90", "--only", "rows, bfloat16, reverse_kl, gradient"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("1 instantiations for 90"), done.stdout + done.stderr


WITHOUT_GPU = """
import types, torch, triton
torch.cuda.is_available = lambda: True
triton.runtime.driver.set_active(types.SimpleNamespace(get_current_target=lambda: None))
from hkdfast.kernels import distill
def trial():
    raise RuntimeError("PassManager::run failed\\n  in a long log")
distill.trial = trial if FAILS else lambda: None
from hkdfast.ops import dispatch
dispatch.MODULES = {"triton": dispatch.MODULES["triton"]}  # the others would look for the GPU
print(dispatch.backends()["triton"])
"""


@pytest.mark.parametrize("fails", [True, False])
def test_backends_compile_a_kernel_before_they_say_ok(fails):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = WITHOUT_GPU.replace("FAILS", str(fails))
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    reason = (
        rf"ImportError: .*Triton {version('triton')} compiles no kernel for this GPU: RuntimeError: PassManager.*log"
    )
    assert re.fullmatch(reason if fails else "ok", found.strip()), found


def test_the_trial_is_a_call_of_the_row_operation(monkeypatch):
    plain = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: plain(*shape))
    distill.trial()
