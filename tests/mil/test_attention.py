"""Attention between instances and tokens, against a loop over bags, with blocks and chunks small enough to matter."""

import pytest
import torch

from eosin.mil import attention
from eosin.mil.attention import bag_attention, bag_product, instance_attention, mixed_weights, recomputed

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
