"""What tests/tools/compile_cuda.py sees in machine code: it is the guard against what only a GPU would show."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("compile_cuda", Path(__file__).parents[1] / "tools" / "compile_cuda.py")
compile_cuda = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compile_cuda)

USAGE = {"STACK": 0, "LOCAL": 0, "SHARED": 0, "REG": 96}
MOST = {"instructions": 8, "shuffles": 2, "double": 2, "sends": 2, "block": 1}
JOIN = ["SHFL.BFLY PT, R1, R2", "DADD R2, R2, R4", "BAR.SYNC.DEFER_BLOCKING 0x0", "STAS.64 [R2.64], R4"]


def kernel(join, load="LDS.128 R8, [R1]"):
    """A sweep, what is between, and a last sweep, as (address, instruction)."""
    code = ["UBLKCP [UR4], [UR6], UR8", "SHFL.IDX PT, R1, R2"]
    for part in (join, []):
        start = 16 * len(code)
        code += [load, *["MUFU.EX2 R4, R4"] * 8, "STG.E.128 [R2], R4", f"@P0 BRA {start:#x}", *part]
    return [(16 * i, text) for i, text in enumerate(code)]


def test_what_is_between_the_sweeps_is_counted():
    counts = {"instructions": 4, "shuffles": 1, "double": 1, "sends": 1, "block": 1, "cluster": 0, "memory": 0}
    assert compile_cuda.between(kernel(JOIN)) == counts
    assert list(compile_cuda.faults(USAGE, kernel(JOIN), True, MOST)) == []


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["SHFL.BFLY PT, R1, R2"] * 2, "between the sweeps 3 shuffles"),
        (["@!P1 DFMA R2, R2, R4, R6"] * 2, "between the sweeps 3 double"),
        (["BAR.SYNC.DEFER_BLOCKING 0x0"], "between the sweeps 2 block"),
        (["STAS.64 [R2.64], R4"] * 2, "between the sweeps 3 sends"),
        (["UCGABAR_WAIT"], "between the sweeps 1 cluster"),
        (["MEMBAR.SC.GPU"], "between the sweeps 1 memory"),
        (["IADD3 R1, R2, R3, RZ"] * 5, "between the sweeps 9 instructions"),
    ],
)
def test_more_than_the_limit_is_a_fault(more, fault):
    (found,) = compile_cuda.faults(USAGE, kernel(JOIN + more), True, MOST)
    assert found.startswith(fault)


def test_other_faults_are_found():
    (narrow,) = compile_cuda.faults(USAGE, [*kernel(JOIN, "LDS R8, [R1]"), (9999, "LDS.128 R1, [R2]")], True, MOST)
    assert narrow == "narrow accesses of shared memory in a sweep"
    (spill,) = compile_cuda.faults(USAGE | {"STACK": 8}, kernel(JOIN), True, MOST)
    assert spill.startswith("8 bytes of stack")
    assert "no reduction found between the sweeps" in compile_cuda.faults(USAGE, kernel([]), True, MOST)


@pytest.mark.parametrize("law", ["", "law"])
@pytest.mark.parametrize("divergence", ["reversekl", "jensenshannon", "totalvariation"])
def test_every_fast_kernel_has_limits(divergence, law):
    assert compile_cuda.limits(divergence, law).keys() == compile_cuda.BETWEEN.keys() - {"cluster", "memory"}
