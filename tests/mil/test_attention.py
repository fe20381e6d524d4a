"""Attention between instances and tokens, against a loop over bags, with blocks and chunks small enough to matter."""

import pytest
import torch

from eosin.mil import _attention as attention
from eosin.mil._attention import (
    bag_attention,
    bag_product,
    by_rows,
    instance_attention,
    mixed_weights,
    normed_linear,
    recomputed,
)

LENGTHS = (0, 1, 37, 5, 0, 64)
HEADS, TOKENS, WIDTH, VALUE = 2, 5, 3, 4


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_ROWS", 16)
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", 400)  # two blocks at a time


def tensors(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def plain_bag_attention(query, key, value, lengths, scale):
    rows = []
    for q, k, v in zip(query, key.split(lengths), value.split(lengths), strict=True):
        weights = (torch.einsum("mhd,nhd->hmn", q, k) * scale).softmax(-1)
        rows.append(torch.einsum("hmn,nhe->mhe", weights, v))
    return torch.stack(rows)


def plain_instance_attention(query, key, value, lengths, scale):
    rows = []
    for q, k, v in zip(query.split(lengths), key, value, strict=True):
        weights = (torch.einsum("nhd,mhd->hnm", q, k) * scale).softmax(-1)
        rows.append(torch.einsum("hnm,mhe->nhe", weights, v))
    return torch.cat(rows)


def plain_mixed_weights(query, key, mix, lengths, scale):
    rows = []
    for q, k, r in zip(query, key.split(lengths), mix, strict=True):
        weights = (torch.einsum("mhd,nhd->hmn", q, k) * scale).softmax(-1)
        rows.append(torch.einsum("hmn,mh->nh", weights, r))
    return torch.cat(rows)


N, B = sum(LENGTHS), len(LENGTHS)
CASES = [
    (bag_attention, plain_bag_attention, (B, TOKENS, HEADS, WIDTH), (N, HEADS, WIDTH), (N, HEADS, VALUE)),
    (
        instance_attention,
        plain_instance_attention,
        (N, HEADS, WIDTH),
        (B, TOKENS, HEADS, WIDTH),
        (B, TOKENS, HEADS, VALUE),
    ),
    (mixed_weights, plain_mixed_weights, (B, TOKENS, HEADS, WIDTH), (N, HEADS, WIDTH), (B, TOKENS, HEADS)),
]


@pytest.mark.parametrize("size", [7, 1024])
@pytest.mark.parametrize(("fast", "plain", "query", "key", "third"), CASES)
def test_values_and_gradients_are_those_of_a_loop_over_bags(fast, plain, query, key, third, size, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_ROWS", size)
    inputs = tensors(query, key, third)
    found, wanted = fast(*inputs, LENGTHS, 0.7), plain(*inputs, LENGTHS, 0.7)
    torch.testing.assert_close(found, wanted)
    (weight,) = tensors(found.shape)
    pairs = zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    )
    for found_grad, wanted_grad in pairs:
        torch.testing.assert_close(found_grad, wanted_grad)


def test_large_scores_neither_overflow_nor_vanish():
    query, key, value = tensors((1, 1, 1, 1), (40, 1, 1), (40, 1, 1), dtype=torch.float32)
    with torch.no_grad():
        query.fill_(1000.0)
        key.copy_(torch.linspace(-9, 9, 40)[:, None, None])
    out = bag_attention(query, key, value, (40,), 1.0)
    torch.testing.assert_close(out.view(()), value[-1].view(()))


def test_half_precision_keeps_its_type_and_sums_in_float32():
    shapes = (1, 2, 2, 8), (5000, 2, 8), (5000, 2, 8)
    inputs = [tensor.detach().bfloat16() for tensor in tensors(*shapes, dtype=torch.float32)]
    found = bag_attention(*inputs, (5000,), 0.3)
    assert found.dtype == torch.bfloat16
    wanted = plain_bag_attention(*(tensor.double() for tensor in inputs), (5000,), 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bag_attention(*inputs, (5000,), 0.3), found)


@pytest.mark.parametrize("lengths", [LENGTHS, (N,), (0, 0)])
def test_products_with_the_tokens_of_the_own_bag(lengths):
    values, tokens = tensors((sum(lengths), WIDTH), (len(lengths), TOKENS, WIDTH))
    found = bag_product(values, tokens, lengths)
    bags = zip(values.split(lengths), tokens, strict=True)
    torch.testing.assert_close(found, torch.cat([bag @ token.T for bag, token in bags]))


def test_recomputing_changes_nothing_but_what_is_kept(monkeypatch):
    (values,) = tensors((6, 3))
    calls = []

    def layer(x):
        calls.append(len(x))
        return x.sin().exp()

    plain = torch.autograd.grad(recomputed(layer, 6, values).sum(), values)[0]
    assert len(calls) == 1
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", 6)
    again = torch.autograd.grad(recomputed(layer, 6, values).sum(), values)[0]
    assert len(calls) == 3
    assert torch.equal(plain, again)


def test_tokens_that_a_bag_does_not_have_are_not_read():
    query, key, value = tensors((N, HEADS, WIDTH), (B, TOKENS, HEADS, WIDTH), (B, TOKENS, HEADS, VALUE))
    present = torch.ones(B, TOKENS, dtype=torch.bool)
    present[2, 1] = present[5, :4] = False
    found = instance_attention(query, key, value, LENGTHS, 0.7, counts=present)
    wanted = []
    for number, part in enumerate(query.split(LENGTHS)):
        keep = present[number]
        keys, values = key[number : number + 1, keep], value[number : number + 1, keep]
        wanted.append(plain_instance_attention(part, keys, values, (len(part),), 0.7))
    torch.testing.assert_close(found, torch.cat(wanted))
    grads = zip(
        torch.autograd.grad(found.square().sum(), (query, key, value)),
        torch.autograd.grad(torch.cat(wanted).square().sum(), (query, key, value)),
        strict=True,
    )
    for first, second in grads:
        torch.testing.assert_close(first, second)


def grads_agree(found, wanted, inputs, **tolerance):
    (weight,) = tensors(found.shape)
    pairs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, wanted))
    for found_grad, wanted_grad in zip(*pairs, strict=True):
        torch.testing.assert_close(found_grad, wanted_grad, **tolerance)


