"""distill_loss and contrast on the device at hand, a GPU if there is one: against float64 on that device, and what only
a GPU can show. benchmarks/speed/gpu.sh runs this there. Below: what can be shown of it without a GPU."""

import types

import pytest
import torch
from cases import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from truth import as_leaves, exactly, leaves, near_and_far, off, with_gradients

from hkdfast import DIVERGENCES, Edge, Head, backends, contrast, coupled_loss, distill_loss, purify
from hkdfast.engine import tile_loop
from hkdfast.heads import Purified
from hkdfast.ops.dispatch import ORDER, load
from hkdfast.ops.objective import Objective

BACKENDS = [name for name in ORDER[DEVICE] if name != "reference" and backends()[name] == "ok"]
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def moved(source):
    """A source on the device."""
    if isinstance(source, Purified):
        return purify(moved(source.clean), [moved(one) for one in source.noisy], source.law.alpha)
    if isinstance(source, Head):
        hidden, weight = source.hidden.to(DEVICE), source.weight.to(DEVICE)
        bias = None if source.bias is None else source.bias.to(DEVICE)
        return Head(hidden, weight, bias, source.scale, source.softcap)
    return source.to(DEVICE)


def assert_close(student, teacher, bound, *args, backend, **options):
    student, teacher = moved(student), moved(teacher)
    exact = exactly(
        student, teacher, *args, **{k: v for k, v in options.items() if k not in ("precision", "tile_memory")}
    )
    got = with_gradients(distill_loss, student, teacher, *args, backend=backend, **options)
    for one, true in zip(got, exact, strict=True):
        assert off(one, true) < bound, (off(one, true), bound)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 3e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads(backend, divergence, dtype, bound, monkeypatch):
    """Three ragged blocks: the first writes the weight's gradient, the others add to it."""
    monkeypatch.setattr("hkdfast.engine.tile_loop.rows_per_block", lambda *args: 20)
    student, teacher = near_and_far(0.3, dtype, rows=48, vocab=1031)
    assert_close(student, teacher, bound, divergence, backend=backend)


@on_a_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_past_two_to_the_31_elements(backend):
    """The same bits as in neighboring rows, read and written in place."""
    stride, vocab = 2**30 + 16, 4096
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    module = load(backend)
    draw = torch.Generator(DEVICE).manual_seed(0)
    student, teacher = (torch.randn(3, vocab, generator=draw, device=DEVICE).bfloat16() for _ in range(2))
    space = torch.empty(2 * stride + vocab, dtype=torch.bfloat16, device=DEVICE)
    away = space.as_strided((3, vocab), (stride, 1)).copy_(student)
    found = []
    for tile in (student, away):
        loss = torch.empty(3, device=DEVICE)
        module.rows(Objective("jensen_shannon"), tile, teacher, None, None, None, None, loss, tile, None)
        found.append((loss, tile.clone()))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("apart", [None, 0.3, 0.03])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_near_and_far(backend, apart):
    student, teacher = near_and_far(apart, rows=64, width=256, vocab=4000)
    assert_close(student, teacher, 3e-3, "reverse_kl", backend=backend)


