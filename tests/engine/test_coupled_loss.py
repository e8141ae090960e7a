"""coupled_loss: K models that teach each other, against pairwise losses in plain PyTorch with autograd."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_heads import products
from truth import FAST, USABLE, as_leaves, leaves, logits, off, row_losses

from hkdfast import DIVERGENCES, Edge, Head, coupled_loss, distill_loss, purify
from hkdfast.engine import tile_loop
from hkdfast.ops import reference
from hkdfast.ops.dispatch import load
from hkdfast.ops.reference import SWAPPED

N, V = 9, 211
LABELS = torch.tensor([5, -100, 0, 210, 7, -100, 33, 100, 2])
DTYPES = (24, 16, 40)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def head(width, seed, dtype=torch.float32, vocab=V, **more):
    return Head(draw(N, width, seed=seed, dtype=dtype), draw(vocab, width, seed=seed + 50, dtype=dtype) / 3, **more)


def three(kind="heads", dtype=torch.float32):
    """Three models of other widths, with their own bias, scale and softcap; or logits; or some of each."""
    heads = [
        head(DTYPES[0], 0, dtype, scale=0.7),
        head(DTYPES[1], 1, dtype, softcap=6.0),
        head(DTYPES[2], 2, dtype, bias=draw(V, seed=3, dtype=dtype)),
    ]
    made = [2 * draw(N, V, seed=seed, dtype=dtype) for seed in range(3)]
    return {"heads": heads, "logits": made, "mixed": [heads[0], made[1], heads[2]]}[kind]


MUTUAL = [[0, 1.0, 0.5], [0.25, 0, 2.0], [1.0, 1.0, 0]]
COUPLINGS = {
    "chain": ([[0, 0, 0], [1.0, 0, 0], [0, 0.5, 0]], (1.0, 0.5, 0.3)),
    "two teachers": ([[0, 0, 0], [0, 0, 0], [0.7, Edge(0.4, "reverse_kl"), None]], (0, 0, 0.5)),
    "mutual": (MUTUAL, (1.0, 0.5, 0.25)),
    "without labels": (MUTUAL, (0, 0, 0)),
    "gradients into both": (
        [[0, Edge(0.5, "jensen_shannon", 0.3, False), 0], [0, 0, 1.0], [Edge(2.0, "forward_kl", detach=False), 0, 0]],
        (0, 1.0, 0),
    ),
    "only into a teacher's teacher": ([[0, 0, 0], [0, 0, 0], [Edge(1.0, "skew_kl", 0.2, False), 1.0, 0]], (0.5, 0, 0)),
}


def edge_of(entry):
    return entry if isinstance(entry, Edge) else Edge(entry or 0)


def eager(heads, coupling, hard_weight, labels=None, row_weight=None, reduction="mean", **options):
    """The same by its definition, pair by pair; what an edge holds constant is cut off by detach."""
    total = 0
    for i, own in enumerate(hard_weight):
        z = logits(heads[i])
        if own:
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            rows = F.cross_entropy(wide, labels, reduction="none", ignore_index=-100)
            total = total + own * rows
        for j, entry in enumerate(coupling[i]):
            edge = edge_of(entry)
            if edge.weight:
                total = total + edge.weight * divergence_of(heads[i], heads[j], edge, labels=labels, **options)
    total = total if row_weight is None else total * row_weight
    if reduction == "none":
        return total
    return total.sum() / (len(total) if labels is None else (labels != -100).sum())


def divergence_of(student, teacher, edge, **options):
    if edge.detach:
        return row_losses(student, teacher, edge.divergence, beta=edge.beta, **options)
    q, p = (logits(side) for side in (student, teacher))
    q, p = ((z.to(torch.promote_types(z.dtype, torch.float32)) / options.get("temperature", 1)) for z in (q, p))
    rows = DIVERGENCES[edge.divergence](p.log_softmax(-1), q.log_softmax(-1), edge.beta).sum(-1)
    rows = rows * options.get("temperature", 1) ** 2 if options.get("t_squared") else rows
    return rows if options.get("labels") is None else rows.where(options["labels"] != -100, 0)


def with_gradients(function, heads, *args, upstream=None, **options):
    mine = [as_leaves(one) for one in heads]
    value = function(mine, *args, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value.dtype))
    return [value.detach(), *(t.grad for one in mine for t in leaves(one))]


def check(heads, coupling, hard_weight, bound=2e-5, backend=None, tile_memory=None, **options):
    truth = with_gradients(eager, [as_leaves(one, torch.float64) for one in heads], coupling, hard_weight, **options)
    got = with_gradients(
        coupled_loss, heads, coupling, hard_weight=hard_weight, backend=backend, tile_memory=tile_memory, **options
    )
    for ours, exact in zip(got, truth, strict=True):
        assert (ours is None) == (exact is None)
        assert ours is None or off(ours, exact) < bound


@pytest.mark.parametrize("kind", ["heads", "logits", "mixed"])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("backend", FAST)
def test_value_and_gradients(backend, coupling, kind):
    table, hard = COUPLINGS[coupling]
    labels = LABELS if any(hard) else None
    check(three(kind), table, hard, backend=backend, labels=labels)
    options = dict(temperature=2.0, t_squared=True, row_weight=torch.linspace(0, 2, N))
    check(three(kind), table, hard, backend=backend, labels=labels, **options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in USABLE if name not in FAST])
def test_value_and_gradients_on_other_backends(backend):
    for coupling in ("mutual", "gradients into both"):
        check(three(), *COUPLINGS[coupling], backend=backend, labels=LABELS)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", FAST)
def test_every_divergence_into_both_sides(backend, divergence):
    table = [[0, Edge(0.7, divergence, 0.3, divergence not in SWAPPED)], [Edge(0.4, divergence, 0.6), 0]]
    check(three()[:2], table, (0.5, 0), backend=backend, labels=LABELS)


@pytest.mark.parametrize("divergence", SWAPPED)
def test_a_mirror_is_the_divergence_with_its_sides_changed(divergence):
    log_p, log_q = (draw(4, 50, seed=seed, dtype=torch.float64).log_softmax(-1) for seed in (0, 1))
    one = DIVERGENCES[divergence](log_p, log_q, 0.3).sum(-1)
    other = DIVERGENCES[SWAPPED[divergence]](log_q, log_p, 0.7).sum(-1)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("kind", ["heads", "logits"])
def test_half_precision(kind, dtype, bound):
    """Gradients are rounded to their dtype; what several lessons add up to in logits is rounded with each."""
    table, hard = COUPLINGS["chain"]
    check(three(kind, dtype), table, hard, bound, labels=LABELS)
    check(three("heads", dtype), MUTUAL, (1, 1, 1), bound, labels=LABELS)


@pytest.mark.parametrize("reduction, kind", itertools.product(["mean", "sum", "none"], ["heads", "logits"]))
def test_two_parties_are_distill_loss_bit_for_bit(reduction, kind):
    student, teacher, _ = three(kind)
    options = dict(labels=LABELS, row_weight=torch.linspace(0, 2, N), reduction=reduction, temperature=1.5)
    upstream = torch.linspace(-1, 2, N) if reduction == "none" else None
    ours = with_gradients(
        lambda heads, **o: coupled_loss(heads, [[0, Edge(1, "jensen_shannon", 0.3)], [0, 0]], **o),
        [student, teacher], hard_weight=(0.5, 0), upstream=upstream, **options,
    )  # fmt: skip
    theirs = with_gradients(
        lambda heads, **o: distill_loss(*heads, "jensen_shannon", beta=0.3, **o),
        [student, teacher], hard_weight=0.5, upstream=upstream, **options,
    )  # fmt: skip
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("coupling", ["mutual", "gradients into both", "chain"])
def test_products_are_three_for_each_model_whatever_the_edges(coupling, frozen):
    heads = [as_leaves(head(width, seed)) for seed, width in enumerate(DTYPES)]
    for one in heads:
        one.weight.requires_grad_(not frozen)
    table, hard = COUPLINGS[coupling]

    def step():
        # several ragged blocks
        coupled_loss(heads, table, hard_weight=hard or 0, labels=LABELS.clamp(min=0), tile_memory=40_000).backward()

    assert products(step) == sum(width * N * V for width in DTYPES) * (2 if frozen else 3)


def test_a_model_that_only_teaches_costs_one_product():
    heads = [head(width, seed) for seed, width in enumerate(DTYPES)]
    heads[2] = as_leaves(heads[2])
    a, b, c = (width * N * V for width in DTYPES)
    table = [[0] * 3, [0] * 3, [1.0, 0.5, 0]]
    assert products(
        lambda: coupled_loss(heads, table, hard_weight=(0, 0, 1), labels=LABELS[[0, 2, 3] * 3]).backward()
    ) == (a + b + 3 * c)


def test_a_model_in_two_places_is_multiplied_once():
    """Two divergences from one teacher: it stands in the table twice."""
    student, teacher, _ = three()
    table = [[0, 1.0, Edge(0.5, "reverse_kl")], [0] * 3, [0] * 3]
    learner = as_leaves(student)
    run = lambda: coupled_loss([learner, teacher, teacher], table).backward()  # noqa: E731
    assert products(run) == (3 * DTYPES[0] + DTYPES[1]) * N * V
    got = with_gradients(lambda heads, **o: coupled_loss([*heads, teacher, teacher], table), [student])
    wide = [as_leaves(student, torch.float64)]
    other = as_leaves(teacher, torch.float64, False)
    for ours, exact in zip(
        got, with_gradients(lambda h: eager([*h, other, other], table, (0, 0, 0)), wide), strict=True
    ):
        assert off(ours, exact) < 2e-5


@pytest.mark.parametrize("labeled", [False, True])
def test_blocks_give_what_one_block_gives(labeled):
    labels = LABELS if labeled else None
    hard = (0.5, 0.5, 0.5) if labeled else (0, 0, 0)
    for rows in (1, 2, 4):
        memory = rows * 4 * (6 * V + 3 * sum(DTYPES)) + 8 * 64 * 40
        check(three(), MUTUAL, hard, labels=labels, tile_memory=memory)


@pytest.mark.parametrize("kind", ["heads", "logits", "mixed"])
def test_rows_with_an_upstream_gradient_each(kind):
    upstream = torch.linspace(-1, 2, N)
    for coupling in ("mutual", "gradients into both"):
        table, hard = COUPLINGS[coupling]
        check(three(kind), table, hard, labels=LABELS, reduction="none", upstream=upstream)


def test_repeated_backward_and_halves_of_a_batch():
    heads = [as_leaves(one) for one in three()]
    loss = coupled_loss(heads, MUTUAL)
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for one in heads for t in leaves(one)]
    loss.backward()
    for one, tensor in zip(first, (t for head in heads for t in leaves(head)), strict=True):
        assert off(tensor.grad, 2 * one.double()) < 1e-6
    halves = [as_leaves(one) for one in three()]
    for rows in (slice(0, 4), slice(4, N)):
        part = [replace(one, hidden=one.hidden[rows]) for one in halves]
        coupled_loss(part, MUTUAL, num_items=N).backward()
    for one, tensor in zip(first, (t for head in halves for t in leaves(head)), strict=True):
        assert off(tensor.grad, one.double()) < 1e-5


def test_models_that_share_a_head_add_up_in_its_gradient():
    weight = draw(V, 16).requires_grad_()
    hiddens = [draw(N, 16, seed=seed) for seed in (1, 2)]
    coupled_loss([Head(x, weight) for x in hiddens], [[0, 1.0], [0.5, 0]]).backward()
    exact = weight.detach().double().requires_grad_()
    eager([Head(x.double(), exact) for x in hiddens], [[0, 1.0], [0.5, 0]], (0, 0)).backward()
    assert off(weight.grad, exact.grad) < 1e-5


def test_padded_vocabularies_and_a_purified_teacher():
    """Heads of 211 and 230 words compare the first 211; a contrast of two heads teaches, in place 0."""
    student, other = head(24, 0), head(16, 1, vocab=230)
    clean, noisy = head(24, 2), [head(24, seed) for seed in (3, 4)]
    teacher = purify(clean, noisy, 1.5, plausibility=0.01)
    table, hard = [[0, 0, 0], [Edge(0.7, "reverse_kl"), 0, 0.3], [0.5, 0.2, 0]], (0, 0.5, 0.25)
    ours = with_gradients(
        lambda heads, **o: coupled_loss([teacher, *heads], table, **o),
        [student, other], hard_weight=hard, labels=LABELS, vocab="common",
    )  # fmt: skip

    def pairs(heads):
        a, b = heads[0], replace(heads[1], weight=heads[1].weight[:V])
        of = purify(*(as_leaves(x, torch.float64, False) for x in (clean,)), [as_leaves(x, torch.float64, False) for x in noisy], 1.5, plausibility=0.01)  # noqa: E501  # fmt: skip
        total = 0
        for student, teacher, edge in ((a, of, table[1][0]), (a, b, Edge(0.3)), (b, of, Edge(0.5)), (b, a, Edge(0.2))):
            total = total + edge.weight * row_losses(student, teacher, edge.divergence, labels=LABELS)
        for one, own in ((a, 0.5), (b, 0.25)):
            total = total + own * F.cross_entropy(logits(one), LABELS, reduction="none", ignore_index=-100)
        return total.sum() / (LABELS != -100).sum()

    truth = with_gradients(pairs, [as_leaves(one, torch.float64) for one in (student, other)])
    for got, exact in zip(ours, truth, strict=True):
        assert off(got, exact) < 2e-5
    assert ours[-1][V:].eq(0).all()


def test_metrics_are_those_of_each_pair():
    heads = three()
    table = [[0, 0, 0], [1.0, 0, Edge(0.5, "reverse_kl", detach=False)], [0, 0, 0]]
    loss, metrics = coupled_loss(heads, table, hard_weight=(0.5, 0.25, 0), labels=LABELS, return_metrics=True)
    assert set(metrics) == {(0, 0), (1, 0), (1, 2)}
    for (i, j), divergence in (((1, 0), "forward_kl"), ((1, 2), "reverse_kl"), ((0, 0), "forward_kl")):
        _, alone = distill_loss(heads[i], heads[j], divergence, labels=LABELS, return_metrics=True)
        for name, rows in alone.items():
            torch.testing.assert_close(metrics[i, j][name], rows, msg=name)
    live = LABELS != -100
    told = {pair: {name: rows[live].mean() for name, rows in of.items()} for pair, of in metrics.items()}
    expected = 0.5 * told[0, 0]["cross_entropy"] + 0.25 * told[1, 0]["cross_entropy"]
    expected = expected + told[1, 0]["divergence"] + 0.5 * told[1, 2]["divergence"]
    torch.testing.assert_close(loss, expected)


def test_ignored_rows_cost_no_product_and_a_batch_of_them_is_a_differentiable_zero():
    heads = [as_leaves(one) for one in three()]
    nothing = torch.full((N,), -100)
    loss = coupled_loss(heads, MUTUAL, labels=nothing, hard_weight=1.0)
    loss.backward()
    assert loss == 0 and all(t.grad.eq(0).all() for one in heads for t in leaves(one))
    counted = int((LABELS != -100).sum())
    run = lambda: coupled_loss(heads, MUTUAL, labels=LABELS, hard_weight=1.0).backward()  # noqa: E731
    assert products(run) == 3 * sum(width * counted * V for width in DTYPES)


def test_out_of_memory_halves_the_blocks_once_without_adding_twice(monkeypatch):
    before = with_gradients(coupled_loss, three(), MUTUAL)
    module, calls = load(FAST[0]), []
    plain = module.rows

    def short(objective, *rest):
        calls.append(len(rest[0]))
        if len(calls) == 5:  # the second lesson of a student has added to its gradient
            raise torch.OutOfMemoryError("no room")
        return plain(objective, *rest)

    monkeypatch.setattr(module, "rows", short)
    with pytest.warns(UserWarning, match="out of memory with blocks of 9 rows"):
        again = with_gradients(coupled_loss, three(), MUTUAL, backend=FAST[0])
    assert calls == [9] * 5 + [5] * 6 + [4] * 6
    assert all(off(ours, exact.double()) < 1e-5 for ours, exact in zip(again, before, strict=True))


def test_fresh_memory_full_of_nan_reaches_nothing(monkeypatch):
    """The first lesson of a student writes, whatever stood there; only its others add."""
    for place in ("hkdfast.engine.tile_sources.empty_hugepages", "hkdfast.engine.tile_loop.torch.empty"):
        monkeypatch.setattr(place, lambda *shape, **how: torch.full(*full(shape), float("nan"), **how))
    for kind in ("heads", "logits", "mixed"):
        for coupling in COUPLINGS.values():
            got = with_gradients(coupled_loss, three(kind), coupling[0], hard_weight=coupling[1], labels=LABELS)
            assert not any(t is not None and t.isnan().any() for t in got)


def full(shape):
    return (shape[0] if isinstance(shape[0], tuple) else shape,)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "logits"])
@pytest.mark.parametrize("coupling", ["chain", "gradients into both"])
def test_a_step_compiles_as_one_graph(kind, coupling):
    torch._dynamo.reset()
    table, hard = COUPLINGS[coupling]
    options = dict(hard_weight=hard, labels=LABELS, temperature=2.0)

    def step(heads, **options):
        return coupled_loss(heads, table, **options)

    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, plain = (with_gradients(function, three(kind), **options) for function in (whole, step))
    for ours, eagerly in zip(got, plain, strict=True):
        assert (ours is None and eagerly is None) or off(ours, eagerly.double()) < 1e-6


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_one_alone_learns_from_labels(kind, backend):
    check(three(kind)[:1], [[None]], (0.5,), backend=backend, labels=LABELS)


def test_difference_tiles_of_one_student():
    weight = draw(V, 32, seed=1).bfloat16()
    hidden = [draw(N, 32, seed=2).bfloat16()]
    hidden += [(hidden[0] + 0.1 * draw(N, 32, seed=seed)).bfloat16() for seed in (3, 4)]
    heads = [Head(x, weight) for x in hidden]
    table = [[0, 1.0, Edge(0.5, "reverse_kl")], [0] * 3, [0] * 3]
    heads[0].hidden.requires_grad_()
    loss = coupled_loss(heads, table, precision="difference")
    loss.backward()
    exact = with_gradients(eager, [as_leaves(one, torch.float64) for one in heads], table, (0, 0, 0))
    assert off(loss.detach(), exact[0]) < 2.5e-2 and off(heads[0].hidden.grad, exact[1]) < 2.5e-2
    with pytest.raises(ValueError, match='precision="difference" takes one student, got 2 students'):
        coupled_loss(heads, [[0, 1.0, 0], [0, 0, 1.0], [0] * 3], precision="difference")


BAD = {
    "coupled_loss takes at least one head, got none": {"heads": [], "coupling": []},
    r"teacher_floor=-3.0 takes constant teachers, coupling\[0\]\[1\] has detach=False": {
        "coupling": [[0, Edge(detach=False), 1], [0] * 3, [0] * 3],
        "teacher_floor": -3.0,
    },
    r"coupling must have 3 rows of 3 entries for 3 heads, got rows of \[3, 3\]": {"coupling": MUTUAL[:2]},
    r"coupling must be a list of 3 lists of 3 entries, got list of 3": {"coupling": [None] * 3},
    r"coupling must be a list of 3 lists of 3 entries, got 1.0": {"coupling": 1.0},
    r"got rows of \[3, 2, 3\]": {"coupling": [MUTUAL[0], MUTUAL[1][:2], MUTUAL[2]]},
    r"coupling\[0\]\[1\] must be finite and not negative, got -1.0": {"coupling": [[0, -1.0, 0], [0] * 3, [0] * 3]},
    r"coupling\[0\]\[1\] must be finite and not negative, got 'much'": {"coupling": [[0, "much", 0], [0] * 3, [0] * 3]},
    r"coupling\[1\]\[1\] is 1: a model does not teach itself": {"coupling": [[0, 1, 0], [0, 1, 0], [1, 0, 0]]},
    r"heads\[2\] neither learns nor teaches": {"coupling": [[0, 1, 0], [0] * 3, [0] * 3]},
    "nothing to train": {"coupling": [[0] * 3] * 3},
    "hard_weight 0.5 needs labels": {"hard_weight": (0.5, 0, 0)},
    "hard_weight must be one number, or one for each of 3 heads, got 2": {"hard_weight": (0.5, 0), "labels": LABELS},
    r"hard_weight\[1\] must be finite and not negative, got -2": {"hard_weight": (0.5, -2, 0), "labels": LABELS},
    r"heads\[1\] \(9, 200\) .*|vocabularies of 211 and 200 tokens differ": {"heads": [three()[0], head(8, 1, vocab=200), three()[2]]},  # noqa: E501
    r"heads\[0\] \(9, 211\) and heads\[1\] \(8, 211\) differ in their rows": {
        "heads": [three("logits")[0], three("logits")[1][:8], three()[2]]
    },
    r"heads\[1\] must be a tensor of logits or a Head, got 'teacher'": {"heads": [three()[0], "teacher", three()[2]]},
    r"heads\[0\] is purified: it can teach, not learn": {"heads": [purify(three()[0], three()[0]), *three()[1:]]},
    "unknown reduction": {"reduction": "least"},
    "temperature must be positive": {"temperature": -1},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_work(message, monkeypatch):
    for name in USABLE:
        monkeypatch.setattr(load(name), "rows", None)  # would raise a TypeError
    with pytest.raises(ValueError, match=message):
        coupled_loss(**{"heads": three(), "coupling": MUTUAL} | BAD[message])


@pytest.mark.parametrize(
    "message, options",
    [
        ("unknown divergence 'kl', expected one of forward_kl", {"divergence": "kl"}),
        ("jensen_shannon takes 0 < beta < 1, got 1", {"divergence": "jensen_shannon", "beta": 1}),
        ("weight of an edge must be finite and not negative, got -1", {"weight": -1}),
    ],
)
def test_bad_edges_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        Edge(**options)


def test_a_divergence_without_mirror_has_no_gradient_into_its_teacher(monkeypatch):
    monkeypatch.setitem(reference.DIVERGENCES, "hellinger", lambda p, q, beta: ((p / 2).exp() - (q / 2).exp()) ** 2 / 2)
    check(three()[:2], [[0, Edge(1.0, "hellinger")], [0, 0]], (0, 0), backend="reference")
    with pytest.raises(ValueError, match="hellinger has no gradient into its teacher"):
        Edge(1.0, "hellinger", detach=False)


def test_the_plan_counts_tiles_and_gradients_of_all(monkeypatch):
    """A block's tiles and gradient tiles of all models fit the memory that was given."""
    seen = []
    plain = tile_loop.rows_per_block
    monkeypatch.setattr(
        tile_loop,
        "rows_per_block",
        lambda sources, *rest: seen.append([s.bytes_per_row for s in sources]) or plain(sources, *rest),
    )  # noqa: E501
    with_gradients(coupled_loss, [head(w, i) for i, w in enumerate(DTYPES)], MUTUAL)
    assert seen == [[4 * (2 * 256 + 3 * width) for width in DTYPES]]