def test_zeros_are_instances_like_others_without_being_there():
    zeros = torch.tensor([3, 0, 2, 7, 0, 1])
    inputs = query, key, value = tensors((B, TOKENS, HEADS, WIDTH), (N, HEADS, WIDTH), (N, HEADS, VALUE))
    (mix,) = tensors((B, TOKENS, HEADS))
    longer = tuple(length + more for length, more in zip(LENGTHS, zeros.tolist(), strict=True))
    filled = torch.cat([torch.arange(length) < own for length, own in zip(longer, LENGTHS, strict=True)])
    place = torch.nonzero(filled)[:, 0]
    long_key, long_value = (
        torch.zeros(sum(longer), *part.shape[1:], dtype=part.dtype).index_copy(0, place, part) for part in (key, value)
    )
    found = bag_attention(query, key, value, LENGTHS, 0.7, zeros=zeros)
    wanted = plain_bag_attention(query, long_key, long_value, longer, 0.7)
    torch.testing.assert_close(found, wanted)
    grads_agree(found, wanted, inputs)
    found = mixed_weights(query, key, mix, LENGTHS, 0.7, zeros=zeros)
    long_key = torch.zeros_like(long_key).index_copy(0, place, key)
    wanted = plain_mixed_weights(query, long_key, mix, longer, 0.7)[place]
    torch.testing.assert_close(found, wanted)
    grads_agree(found, wanted, (query, key, mix))


def test_a_token_that_counts_often_is_that_many_tokens():
    inputs = query, key, value = tensors((N, HEADS, WIDTH), (B, TOKENS, HEADS, WIDTH), (B, TOKENS, HEADS, VALUE))
    counts = torch.tensor([4, 1, 0, 2, 1])
    found = instance_attention(query, key, value, LENGTHS, 0.7, counts=counts.expand(B, -1))
    often = torch.repeat_interleave(torch.arange(TOKENS), counts)
    wanted = plain_instance_attention(query, key[:, often], value[:, often], LENGTHS, 0.7)
    torch.testing.assert_close(found, wanted)
    grads_agree(found, wanted, inputs)


@pytest.mark.parametrize(("lengths", "rows"), [((40, 40), 40), ((20, 320, 16, 70), 64), ((5000,), 1024), ((), 16)])
def test_blocks_leave_few_places_empty(lengths, rows, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_ROWS", 1024)
    assert attention._block_rows(torch.tensor(lengths, dtype=torch.int64)) == rows


def test_a_norm_and_a_map_by_rows_are_the_norm_and_the_map(monkeypatch):
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(6, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    tokens, weight = tensors((37, 6), (5, 6))
    wanted = torch.nn.functional.linear(norm(tokens), weight)
    torch.testing.assert_close(normed_linear(tokens, norm, weight), wanted)
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", 37)
    monkeypatch.setattr(attention, "NORM_ROWS", 10)
    found = normed_linear(tokens, norm, weight)
    torch.testing.assert_close(found, wanted)
    grads_agree(found, wanted, (tokens, weight, norm.weight, norm.bias))


def test_a_norm_and_a_map_by_rows_keep_to_autocast(monkeypatch):
    norm = torch.nn.LayerNorm(6)
    tokens, weight = tensors((37, 6), (5, 6), dtype=torch.float32)
    wanted = torch.nn.functional.linear(norm(tokens), weight)
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", 37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = normed_linear(tokens, norm, weight)
    assert found.dtype == torch.bfloat16
    probe = torch.randn(found.shape)
    inputs = (tokens, weight, norm.weight, norm.bias)
    rounded, exact = (torch.autograd.grad((out * probe).sum(), inputs) for out in (found, wanted))
    for gradient, other in zip(rounded, exact, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other, rtol=0.05, atol=0.1)


def test_rows_that_are_computed_a_few_at_a_time_change_nothing(monkeypatch):
    first, second = tensors((23, 3), (23, 3))
    wanted = first.sin() * second
    torch.testing.assert_close(by_rows(lambda a, b: a.sin() * b, first, second), wanted)
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", 8)
    sizes = []

    def product(a, b):
        sizes.append(len(a))
        return a.sin() * b

    found = by_rows(product, first, second, size=5)
    torch.testing.assert_close(found, wanted)
    grads_agree(found, wanted, (first, second))
    assert max(sizes) == 5
