"""Memory of large tensors is used again, and never by two tensors at once."""

import gc
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from eosin.kernels import _memory as memory
from eosin.kernels._memory import new_tensor

ROWS = (40_000, 256)  # 41 MB of float32
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the allocator is left alone")


@pytest.fixture(autouse=True)
def nothing_free():
    gc.collect()
    memory.release()
    yield
    memory.release()


@linux
def test_the_next_tensor_of_that_size_has_the_memory_of_the_last():
    first = new_tensor(torch.empty(0), ROWS)
    place = first.data_ptr()
    other = new_tensor(torch.empty(0), ROWS)
    assert other.data_ptr() != place
    part = first[10:]
    del first
    third = new_tensor(torch.empty(0), ROWS)
    assert third.data_ptr() != place  # a view still lives there
    del part
    assert new_tensor(torch.empty(0), (ROWS[0] - 5, ROWS[1])).data_ptr() == place


@linux
def test_no_more_than_the_bound_is_kept(monkeypatch):
    monkeypatch.setattr(memory, "MOST_FREE", 64 * 2**20)
    tensors = [new_tensor(torch.empty(0), ROWS) for _ in range(3)]
    places = {tensor.data_ptr() for tensor in tensors}
    del tensors
    assert sum(size * kept.qsize() for size, kept in memory._free.items()) == 64 * 2**20
    assert new_tensor(torch.empty(0), ROWS).data_ptr() in places
    memory.release()
    assert not memory._free


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 7), (3, 5), (70_000, 512)])
def test_shape_and_type_are_as_asked(shape, dtype):
    tensor = new_tensor(torch.empty(0, dtype=torch.float32), shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert torch.equal(tensor.fill_(3)[-1:], torch.full_like(tensor[-1:], 3))


def test_a_fake_tensor_takes_no_memory():
    with FakeTensorMode():
        assert type(new_tensor(torch.empty(0), (10**9, 512))) is not torch.Tensor
