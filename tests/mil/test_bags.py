import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eosin.mil.bags import PackedBags


def a_pack(lengths, width=3):
    bags = [torch.randn(n, width) for n in lengths]
    coords = [torch.randint(0, 99, (n, 2)) for n in lengths]
    return PackedBags.pack(bags, coords_px0=coords, ids=tuple(f"bag{i}" for i in range(len(lengths)))), bags


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_unpack_and_padding_return_what_was_packed(lengths):
    pack, bags = a_pack(lengths)
    padded, mask = pack.to_padded()
    assert mask.sum(1).tolist() == lengths
    for bag, back, rows, real in zip(bags, pack.unpack(), padded, mask, strict=True):
        assert torch.equal(bag, back)
        assert torch.equal(rows[real], bag)
        assert not rows[~real].any()
    assert pack.bag_index().bincount(minlength=pack.n_bags).tolist() == lengths
    assert pack.cu_seqlens.tolist()[1:] == torch.tensor(lengths).cumsum(0).tolist()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 99))
def test_select_keeps_each_instance_in_its_bag(lengths, seed):
    pack, bags = a_pack(lengths)
    keep = torch.rand(pack.n_instances, generator=torch.Generator().manual_seed(seed)) < 0.5
    selected = pack.select(keep)
    for bag, kept, back in zip(bags, keep.split(lengths), selected.unpack(), strict=True):
        assert torch.equal(bag[kept], back)
    assert torch.equal(selected.coords_px0, pack.coords_px0[keep])
    assert selected.ids == pack.ids


def test_padding_follows_other_values():
    pack, _ = a_pack([2, 0, 3])
    scores = torch.arange(5.0)[:, None]
    padded, mask = pack.to_padded(scores)
    assert padded.shape == (3, 3, 1)
    assert torch.equal(padded[mask], scores)


def test_lengths_that_do_not_add_up_are_refused():
    values = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="do not add up"):
        PackedBags(values, torch.tensor([0, 1, 3], dtype=torch.int32), (1, 2))
    with pytest.raises(ValueError, match="ids"):
        PackedBags(values, torch.tensor([0, 4], dtype=torch.int32), (4,), ids=("a", "b"))
    with pytest.raises(ValueError, match="at least one bag"):
        PackedBags.pack([])


def test_a_pack_takes_the_widest_type_and_passes_gradients_on():
    narrow, wide = torch.ones(2, 3, dtype=torch.float16), torch.full((1, 3), 1e5, requires_grad=True)
    values = PackedBags.pack([narrow, wide]).values
    assert values.dtype == torch.float32
    assert values[2, 0].item() == 1e5  # no float16
    values.sum().backward()
    assert torch.equal(wide.grad, torch.ones(1, 3))
    assert PackedBags.pack([narrow, wide.detach()]).values[2, 0].item() == 1e5