@pytest.mark.parametrize("name, bound", [("bfloat16", 6e-2), ("difference", 2.5e-2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_tiles(backend, name, bound):
    student, teacher = near_and_far(0.3, shared=True)
    assert_close(student, teacher, bound, "reverse_kl", backend=backend, precision=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_with_everything(backend):
    """Bias, scale, softcap, labels of which some are ignored, weights, hard loss: rows are gathered."""
    plain, teacher = near_and_far(0.5, rows=40, vocab=517)
    bias = torch.randn(517, generator=torch.Generator().manual_seed(1)).to(plain.weight.dtype)
    student = Head(plain.hidden, plain.weight, bias, 0.7, 20.0)
    labels = torch.arange(40, device=DEVICE) % 517
    labels[::3] = -100
    options = dict(
        labels=labels, hard_weight=0.5, row_weight=torch.linspace(0.5, 2, 40, device=DEVICE), temperature=2.0
    )
    assert_close(student, teacher, 4e-3, "jensen_shannon", backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_purified_teacher_of_heads(backend):
    """Two draws through one head: their mean is wider than bf16 and takes a second product."""
    student, clean = near_and_far(0.5, rows=40, vocab=517, shared=True)
    noisy = [
        Head(near_and_far(0.5, rows=40, vocab=517, seed=seed, shared=True)[1].hidden, student.weight) for seed in (1, 2)
    ]
    assert_close(student, purify(clean, noisy, 1.5), 4e-3, "reverse_kl", backend=backend)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_heads_that_learn_from_each_other(backend, divergence, dtype, bound, monkeypatch):
    """Gradients of several edges meet in one tile; some rows are ignored."""
    monkeypatch.setattr("hkdfast.engine.tile_loop.rows_per_block", lambda *args: 20)
    sides = [moved(near_and_far(0.3, dtype, rows=48, vocab=517, seed=seed)[0]) for seed in range(3)]
    labels = torch.arange(48, device=DEVICE) % 517
    labels[::5] = -100
    table = [[None if i == j else Edge(1.0 + i, divergence, detach=i != 0) for j in range(3)] for i in range(3)]

    def gradients(wide, **options):
        heads = [as_leaves(side, wide) for side in sides]
        coupled_loss(heads, table, labels=labels, hard_weight=0.3, **options).backward()
        return [leaf.grad for head in heads for leaf in leaves(head)]

    exact = gradients(torch.float64, backend="reference")
    for one, true in zip(gradients(None, backend=backend), exact, strict=True):
        assert off(one, true) < bound, (off(one, true), bound)


def rows(dtype=torch.bfloat16, n=6, vocab=1031):
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(n, vocab, generator=generator)
    teacher = student + torch.randn(n, vocab, generator=generator)
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)


@pytest.mark.parametrize("upstream", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_times_an_upstream_gradient(backend, dtype, upstream):
    student, teacher = rows(dtype)
    (exact,) = exactly(student, teacher, "reverse_kl")[1:]
    student.requires_grad_()
    loss = distill_loss(student, teacher, "reverse_kl", backend=backend) * upstream
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    assert off(first, exact * upstream) < (1e-5 if dtype == torch.float32 else 4e-3)
    loss.backward()  # adds the same once more: what was saved has not been scaled in place
    assert off(student.grad, first.double() * 2) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_an_upstream_gradient_each(backend):
    student, teacher = rows()
    upstream = torch.linspace(-1, 2, len(student), device=DEVICE)
    exact = exactly(student, teacher, "forward_kl", reduction="none", upstream=upstream)
    got = with_gradients(
        distill_loss, student, teacher, "forward_kl", reduction="none", upstream=upstream, backend=backend
    )
    assert off(got[0], exact[0]) < 1e-5 and off(got[1], exact[1]) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding(backend):
    clean, noisy = rows()
    got = contrast(purify(clean, noisy, 1.0, plausibility=0.1, outside="drop"), backend=backend)
    double = purify(clean.double(), noisy.double(), 1.0, plausibility=0.1, outside="drop")
    exact = contrast(double, backend="reference")
    kept = exact.isfinite()
    assert torch.equal(got.isfinite(), kept)
    torch.testing.assert_close(got[kept].double(), exact[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, out", [(torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.float32, None)])
@pytest.mark.parametrize("factor", [1.0, -0.3])
@pytest.mark.parametrize("n", [1, 4096 * 9 + 5])
def test_the_scaling_kernel(n, factor, dtype, out):
    pytest.importorskip("triton")
    from hkdfast.kernels.scale import scale

    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    given, factor = x.clone(), torch.tensor(factor, device=DEVICE)
    got = scale(x, factor, x if out is None else torch.empty_like(x, dtype=out))
    assert torch.equal(got, (given.float() * factor).to(out or dtype))
    assert (got is x) == (out is None) and (out is None or torch.equal(x, given))


@on_a_gpu
@pytest.mark.parametrize("what", ["logits", "heads"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_never_waits(backend, what):
    student, teacher = rows() if what == "logits" else map(moved, near_and_far(0.3))
    student = as_leaves(student)

    def step():
        (distill_loss(student, teacher, "reverse_kl", backend=backend) * 0.5).backward()

    step()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_a_gpu
@pytest.mark.parametrize("what", ["logits", "heads"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_graph_gives_the_same(backend, what):
    student, teacher = rows() if what == "logits" else map(moved, near_and_far(0.3))
    student = as_leaves(student)

    def step():
        loss = distill_loss(student, teacher, "jensen_shannon", backend=backend)
        return [loss, *torch.autograd.grad(loss, leaves(student)[:2])]

    eager = [t.clone() for t in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in captured:
        t.fill_(float("nan"))
    graph.replay()
    for one, other in zip(captured, eager, strict=True):
        assert torch.equal(one, other)


@on_a_gpu
@pytest.mark.parametrize("trained", [True, False])
def test_peak_memory_is_the_tiles_and_the_gradients(trained):
    n, width, vocab, memory = 4096, 512, 32_000, 128 << 20
    hidden = torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=trained)
    teacher = Head(torch.randn_like(hidden), torch.randn_like(weight))
    distill_loss(Head(hidden[:8], weight), Head(teacher.hidden[:8], teacher.weight)).backward()  # cuBLAS' workspace
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distill_loss(Head(hidden, weight), teacher, tile_memory=memory).backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = (4 + 2) * (n * width + trained * vocab * width)
    assert peak < memory + gradients + (8 << 20)


class Products(TorchDispatchMode):
    """The overloads of the matrix products that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function._schema.name:
            self.seen.append((str(function), (kwargs or {})["out"].dtype))
        return function(*args, **(kwargs or {}))


def test_products_on_a_gpu_sum_and_write_float32(monkeypatch):
    """The forms that torch has on CUDA alone, on tensors without memory: torch's own shape functions take them."""
    monkeypatch.setattr("hkdfast.engine.tile_sources.has_wide_gemm", lambda tensor: True)
    monkeypatch.setattr("hkdfast.engine.tile_loop.find", lambda *args: types.SimpleNamespace(rows=lambda *args: None))
    n, h, h_t, vocab = 8192, 4096, 3584, 151_936
    shapes = ((n, h), (vocab, h), (n, h_t), (vocab, h_t))
    x, weight, x_t, weight_t = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    memory = tile_loop.DEFAULT_BUDGET["cuda, trained head"]
    inputs = tile_loop.Input((0,)), tile_loop.Input((1,))
    spec = tile_loop.LoopSpec(
        inputs, (tile_loop.LossTerm(0, 1, None, Objective()),), None, [], vocab, None, "float32", memory, None
    )
    tensors, wants = [(x, weight, None), (x_t, weight_t, None)], [[True, True, False], [False] * 3]
    with Products() as products:
        _, _, ((d_hidden, d_weight, _), _) = tile_loop.run(spec, tensors, None, wants, False)
    assert d_hidden.dtype == d_weight.dtype == torch.float32
    mm, addmm = "aten.mm.dtype_out", "aten.addmm.dtype_out"
    assert products.seen == [(name, torch.float32) for name in (mm, mm, mm, mm, mm, mm, mm, addmm)]  # two blocks


@pytest.mark.parametrize(
    "h, h_t, vocab", [(4096, 4096, 151_936), (896, 3584, 151_936), (2048, 3584, 151_936), (4096, 8192, 128_256),
                      (2304, 3584, 262_144)],
)  # fmt: skip
def test_a_trained_head_takes_two_to_four_blocks(h, h_t, vocab):
    student = types.SimpleNamespace(bytes_per_row=(4 + 2) * vocab + 12 * h, fixed_bytes=0)
    teacher = types.SimpleNamespace(bytes_per_row=4 * vocab + 12 * h_t, fixed_bytes=0)
    step = tile_loop.rows_per_block([student, teacher], 8192, tile_loop.DEFAULT_BUDGET["cuda, trained head"])
    assert step % tile_loop.ROW_MULTIPLE == 0 and 2 <= -(-8192 // step) <= 4
