"""What holds for every mix of bags: isolation, order within a bag, the same bits in a second run."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_packs import gate_parameters, normal, offsets

from eosin import kernels

mixes = st.lists(st.one_of(st.sampled_from([0, 1, 2]), st.integers(3, 70)), min_size=1, max_size=6)
quickly = settings(max_examples=25, deadline=None)


def pool(values, lengths):
    parameters = gate_parameters(4, 3, 2, dtype=values.dtype)
    return kernels.gated_attention_pool(values, **parameters, cu_seqlens=offsets(tuple(lengths)))


@given(lengths=mixes, seed=st.integers(0, 1000))
@quickly
def test_changing_one_bag_changes_no_other(lengths, seed):
    values = normal(sum(lengths), 4, seed=seed)
    changed, bag = values.clone(), seed % len(lengths)
    begin = sum(lengths[:bag])
    changed[begin : begin + lengths[bag]] += 1
    others = [number for number in range(len(lengths)) if number != bag]
    for before, after in zip(pool(values, lengths)[1:], pool(changed, lengths)[1:], strict=True):
        torch.testing.assert_close(before[others], after[others], rtol=1e-12, atol=1e-12)


@given(lengths=mixes, seed=st.integers(0, 1000))
@quickly
def test_the_order_within_a_bag_does_not_matter(lengths, seed):
    values = normal(sum(lengths), 4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    bags = values.split(lengths)
    shuffled = torch.cat([bag[torch.randperm(len(bag), generator=generator)] for bag in bags])
    for before, after in zip(pool(values, lengths)[1:], pool(shuffled, lengths)[1:], strict=True):
        torch.testing.assert_close(before, after, rtol=1e-11, atol=1e-12)


@given(lengths=mixes, seed=st.integers(0, 1000))
@quickly
def test_a_second_run_gives_the_same_bits(lengths, seed):
    values = normal(sum(lengths), 4, seed=seed, dtype=torch.float32)
    for first, second in zip(pool(values, lengths), pool(values, lengths), strict=True):
        assert torch.equal(first, second)


@given(lengths=mixes, k=st.integers(0, 80), seed=st.integers(0, 1000))
@quickly
def test_exactly_the_asked_number_is_chosen_in_every_bag(lengths, k, seed):
    scores = normal(sum(lengths), 2, seed=seed).round()
    mask = kernels.segment_topk_mask(scores, offsets(tuple(lengths)), k)
    for part, length in zip(mask.split(lengths), lengths, strict=True):
        assert part.sum(0).tolist() == [min(k, length)] * 2
