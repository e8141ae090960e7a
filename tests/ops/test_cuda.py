"""The cuda backend. Its row loop runs here on the CPU, as fibers under a scheduler that means no good
(tests/tools/cluster.cpp). Where there is a GPU, tests/test_rows.py runs the same cases on it."""

import contextlib
import dataclasses
import importlib.util
import mmap
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import test_nan
import torch
from cases import CASES, COMMON_OFFSETS, Case, assert_as_close_as_torch, inputs, law, run_rows
from moved import Moved

import hkdfast
from hkdfast import DIVERGENCES
from hkdfast.ops import native, reference
from hkdfast.ops.dispatch import find, load
from hkdfast.ops.objective import METRICS, Objective

ROOT = Path(__file__).parents[2]
SHARED = 232448  # bytes of a block on Hopper
ON_GPU = pytest.mark.skipif(hkdfast.backends()["cuda"] != "ok", reason=hkdfast.backends()["cuda"])


@dataclasses.dataclass
class Emulated:
    """A backend: so many clusters of blocks of warps, and the order in which their threads run."""

    module: object
    blocks: int = 2
    warps: int = 2
    clusters: int = 2
    shared_bytes: int = SHARED
    seed: int = 0
    without: str = ""  # which part of the Team does nothing

    def rows(self, *tensors):
        native.rows(self.module.rows, *tensors, self)

    def contrast(self, *tensors):
        native.contrast(self.module.contrast, *tensors, self)


