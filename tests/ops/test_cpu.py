"""What is the cpu backend's own: instruction sets, threads, strides, dtypes, memory. Exactness is in test_rows.py."""

import re
import shutil
import subprocess
from itertools import product

import pytest
import torch
from cases import CASES, Case, assert_as_close_as_torch, inputs, run_rows

from hkdfast import DIVERGENCES
from hkdfast.ops import reference
from hkdfast.ops.objective import METRICS, ContrastSpec, Objective

cpu = pytest.importorskip("hkdfast.ops.cpu")
SETS = cpu._cpu.instruction_sets()
LONG = Case((2, 50_021), torch.bfloat16, apart=1.0)  # several pieces to a row, the last one ragged


class On:
    """The backend on one instruction set."""

    def __init__(self, name):
        self.name = name

    def rows(self, *arguments):
        cpu.rows(*arguments, instruction_set=self.name)


@pytest.fixture
def threads():
    """Sets torch's number of threads, which is the backend's, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", ["ragged", "fp16", "shifted", "both masked", "softcap and labels", "plausible"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_matches_the_definition(name, divergence, case):
    exact = run_rows(reference, CASES[case], divergence, exact=True)
    plain = run_rows(reference, CASES[case], divergence)
    got = run_rows(On(name), CASES[case], divergence)
    for what, truth, torch_, ours in zip(("loss", "gradient"), exact, plain, got, strict=False):
        assert_as_close_as_torch(ours, torch_, truth, what)
    for what, truth, torch_, ours in zip(METRICS, exact[2], plain[2], got[2], strict=True):
        assert_as_close_as_torch(ours, torch_, truth, what)


def test_an_unknown_instruction_set_is_named():
    assert SETS[-1] == "baseline"
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'.*baseline"):
        run_rows(On("mmx"), CASES["plain"], "forward_kl")


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("case", [CASES["weights of rows"], LONG])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_threads_change_no_bit(threads, divergence, case, name):
    results = []
    for number in (1, 2, 3, 7, 7):  # LONG has fewer rows than 3 threads: they share each row
        threads(number)
        results.append(run_rows(On(name), case, divergence))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("threads_", [1, 4])
def test_contrast_shares_a_row_among_threads(threads, threads_):
    threads(threads_)
    clean, noisy = inputs(LONG)[:2]
    objective = Objective(temperature=0.7, law=ContrastSpec(plausibility=0.01, schedule="linear", confidence="entropy"))
    out, plain = torch.empty(clean.shape), torch.empty(clean.shape)
    exact = torch.empty(clean.shape, dtype=torch.float64)
    cpu.contrast(objective, clean, noisy, None, None, out)
    reference.contrast(objective, clean, noisy, None, None, plain)
    reference.contrast(objective, clean.double(), noisy.double(), None, None, exact)
    assert_as_close_as_torch(out, plain, exact)


@pytest.mark.parametrize("temperature", [0.3, 20.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_vocabulary_of_one_word_costs_nothing(divergence, temperature):
    """Both sides have probability 1, whatever their logits: exactly 0."""
    loss, grad, _ = run_rows(cpu, CASES["one word"], divergence, temperature=temperature)
    assert loss.eq(0).all() and grad.eq(0).all()


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtypes", list(product(FLOATS, FLOATS, FLOATS)), ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_dtypes_mix(dtypes):
    """Each tile has its own dtype, and the gradient is the float32 one, rounded once."""
    student, teacher, grad = (x.to(dtype) for x, dtype in zip((*inputs(CASES["plain"])[:2],) * 2, dtypes, strict=False))
    grad = torch.empty(student.shape, dtype=dtypes[2])
    loss, wide, exact = torch.empty(4), torch.empty(student.shape), torch.empty(4)
    objective = Objective(divergence="reverse_kl")
    cpu.rows(objective, student, teacher, None, None, None, None, loss, grad, None)
    cpu.rows(objective, student.float(), teacher.float(), None, None, None, None, exact, wide, None)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    # the float32 gradient may itself lie on the other side of a rounding boundary
    torch.testing.assert_close(grad.float(), wide.to(dtypes[2]).float(), rtol=torch.finfo(dtypes[2]).eps, atol=1e-7)


@pytest.mark.parametrize("case", ["bf16", "labels", "difference", "softcap law"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_may_take_the_students_place(divergence, case):
    case = CASES[case]
    student, teacher, noisy, alpha, labels, weight = inputs(case)
    objective = Objective(divergence=divergence, **case.options)
    loss, apart = torch.empty(len(student)), torch.empty_like(student)
    cpu.rows(objective, student, teacher, noisy, None, labels, weight, loss, apart, None)
    cpu.rows(objective, student, teacher, noisy, None, labels, weight, loss, student, None)
    assert torch.equal(student, apart)


def test_strides():
    """Rows may lie apart; a tile or an output without unit stride along the vocabulary is copied."""
    student, teacher, *_ = inputs(CASES["ragged"])
    objective = Objective(divergence="jensen_shannon")
    expected = torch.empty(3), torch.empty(3, 1031), torch.empty(len(METRICS), 3)
    cpu.rows(objective, student, teacher, None, None, None, None, *expected)
    wide = torch.full((3, 2000), 7.0)
    wide[:, 5:1036] = student
    loss, grad, metrics = torch.full((3, 2), 7.0), torch.full((1031, 3), 7.0).T, torch.full((3, len(METRICS)), 7.0).T
    cpu.rows(objective, wide[:, 5:1036], teacher.T.contiguous().T, None, None, None, None, loss[:, 0], grad, metrics)
    assert torch.equal(loss[:, 0], expected[0]) and torch.equal(grad, expected[1]) and torch.equal(metrics, expected[2])
    assert loss[:, 1].eq(7).all()
    cpu.rows(objective, wide[:, 5:1036], teacher, None, None, None, None, expected[0], wide[:, 5:1036], None)
    assert torch.equal(wide[:, 5:1036], expected[1])
    assert wide[:, :5].eq(7).all() and wide[:, 1036:].eq(7).all()


def test_rows_beyond_two_to_the_31():
    """Offsets are 64 bits wide: two rows whose distance in elements is more than an int holds."""
    try:
        memory = torch.empty(2**31 + 2000, dtype=torch.float16)  # pages that are never touched take no memory
    except RuntimeError:
        pytest.skip("4 GiB of address space wanted")
    student, teacher, *_ = inputs(Case((2, 1000), torch.float16))
    far = memory.as_strided((2, 1000), (2**31, 1))
    far.copy_(student)
    results = []
    for tile in (student, far):
        loss = torch.empty(2)
        cpu.rows(Objective(), tile, teacher, None, None, None, None, loss, tile, None)
        results.append((loss, tile))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_nan_or_infinite_logit_spoils_its_row_alone(divergence):
    student, teacher, *_ = inputs(Case((4, 700)))
    clean = torch.empty(4), torch.empty(4, 700)
    cpu.rows(Objective(divergence=divergence), student, teacher, None, None, None, None, *clean, None)
    for tile, value in product((student, teacher), (float("nan"), float("inf"))):
        before, tile[1, 77] = tile[1, 77].item(), value
        loss, grad = torch.empty(4), torch.empty(4, 700)
        cpu.rows(Objective(divergence=divergence), student, teacher, None, None, None, None, loss, grad, None)
        tile[1, 77] = before
        assert loss[1].isnan() and grad[1].isnan().all()
        assert torch.equal(loss[[0, 2, 3]], clean[0][[0, 2, 3]]) and torch.equal(grad[[0, 2, 3]], clean[1][[0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SETS)
def test_16_bit_numbers_are_read_and_rounded_as_torch_does(name, dtype):
    """contrast without weight copies log-probabilities: of a row of one likely word, the logits less a constant."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tile = bits.view(dtype)
    tile = tile[tile.isfinite() & (tile < 0)].view(1, -1)
    tile = torch.cat([tile.new_zeros(1, 1), tile.where(tile < -100, -100)], 1)  # all the others: nothing of the sum
    objective = Objective(law=ContrastSpec(alpha=0.0))
    wide, out = torch.empty(tile.shape), torch.empty_like(tile)
    cpu.contrast(objective, tile, tile, None, None, wide, instruction_set=name)
    cpu.contrast(objective, tile, tile, None, None, out, instruction_set=name)
    assert torch.equal(wide, tile.float())
    assert torch.equal(out, tile)
    scaled = Objective(temperature=0.75, law=ContrastSpec(alpha=0.0))  # results between the numbers of the dtype
    cpu.contrast(scaled, tile, tile, None, None, wide, instruction_set=name)
    cpu.contrast(scaled, tile, tile, None, None, out, instruction_set=name)
    assert torch.equal(out, wide.to(dtype))


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
@pytest.mark.skipif(len(SETS) == 1, reason="one instruction set only")
def test_wide_instructions_stay_in_their_namespace():
    """A function shared by the linker must not have been compiled for more than every processor has."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", cpu._cpu.__file__], capture_output=True, text=True)
    widest = {}  # of the registers of each function
    for line in text.stdout.splitlines():
        if found := re.match(r"[0-9a-f]+ <(.*)>:", line):
            function = found[1]
        elif found := re.search(r"%([yz])mm", line) or re.search(r"\t(v)[a-z]", line):
            widest[function] = max(widest.get(function, ""), found[1])
    assert any("avx512" in function for function, width in widest.items() if width == "z") or "avx512" not in SETS
    leaked = [
        function for function, width in widest.items() if not re.search("avx512" if width == "z" else "avx", function)
    ]
    assert not leaked
