"""How rows are laid out on chip, and HKDFAST_CUDA_PLAN. The arithmetic is csrc/cuda/plan.h's, for an H200."""

import sys
import types

import pytest
import torch

import hkdfast
from hkdfast.cli.doctor import cuda_plans
from hkdfast.ops import cuda_plan
from hkdfast.ops.cuda_plan import H200, MAX_WARPS, TILES, VALUES, VOCABULARIES, request

ANY = (0,) * len(VALUES)
BLOCK, SM, RESERVED = H200


def plan(cluster, vocab, dtypes, asked=ANY, machine=H200, **device):
    return cluster.plan([(4096, dtype, -(-vocab // 8) * 8) for dtype in dtypes], vocab, asked, *machine, **device)


def row_slots(plan):
    return -(-plan["chunks"] // (plan["cluster"] * plan["warps"]))


def assert_whole(plan, vocab):
    """It fits, and a warp has room for all its chunks of a row."""
    assert plan["bytes"] <= BLOCK
    assert plan["blocks"] * (plan["bytes"] + RESERVED) <= SM and plan["blocks"] * plan["warps"] <= MAX_WARPS
    assert plan["chunk"] * plan["chunks"] >= vocab > plan["chunk"] * (plan["chunks"] - 1)
    assert plan["chunk"] % 256 == 0 and plan["slots"] >= row_slots(plan)


@pytest.mark.parametrize(
    ("vocab", "dtypes", "cluster_of", "blocks"),
    [
        (100, ["bfloat16"] * 2, 1, 16),
        (1024, ["bfloat16"] * 2, 1, 16),
        (4096, ["bfloat16"] * 2, 1, 8),
        (8192, ["bfloat16"] * 2, 1, 4),
        (16384, ["bfloat16"] * 2, 1, 2),
        (32000, ["bfloat16"] * 2, 2, 2),
        (128256, ["bfloat16"] * 2, 8, 2),
        (151936, ["bfloat16"] * 2, 8, 2),
        (151936, ["bfloat16"] * 3, 16, 2),
        (128256, ["float32"] * 2, 16, 2),
        (262144, ["bfloat16"] * 2, 16, 2),
        (262144, ["float32"] * 2, 16, 1),
        (262144, ["float32"] * 3, 16, 1),
    ],
)
def test_two_blocks_share_a_multiprocessor_or_as_many_as_hold_a_short_row_alone(
    cluster, vocab, dtypes, cluster_of, blocks
):
    chosen = plan(cluster, vocab, dtypes)
    assert (chosen["cluster"], chosen["blocks"]) == (cluster_of, blocks)
    assert chosen["warps"] * blocks == MAX_WARPS
    assert_whole(chosen, vocab)


@pytest.mark.parametrize(("dtype", "count"), TILES)
@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
def test_the_next_row_loads_ahead(cluster, vocab, dtype, count):
    """Every warp has more slots than its part of a row takes; all together leave a quarter of a row's room."""
    chosen = plan(cluster, vocab, [dtype] * count)
    assert_whole(chosen, vocab)
    assert chosen["slots"] > row_slots(chosen)
    assert chosen["slots"] * chosen["cluster"] * chosen["warps"] >= 1.25 * chosen["chunks"]
    assert chosen["chunk"] * (2 if dtype == "bfloat16" else 4) >= 512  # bytes of a copy


@pytest.mark.parametrize("dtypes", [["bfloat16"] * 2, ["bfloat16"] * 3, ["float32"] * 2, ["bfloat16", "float32"]])
def test_the_longest_row_fits_and_no_longer_one(cluster, dtypes):
    longest = cluster.longest([(4096, dtype, 8) for dtype in dtypes], BLOCK, 16)
    assert plan(cluster, longest, dtypes)["cluster"] == 16
    assert plan(cluster, longest + 8, dtypes) is None
    assert longest > 128_256


def test_a_device_that_refuses_large_clusters_gets_the_next_plan(cluster):
    three = ["bfloat16"] * 3
    first, second = plan(cluster, 151_936, three), plan(cluster, 151_936, three, largest_cluster=8)
    assert (first["cluster"], second["cluster"], second["blocks"]) == (16, 8, 1)
    assert_whole(second, 151_936)
    tight = plan(cluster, 256_000, three, largest_cluster=8)  # less than a quarter of a row's room is left
    assert tight["cluster"] == 8 and 1 < tight["slots"] * 128 / tight["chunks"] < 1.25
    assert_whole(tight, 256_000)
    assert plan(cluster, 262_144, ["float32"] * 2, largest_cluster=8) is None


def test_a_smaller_machine_gets_another_plan(cluster):
    small = (101_376, 102_400, 1024)  # compute capability 12.0
    chosen = plan(cluster, 32000, ["bfloat16"] * 2, machine=small)
    assert chosen["blocks"] * (chosen["bytes"] + 1024) <= 102_400 and chosen["cluster"] == 4


@pytest.mark.parametrize(
    "text",
    [
        "cluster=4,blocks=1,warps=16,chunk=512,slots=6",
        "cluster=8,blocks=2,warps=8,chunk=256,slots=12",
        "cluster=16,blocks=4,warps=4",
        "cluster=16",
        "blocks=1,chunk=256",
        "warps=6",
        "chunk=768",
    ],
)
def test_a_plan_is_what_was_asked_for(cluster, text):
    asked = request(text)
    chosen = plan(cluster, 151_936, ["bfloat16"] * 2, asked)
    assert_whole(chosen, 151_936)
    for key, value in zip(VALUES, asked, strict=True):
        assert value in (0, chosen[key])
    printed = cuda_plan.describe(chosen).partition(" ")[0]
    assert plan(cluster, 151_936, ["bfloat16"] * 2, request(printed)) == chosen


@pytest.mark.parametrize(
    "text", ["cluster=1", "blocks=16", "cluster=4,blocks=2", "cluster=4,slots=40", "cluster=1,warps=1"]
)
def test_a_plan_that_holds_no_row_is_none(cluster, text):
    assert plan(cluster, 151_936, ["bfloat16"] * 2, request(text)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clusters=4", "'clusters=4', expected name=number with cluster, blocks, warps, chunk, slots"),
        ("cluster", "has cluster=, expected 1, 2, 4, 8, 16"),
        ("cluster=3", "has cluster=3, expected 1, 2, 4, 8, 16"),
        ("blocks=two", "has blocks=two, expected 1, 2, 4, 8, 16"),
        ("chunk=300", "has chunk=300, expected 256 to 4096 in steps of 256"),
        ("warps=0", "has warps=0, expected 1 to 16"),
        ("slots=-1", "has slots=-1, expected 1 to 256"),
        ("chunk=256,chunk=512", "has chunk twice"),
        ("blocks=4,warps=8", "blocks times warps = 32, expected 16 at most"),
    ],
)
def test_a_wrong_plan_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=f"HKDFAST_CUDA_PLAN='{text}'.*{message}"):
        request(text)


def test_spaces_and_no_text_are_fine():
    assert request("") == ANY
    assert request(" cluster = 4 , chunk=512,") == (4, 0, 0, 512, 0)


@pytest.fixture
def doctor(cluster, monkeypatch):
    """The doctor's section of plans, on a machine that has the kernels and no GPU."""
    compiled = types.ModuleType("hkdfast._cuda")
    compiled.plan = cluster.plan
    monkeypatch.setitem(sys.modules, "hkdfast._cuda", compiled)
    monkeypatch.setattr(hkdfast, "_cuda", compiled, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return cuda_plans


def test_the_doctor_prints_plans_where_there_is_no_gpu(doctor, monkeypatch):
    monkeypatch.delenv("HKDFAST_CUDA_PLAN", raising=False)
    ((title, rows),) = doctor().items()
    assert title == "plans of the CUDA kernels on an H200, which is not here"
    assert rows["HKDFAST_CUDA_PLAN"] == "not set" and len(rows) == 1 + len(VOCABULARIES) * len(TILES)
    monkeypatch.setenv("HKDFAST_CUDA_PLAN", "blocks=1,chunk=256")
    ((_, rows),) = doctor().items()
    assert rows.pop("HKDFAST_CUDA_PLAN") == "blocks=1,chunk=256"
    assert all("blocks=1," in plan and "chunk=256," in plan for plan in rows.values())
    monkeypatch.setenv("HKDFAST_CUDA_PLAN", "cluster=3")
    ((_, rows),) = doctor().items()
    assert list(rows.values()) == ["HKDFAST_CUDA_PLAN='cluster=3' has cluster=3, expected 1, 2, 4, 8, 16"]


def test_the_plan_of_every_published_vocabulary(cluster):
    facts = cuda_plan.plans(cluster.plan, H200, ANY)
    assert len(facts) == len(VOCABULARIES) * len(TILES)
    assert facts["qwen-2.5, 2 bfloat16 tiles of 151,936"].startswith("cluster=8,blocks=2,warps=8,chunk=512,slots=6 ")
    assert set(cuda_plan.plans(cluster.plan, H200, request("slots=256")).values()) == {"does not fit"}
