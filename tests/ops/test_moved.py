"""What brings the tests' tensors to a GPU keeps what they are about: offsets, strides, aliases, and a fence of NaN."""

import pytest
import torch
from moved import Moved, Storages

from hkdfast.ops import reference
from hkdfast.ops.objective import Objective


def test_views_stay_views_and_aliases_aliases():
    wide = torch.arange(40.0).reshape(4, 10)
    view, storages = wide[:, 1:8], Storages("cpu")
    one, other, both = storages.there(view), storages.there(view), storages.there(wide)
    assert one.stride() == (10, 1) and one.storage_offset() == 1 and torch.equal(one, view)
    assert one.data_ptr() == other.data_ptr() == both.data_ptr() + 4 != view.data_ptr()
    one += 1
    assert torch.equal(other, one) and torch.equal(both[:, 1:8], one) and torch.equal(both[:, 0], wide[:, 0])
    assert storages.there(None) is None


def tiles(offset):
    wide = [torch.full((3, 12), float("nan")) for _ in range(3)]
    views = [t[:, offset : offset + 8] for t in wide]
    for seed, view in enumerate(views[:2]):
        view.copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)))
    return wide, views


@pytest.mark.parametrize("in_place", [False, True])
def test_a_call_there_is_the_call_here(in_place):
    found = []
    for backend in (reference, Moved(reference, "cpu")):
        _, (student, teacher, grad) = tiles(3)
        grad, loss, metrics = student if in_place else grad, torch.empty(3), torch.empty(7, 3)
        backend.rows(Objective("jensen_shannon"), student, teacher, None, None, None, None, loss, grad, metrics)
        found.append((loss, grad.clone(), metrics))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_is_written_beside_a_view_comes_back():
    class Careless:
        @staticmethod
        def rows(objective, student, *others):
            grad = others[-2]
            grad.as_strided((3, 9), grad.stride(), grad.storage_offset()).zero_()  # a column too many

    wide, (student, teacher, grad) = tiles(1)
    Moved(Careless, "cpu").rows(Objective(), student, teacher, None, None, None, None, torch.empty(3), grad, None)
    assert wide[2][:, 9].eq(0).all() and wide[2][:, 10].isnan().all()