def assert_matches(backend, case, divergence):
    exact = run_rows(reference, case, divergence, exact=True)
    plain = run_rows(reference, case, divergence)
    got = run_rows(backend, case, divergence)
    for name, truth, torch_, ours in zip(("loss", "gradient"), exact, plain, got, strict=False):
        assert_as_close_as_torch(ours, torch_, truth, name)
    for name, truth, torch_, ours in zip(METRICS, exact[2], plain[2], got[2], strict=True):
        assert_as_close_as_torch(ours, torch_, truth, name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_cluster_matches_the_definition(cluster, divergence, case):
    turn = list(CASES).index(case) + list(DIVERGENCES).index(divergence)
    assert_matches(Emulated(cluster, 2 ** (turn % 4), 1 + turn // 4 % 2, seed=turn), CASES[case], divergence)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("case", ["bf16", "ragged", "long", "constant law", "plausible"])
def test_every_size_of_a_cluster(cluster, case, blocks):
    for warps in (1, 3):
        assert_matches(Emulated(cluster, blocks, warps, seed=blocks), CASES[case], "reverse_kl")


BACKENDS = [pytest.param(Emulated, id="emulated"), pytest.param(Moved, marks=ON_GPU, id="gpu")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return Emulated(request.getfixturevalue("cluster")) if request.param is Emulated else Moved(load("cuda"))


def run_tiles(backend, divergence, *tiles, grad=None, kept=None, wanted=True, metrics=False, **options):
    """(loss, gradient, metrics) of tiles as they lie; kept: the gradient's dtype, if it is not the student's."""
    student, teacher, *rest = tiles
    noisy = rest[0] if rest else None
    n = len(student)
    loss, measured = torch.empty(n), torch.empty(len(METRICS), n) if metrics else None
    if grad is None and wanted:
        grad = torch.empty(student.shape, dtype=kept or student.dtype)
    objective = Objective(divergence=divergence, beta=0.3, **options)
    backend.rows(objective, student, teacher, noisy, None, None, None, loss, grad, measured)
    return loss, grad, measured


def tiles(n, vocab, dtype=torch.bfloat16, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(4 * torch.randn(n, vocab, generator=generator)).to(dtype) for _ in range(count)]


FAST = {"narrow": torch.bfloat16, "wide": torch.float32}  # dtype of the tiles; the gradient is bfloat16


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", FAST)
def test_fast_kinds_without_metrics(backend, kind, divergence, count):
    """Aligned tiles, several rows for each cluster, with and without a gradient."""
    options = law(alpha=0.7) if count == 3 else {}
    ours = tiles(7, 2048 + 8, FAST[kind], count)
    exact, exact_grad, _ = run_tiles(reference, divergence, *[t.double() for t in ours], **options)
    plain, plain_grad, _ = run_tiles(reference, divergence, *ours, kept=torch.bfloat16, **options)
    loss, grad, _ = run_tiles(backend, divergence, *ours, kept=torch.bfloat16, **options)
    assert_as_close_as_torch(loss, plain, exact)
    assert_as_close_as_torch(grad, plain_grad, exact_grad)
    assert ((grad.double() - exact_grad).norm() / exact_grad.norm()).item() < 3e-3
    alone, _, _ = run_tiles(backend, divergence, *ours, wanted=False, **options)
    # else another sweep gives the value, or another kind: float32 tiles without a gradient are no fast one
    assert torch.equal(alone, loss) or kind == "wide" or divergence in ("forward_kl", "reverse_kl")
    torch.testing.assert_close(alone, loss)


@pytest.mark.parametrize("apart", [3.0, 0.3, 0.03])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", FAST)
def test_fast_kinds_near_convergence(backend, kind, divergence, apart):
    student, noise = tiles(4, 4096)
    student = student.to(FAST[kind])
    teacher = (student.float() + apart * noise.float() / 4).to(FAST[kind])
    _, exact, _ = run_tiles(reference, divergence, student.double(), teacher.double())
    _, grad, _ = run_tiles(backend, divergence, student, teacher, kept=torch.bfloat16)
    assert ((grad.double() - exact).norm() / exact.norm()).item() < 3e-3


@pytest.mark.parametrize("common", COMMON_OFFSETS)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", [*FAST, "any"])
def test_a_large_common_offset_changes_nothing(backend, kind, divergence, count, common):
    options = law(alpha=0.7) if count == 3 else {}
    spread = max(3.0, abs(common) / 128) if kind == "narrow" else 3.0  # else bfloat16 makes all logits equal
    dtype = FAST.get(kind, torch.float32)
    case = Case((8, 1032), dtype, spread=spread, apart=spread / 3, common=common, options=options)
    ours, kept = inputs(case)[:count], None if kind == "any" else torch.bfloat16
    exact, exact_grad, _ = run_tiles(reference, divergence, *[t.double() for t in ours], **options)
    plain, plain_grad, _ = run_tiles(reference, divergence, *ours, kept=kept, **options)
    loss, grad, _ = run_tiles(backend, divergence, *ours, kept=kept, **options)
    roundings = 4 if kind == "any" else 8  # a fast kind's functions are within 2**-22, two roundings each
    assert_as_close_as_torch(loss, plain, exact, roundings=roundings)
    assert_as_close_as_torch(grad, plain_grad, exact_grad)


@pytest.mark.parametrize("common", [0.0, 2e4, -1e5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "options", [{"temperature": 2.0}, law(schedule="linear", plausibility=0.1)], ids=["plain", "law"]
)
def test_wide_tiles_with_labels_and_metrics(backend, divergence, options, common):
    ours = [t + common for t in tiles(5, 2048 + 8, torch.float32, 3 if "law" in options else 2)]
    labels, weight = torch.tensor([3, 2055, -100, 7, 0]), torch.linspace(0.5, 2, 5)
    objective = Objective(divergence=divergence, beta=0.3, hard_weight=0.7, **options)
    results = []
    for module, dtype in ((backend, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        given = [t.to(dtype) for t in ours] + [None] * (3 - len(ours))
        loss, metrics = torch.empty(5, dtype=dtype), torch.empty(len(METRICS), 5, dtype=dtype)
        grad = torch.empty(ours[0].shape, dtype=torch.float64 if dtype == torch.float64 else torch.bfloat16)
        module.rows(objective, *given, None, labels, weight, loss, grad, metrics)
        results.append((loss, grad, *metrics))
    for what, got, plain, exact in zip(("loss", "gradient", *METRICS), *results, strict=True):
        assert_as_close_as_torch(got, plain, exact, what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 5, 1021, 2311])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_that_are_not_aligned(backend, vocab, offset, dtype):
    """Views into wider tensors: nothing beside a row is read as its word, nothing beside it is written."""
    wide = [torch.full((5, vocab + 4), float("nan"), dtype=dtype) for _ in range(3)]
    views = [t[:, offset : offset + vocab] for t in wide]
    packed = tiles(5, vocab, dtype)
    for view, numbers in zip(views, packed, strict=False):
        view.copy_(numbers)
    loss, grad, _ = run_tiles(backend, "jensen_shannon", *views[:2], grad=views[2])
    expected, expected_grad, _ = run_tiles(reference, "jensen_shannon", *packed)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    wide[2][:, offset : offset + vocab] = float("nan")
    assert wide[2].isnan().all()


@pytest.mark.parametrize("vocab", [1024, 1031])
@pytest.mark.parametrize("count", [2, 3])
def test_in_place(backend, vocab, count):
    """The gradient over the student's tile, while the next rows are loaded: the same numbers."""
    options = law(schedule="linear", alpha=2.0) if count == 3 else {}
    for divergence in ("reverse_kl", "skew_kl"):
        ours = tiles(9, vocab, count=count)
        loss, grad, _ = run_tiles(backend, divergence, *ours, **options)
        again, over, _ = run_tiles(backend, divergence, *ours, grad=ours[0], **options)
        assert torch.equal(loss, again) and torch.equal(grad, over)
        assert over is ours[0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", FAST)
def test_a_gradient_is_added(backend, kind, divergence, count):
    """A row whose loss is NaN adds NaN, one whose loss is infinite nothing, nor does one that is ignored."""
    options = law(schedule="linear", alpha=2.0) if count == 3 else {}
    ours = tiles(6, 2048 + 8, FAST[kind], count)
    ours[0][1, 5] = float("nan")
    infinite = {"forward_kl": 0, "reverse_kl": 1}  # by a word that this side alone masks
    if divergence in infinite:
        ours[infinite[divergence]][3, 7] = float("-inf")
    labels = torch.tensor([0, 1, -100, 3, 4, 5])
    (before,) = tiles(6, 2048 + 8, count=1, seed=1)
    results = []
    for module, dtype in ((backend, None), (reference, None), (reference, torch.float64)):
        loss, grad = torch.empty(6, dtype=dtype or torch.float32), before.to(dtype or before.dtype, copy=True)
        given = [t.to(dtype or t.dtype) for t in ours] + [None] * (3 - count)
        objective = Objective(divergence=divergence, beta=0.3, accumulate=True, **options)
        module.rows(objective, *given, None, labels, None, loss, grad, None)
        results.append((loss, grad))
    (loss, grad), (plain, plain_grad), (exact, exact_grad) = results
    assert loss[1].isnan() and grad[1].isnan().all() and loss[2] == 0 and torch.equal(grad[2], before[2])
    live = [0, 4, 5]
    if divergence in infinite:
        assert loss[3] == float("inf") and torch.equal(grad[3], before[3])
    else:
        live.append(3)
    assert_as_close_as_torch(loss[live], plain[live], exact[live])
    assert_as_close_as_torch(grad[live], plain_grad[live], exact_grad[live])


@pytest.mark.parametrize("options", test_nan.OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_that_holds_a_nan(cluster, divergence, options):
    objective = Objective(divergence, beta=0.3, **test_nan.OPTIONS[options])
    count = 3 if objective.law else 2
    ours = [*(test_nan.draw(test_nan.ROWS, test_nan.VOCAB, seed=seed) for seed in range(count)), None][:3]
    turn = list(test_nan.OPTIONS).index(options) + list(DIVERGENCES).index(divergence)
    cases = [(side, *test_nan.EACH[(turn + 5 * side) % 8]) for side in range(count)]  # the first 8 are NaN
    test_nan.assert_spoiled(Emulated(cluster, 1 + turn % 2, seed=turn), objective, ours, cases)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", FAST)
def test_fast_kinds_and_a_row_that_holds_a_nan(cluster, kind, divergence, count, accumulate):
    options = law(schedule="linear", alpha=0.7) if count == 3 else {}
    objective = Objective(divergence, beta=0.3, accumulate=accumulate, **options)
    dtype = FAST[kind]
    ours = [*(test_nan.draw(test_nan.ROWS, 2048 + 8, seed=seed, dtype=dtype) for seed in range(count)), None][:3]
    places = list(zip(test_nan.VALUES, test_nan.WHERE, strict=False))
    cases = [(side, value, where) for side in range(count) for value, where in places]
    test_nan.assert_spoiled(Emulated(cluster), objective, ours, cases, kept=torch.bfloat16, measured=False)


def test_columns_with_a_stride(backend):
    student, teacher = (t.t() for t in tiles(300, 6))
    loss, grad, _ = run_tiles(backend, "forward_kl", student, teacher, grad=student.clone())
    expected, expected_grad, _ = run_tiles(reference, "forward_kl", student, teacher)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_ignored_rows_are_never_loaded(cluster):
    case = dataclasses.replace(CASES["labels"], shape=(9, 1000), ignored=(0, 1, 4, 8))
    student, teacher, _, _, labels, weight = inputs(case)
    student[[0, 1, 4, 8]] = float("nan")
    loss, grad = torch.empty(9), torch.empty(9, 1000)
    objective = Objective(hard_weight=0.7)
    Emulated(cluster).rows(objective, student, teacher, None, None, labels, weight, loss, grad, None)
    assert loss[[0, 1, 4, 8]].eq(0).all() and grad[[0, 1, 4, 8]].eq(0).all()
    assert loss[[2, 3, 5, 6, 7]].gt(0).all() and not grad.isnan().any()


@pytest.mark.parametrize("outside", ["clean", "drop"])
@pytest.mark.parametrize("plausibility", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "common"), [(torch.bfloat16, 0.0), (torch.float32, 0.0), (torch.float32, -2e4)])
def test_contrast_matches_the_definition(backend, dtype, common, plausibility, outside):
    case = Case((3, 1031), dtype, common=common, options=law(plausibility=plausibility, outside=outside))
    _, clean, noisy, *_ = inputs(case)
    objective = Objective(temperature=0.7, **case.options)
    out, plain = torch.empty(clean.shape), torch.empty(clean.shape)
    exact = torch.empty(clean.shape, dtype=torch.float64)
    backend.contrast(objective, clean, noisy, None, None, out)
    reference.contrast(objective, clean, noisy, None, None, plain)
    reference.contrast(objective, clean.double(), noisy.double(), None, None, exact)
    assert_as_close_as_torch(out, plain, exact)


@pytest.mark.parametrize("case", ["bf16", "ragged", "plausible"])
def test_no_order_of_the_threads_changes_a_bit(cluster, case):
    first = run_rows(Emulated(cluster, 4), CASES[case], "jensen_shannon")
    for seed in range(1, 6):
        for a, b in zip(first, run_rows(Emulated(cluster, 4, seed=seed), CASES[case], "jensen_shannon"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("without", ["sync_warp", "sync_block", "sync_cluster", "wait", "wait_for_sends", "fence"])
def test_the_emulation_sees_what_is_missing(cluster, without):
    """Each of these, taken away, makes some run of eight fail; else the tests above would prove nothing."""
    # as little room as a row needs, so that slots are filled again while others of the warp may still read them
    tight = Emulated(cluster, 2, 2, clusters=1, shared_bytes=SHARED)
    right = run_rows(tight, CASES["ragged"], "jensen_shannon")
    failures = 0
    for seed in range(8):
        try:
            got = run_rows(dataclasses.replace(tight, seed=seed, without=without), CASES["ragged"], "jensen_shannon")
            failures += not all(torch.equal(a, b) for a, b in zip(right, got, strict=True))
        except cluster.Unmet:
            failures += 1
    assert failures


def test_rows_beyond_two_to_the_31(cluster):
    vocab, stride = 1024, 2**31 + 8
    memory = mmap.mmap(-1, 2 * (stride + vocab), flags=mmap.MAP_PRIVATE | 0x4000)  # MAP_NORESERVE
    far = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, vocab), (stride, 1))
    student, teacher = tiles(2, vocab)
    far.copy_(student)
    loss, grad, _ = run_tiles(Emulated(cluster), "reverse_kl", far, teacher, grad=far)
    expected, expected_grad, _ = run_tiles(Emulated(cluster), "reverse_kl", student, teacher)
    assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)


@ON_GPU
def test_a_row_that_does_not_fit_runs_on_the_next_backend():
    student, teacher = (t.cuda() for t in tiles(2, 1_200_000))
    loss, grad = torch.empty(2, device="cuda"), torch.empty_like(student)
    arguments = (Objective("reverse_kl"), student, teacher, None, None, None, None, loss, grad, None)
    with pytest.warns(UserWarning, match="triton.*1,200,000 tokens do not fit"):
        load("cuda").rows(*arguments)
    expected, _, _ = run_tiles(reference, "reverse_kl", student.cpu(), teacher.cpu())
    torch.testing.assert_close(loss.cpu(), expected)
    with pytest.raises(ValueError, match="1,200,000 tokens do not fit"):
        find(student.device, student.dtype, "cuda").rows(*arguments)


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    """hkdfast.ops.cuda on a machine that seems to have a GPU, whose kernels take rows of 500 words."""
    calls = []

    def rows(objective, student, teacher, noisy, *others):
        calls.append(others[-4])
        return calls[-1] <= 500

    def contrast(objective, clean, noisy, alpha, labels, out, n, vocab, plan, device, stream):
        calls.append(vocab)
        return vocab <= 500

    compiled = types.ModuleType("hkdfast._cuda")
    compiled.rows, compiled.contrast, compiled.calls = rows, contrast, calls
    compiled.missing, compiled.longest = (lambda index: ""), (lambda given, index: 1000 // len(given))
    monkeypatch.setitem(sys.modules, "hkdfast._cuda", compiled)
    monkeypatch.setattr(hkdfast, "_cuda", compiled, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(sys.modules["hkdfast.ops.dispatch"], "_warned", set())
    monkeypatch.delitem(sys.modules, "hkdfast.ops.cuda", raising=False)
    yield load("cuda")
    sys.modules.pop("hkdfast.ops.cuda", None)
    vars(hkdfast).pop("cuda", None)


def rows_on_gpu(operations, vocab):
    student, teacher = (t.as_subclass(OnGpu) for t in tiles(2, vocab))
    loss, grad = torch.empty(2), torch.zeros(2, vocab)
    operations.rows(Objective("reverse_kl"), student, teacher, None, None, None, None, loss, grad, None)
    return loss


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_fall_to_the_next_backend_is_told_once(cuda):
    rows_on_gpu(cuda, 500)
    with pytest.warns(UserWarning, match=r"its \w+ backend.*rows of 501 tokens do not fit.*bfloat16.* have 500"):
        loss = rows_on_gpu(cuda, 501)
    expected, _, _ = run_tiles(reference, "reverse_kl", *tiles(2, 501))
    torch.testing.assert_close(torch.Tensor(loss), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows_on_gpu(cuda, 501)
    assert cuda._cuda.calls == [500, 501, 501]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asked_for_by_name_it_refuses_what_does_not_fit(cuda):
    device = torch.device("cuda", 0)
    by_name, any_backend = find(device, torch.bfloat16, "cuda"), find(device, torch.bfloat16)
    assert any_backend is cuda
    rows_on_gpu(by_name, 500)
    with pytest.raises(ValueError, match="rows of 501 tokens do not fit on chip, the longest of such .* have 500"):
        rows_on_gpu(by_name, 501)
    cuda._cuda.rows = lambda *given: False  # the row fits in a cluster, for which the device has no room
    with pytest.raises(ValueError, match=r"device 0 cannot run a cluster .* a row of 499 tokens \(bfloat16.*MIG"):
        rows_on_gpu(by_name, 499)
    clean, noisy = (t.as_subclass(OnGpu) for t in tiles(2, 600))
    with pytest.raises(ValueError, match="rows of 600 tokens do not fit"):
        by_name.contrast(Objective(**law()), clean, noisy, None, None, torch.empty(2, 600))
    cuda._cuda.missing = lambda index: "compute capability 8.0 has no thread-block clusters"
    cuda.missing.cache_clear()
    with pytest.raises(ValueError, match="device 0: compute capability 8.0 has no"):
        rows_on_gpu(by_name, 100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_plan_of_the_environment_reaches_the_kernels(cuda, monkeypatch):
    monkeypatch.setenv("HKDFAST_CUDA_PLAN", "cluster=4,chunk=512")
    asked = []
    cuda._cuda.rows = lambda *given: asked.append(given[-3]) or len(asked) < 2
    rows_on_gpu(cuda, 100)
    assert asked == [(4, 0, 0, 512, 0)]
    with pytest.raises(ValueError, match="HKDFAST_CUDA_PLAN='cluster=4,chunk=512' has no room for rows of 100 tokens"):
        rows_on_gpu(cuda, 100)
    monkeypatch.setenv("HKDFAST_CUDA_PLAN", "cluster=5")
    with pytest.raises(ValueError, match="has cluster=5, expected 1, 2, 4, 8, 16"):
        rows_on_gpu(cuda, 100)
    assert len(asked) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backends_tell_how_long_a_row_may_be(cuda):
    report = hkdfast.backends()
    assert report["cuda"] == "ok"
    assert "500 of 2 bfloat16 tiles, 333 of 3 bfloat16 tiles, 500 of 2 float32 tiles" in report["cuda-rows"]


@ON_GPU
def test_a_cuda_graph_replays_to_the_same_bits():
    student, teacher = (t.cuda() for t in tiles(300, 32000))
    loss, grad = torch.empty(300, device="cuda"), torch.empty_like(student)
    arguments = (Objective("jensen_shannon"), student, teacher, None, None, None, None, loss, grad, None)
    load("cuda").rows(*arguments)
    before = loss.clone(), grad.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        load("cuda").rows(*arguments)
    loss.fill_(float("nan")), grad.fill_(float("nan"))
    graph.replay()
    assert torch.equal(loss, before[0]) and torch.equal(grad, before[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backends_say_why_there_is_no_cuda():
    why = hkdfast.backends()["cuda"]
    assert "torch" in why if importlib.util.find_spec("hkdfast._cuda") else native.not_built("_cuda") in why


IMPORT = """
import sys
import hkdfast, torch
hkdfast.distill_loss(torch.randn(2, 9, requires_grad=True), torch.randn(2, 9)).backward()
print("hkdfast._cuda" in sys.modules or "hkdfast.ops.cuda" in sys.modules)
"""


def test_work_on_the_cpu_never_touches_the_cuda_module():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(not importlib.util.find_spec("hkdfast._cuda"), reason="built without nvcc")
def test_the_compiler_kept_to_registers():
    done = subprocess.run(
        [sys.executable, ROOT / "tests/tools/compile_cuda.py"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
