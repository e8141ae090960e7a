"""Losses over a vocabulary that several processes hold, by gloo on this machine."""

import time

import pytest
import torch
import zoo

from hkdfast import Head, Split, distill_loss


def run(folder, what, count):
    codes, errors = zoo.processes(folder, f"import split_worker\nsplit_worker.{what}()", count)
    assert codes == [0] * count, "\n".join(error[-3000:] for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_losses_are_those_of_one_process(tmp_path, count):
    run(tmp_path, "losses", count)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["coupled", "difference", "decoding", "own_split", "bytes_exchanged"])
def test_the_same_for(tmp_path, what):
    run(tmp_path, what, 3)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["refusals", "out_of_memory"])
def test_an_error_reaches_every_process(tmp_path, what):
    run(tmp_path, what, 2)


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_of_the_others_within_a_minute(tmp_path):
    start = time.monotonic()
    codes, _ = zoo.processes(tmp_path, "import split_worker\nsplit_worker.dies()", 3)
    assert codes == [8, 7, 8] and time.monotonic() - start < 60


def test_a_split_needs_processes():
    with pytest.raises(ValueError, match="init_process_group first"):
        Split(None, 0, 10)


@pytest.fixture
def alone():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, -1, 10), "first must be a whole number of tokens from 0 to 10, got -1"),
        ((None, 11, 10), "first must be a whole number of tokens from 0 to 10, got 11"),
        ((None, 0, 0), "total must be a whole number of tokens, at least 1, got 0"),
        ((None, 0.5, 10), "first must be"),
        (("world", 0, 10), "group must be a ProcessGroup of torch.distributed, or None, got 'world'"),
        ((None, 0, 10, 1), "reduce_hidden must be True or False, got 1"),
    ],
)
def test_wrong_splits_are_refused(alone, given, message):
    with pytest.raises(ValueError, match=message):
        Split(*given)


def test_a_group_of_one_is_the_plain_loss(alone):
    student, teacher = torch.randn(5, 40, requires_grad=True), torch.randn(5, 40)
    loss = distill_loss(student, teacher, split=Split(None, 0, 40))
    torch.testing.assert_close(loss, distill_loss(student, teacher))
    with pytest.raises(ValueError, match="a hkdfast.Split or None, got 3"):
        distill_loss(student, teacher, split=3)


def test_what_is_not_built_is_refused(alone):
    split, hidden, weight = Split(None, 0, 40), torch.randn(5, 8), torch.randn(40, 8)
    plain, part = Head(hidden, weight), Head(hidden, weight, split=split)
    with pytest.raises(ValueError, match="the student's is whole: split both"):
        distill_loss(plain, part)
    other = Head(hidden, weight, split=Split(None, 0, 41))
    with pytest.raises(ValueError, match="teacher is split differently \(from token 0 of 41"):
        distill_loss(part, other)
    with pytest.raises(ValueError, match="keep it out of torch.compile"):
        torch.compile(lambda: distill_loss(part, plain), backend="eager")()
