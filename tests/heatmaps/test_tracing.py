import itertools

import numpy as np
import pytest
import torch

from eosin.mil._nystrom import through_landmarks
from eosin.mil._rollout import inputs_of, rollout, with_residual
from eosin.mil._standardize import Standardized, Standardizer
from eosin.mil.bags import PackedBags
from eosin.mil.methods.gdat import Gdat, Groups
from eosin.mil.methods.set_transformer import SetTransformer
from eosin.mil.methods.transmil import TokenLayout, TransMil
from eosin.mil.slots import AGGREGATORS

DIM, N = 7, 23


@pytest.fixture
def pack():
    return PackedBags.pack([torch.from_numpy(np.random.default_rng(0).normal(size=(N, DIM)))])


def softmax(scores):
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def attention(query, key, heads, scale):
    """Mean over heads of softmax(q kᵀ), from projected rows."""
    parts = [np.split(rows, heads, axis=1) for rows in (query, key)]
    return np.mean([softmax(q @ k.T * scale) for q, k in zip(*parts, strict=True)], axis=0)


def plain(tensor):
    return tensor.detach().numpy()


@torch.no_grad()
def test_set_transformer_is_the_rollout_of_whole_maps(pack):
    torch.manual_seed(0)
    model = SetTransformer(DIM, 2, embed_dims=(8,), width=8, heads=2, tokens=3, sab_layers=1, seeds=2).double().eval()
    maps, bags = [], pack.with_values(model.embed(pack.values))
    for block in model.encoder:
        into, out = block.inducing, block.point
        tokens = block.tokens[0]
        with inputs_of([out.key]) as seen:
            after = block(bags)
        summary = seen[0][0][0]
        read = attention(plain(into.query(tokens)), plain(into.key(bags.values)), 2, into.scale)
        write = attention(plain(out.query(bags.values)), plain(out.key(summary)), 2, out.scale)
        maps.append(write @ read)
        bags = bags.with_values(after)
    pool = model.pool.block
    read = attention(plain(pool.query(model.pool.seeds[0])), plain(pool.key(bags.values)), 2, pool.scale)  # (k, n)
    seeds = model.pool(bags)[0][0]
    decoder = model.decoder[0]
    mixed = attention(plain(decoder.query(seeds)), plain(decoder.key(seeds)), 2, decoder.scale)
    expected = np.full(2, 0.5) @ with_residual(mixed) @ read @ rollout(maps)[-1]
    np.testing.assert_allclose(model.trace(pack).row(), expected, rtol=1e-10)


@pytest.mark.parametrize("padding", ["masked", "official"])
@torch.no_grad()
def test_gdat_is_the_rollout_of_whole_maps(pack, padding):
    torch.manual_seed(0)
    model = Gdat(DIM, 2, width=8, heads=2, region_size=2, hidden=6, padding=padding).double().eval()
    groups = Groups.of((N,), 2, "official", torch.device("cpu"), padding=padding)
    tokens, row = model.embed(pack.values), None
    maps = []
    for block in model.blocks:
        normed = np.zeros((groups.lengths[0], 8))
        normed[groups.padded] = plain(block.norm1(tokens))
        starts = np.cumsum([0, *groups.sizes.tolist()])
        means = np.stack([normed[a:b].mean(0) for a, b in itertools.pairwise(starts)])
        query, key, _ = np.split(normed @ plain(block.attn.qkv.weight).T, 3, axis=1)
        group_query, group_key, _ = np.split(means @ plain(block.attn.qkv.weight).T, 3, axis=1)
        through = attention(query, group_key, 2, block.attn.scale) @ attention(group_query, key, 2, block.attn.scale)
        maps.append(through[groups.padded][:, groups.padded] + 0.1 * np.eye(N))
        tokens = block(tokens, groups)
    row = softmax(plain(model(pack).scores)[:, 0])
    for layer in reversed(maps):
        row = 0.5 * row + 0.5 * row @ layer
        row = row / row.sum()
    np.testing.assert_allclose(model.trace(pack).row(), row, rtol=1e-9)


@torch.no_grad()
def test_transmil_first_layer_is_what_the_model_returns(pack):
    torch.manual_seed(0)
    model = TransMil(DIM, 2, width=8, heads=2, landmarks=4).double().eval()
    with inputs_of([model.layer1.norm]) as seen:
        output = model(pack)
    layout = TokenLayout.of((N,), 4, torch.device("cpu"))
    row = np.zeros(len(layout.source))
    row[0] = 1
    through = through_landmarks(model.layer1, seen[0][0], layout, row)
    tiles = plain(layout.per_instance(torch.from_numpy(through)[:, None]))[:, 0]
    expected = plain(output.scores.exp()).mean(1)
    assert (plain(output.scores) > -100).all()  # no weight was cut to 0
    np.testing.assert_allclose(tiles, expected, rtol=1e-9)


@pytest.mark.parametrize("padding", ["bag", "grid"])
@torch.no_grad()
def test_transmil_carries_the_class_token_through_both_layers(pack, padding):
    torch.manual_seed(0)
    model = TransMil(DIM, 2, width=8, heads=2, landmarks=4, padding=padding).double().eval()
    layout = TokenLayout.of((N,), 4, torch.device("cpu"), padding=padding)
    with inputs_of([model.layer1.norm, model.layer2.norm]) as seen:
        model(pack)
    tokens = len(layout.source)
    maps = [
        np.stack([through_landmarks(layer, calls[0], layout, unit) for unit in np.eye(tokens)])
        for layer, calls in zip((model.layer1, model.layer2), seen, strict=True)
    ]
    row = np.eye(tokens)[0]
    for layer in reversed(maps):
        row = 0.5 * row + 0.5 * np.maximum(row @ layer, 0)
        row = row / row.sum()
    originals = np.concatenate([[-1], np.arange(N), np.arange(tokens - 1 - N)])
    expected = np.array([row[originals == tile].sum() for tile in range(N)])
    np.testing.assert_allclose(model.trace(pack).row(), expected / expected.sum(), rtol=1e-9)


@pytest.mark.parametrize("name", ["abmil", "mambamil", "mean"])
def test_models_without_layers_of_attention_have_no_trace(pack, name):
    assert AGGREGATORS.build(name, DIM, 2).double().eval().trace(pack) is None


def test_wrapped_models_are_looked_through(pack):
    torch.manual_seed(0)
    inner = SetTransformer(DIM, 2, embed_dims=(8,), width=8, heads=2, tokens=3).double().eval()
    row = Standardized(Standardizer(DIM).double(), inner).eval().trace(pack).row()
    np.testing.assert_allclose(row, inner.trace(pack).row())
    options = {"embed_dims": (8,), "width": 8, "heads": 2, "tokens": 3}
    host = AGGREGATORS.build(
        "downsampled", DIM, 2, options={"host": "set_transformer", "host_options": options}
    ).double()
    assert host.eval().trace(pack).row().sum() == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", ["set_transformer", "transmil", "gdat"])
def test_smallest_bags(name, n):
    model = AGGREGATORS.build(name, DIM, 2).double().eval()
    bag = PackedBags.pack([torch.from_numpy(np.random.default_rng(0).normal(size=(n, DIM)))])
    row = model.trace(bag).row()
    assert row.shape == (n,)
    assert row.sum() == pytest.approx(1)
