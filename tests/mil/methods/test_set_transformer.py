import pytest
import torch
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil import _attention as attention
from eosin.mil.bags import PackedBags
from eosin.mil.methods import set_transformer
from eosin.mil.methods.set_transformer import InducedBlock, MultiheadBlock, PoolingBlock, SetTransformer


def pack(x):
    return PackedBags.pack(list(x))


def load(module, golden, prefix="w_", names=()):
    """Copy weights whose names in the file are the module's with dots written as underscores."""
    state = {}
    for name in module.state_dict():
        file = prefix + name.replace(".", "_")
        for ours, theirs in names:
            file = file.replace(ours, theirs)
        state[name] = golden[file]
    module.load_state_dict(state)


def compare(module, golden, out, inputs, same, names=()):
    (out * golden["R"]).sum().backward()
    found = {"out": out} | {name: value.grad for name, value in inputs.items()}
    for name, parameter in module.named_parameters():
        file = "gw_" + name.replace(".", "_")
        for ours, theirs in names:
            file = file.replace(ours, theirs)
        found[file] = parameter.grad
    same(found, golden)


def test_the_block_is_the_authors(golden, same):
    golden = golden("st_mab")
    block = MultiheadBlock(12, 10, 16, heads=4).double()
    load(block, golden)
    query, keys = golden["in_Q"].requires_grad_(), golden["in_K"].requires_grad_()
    out = block(query, keys.flatten(0, 1), (24, 24))
    compare(block, golden, out, {"gin_Q": query, "gin_K": keys}, same)


def test_the_block_reads_the_other_way_too(golden, same):
    golden = golden("st_mab")
    block = MultiheadBlock(12, 10, 16, heads=4).double()
    load(block, golden)
    query, keys = golden["in_Q"].requires_grad_(), golden["in_K"].requires_grad_()
    out = block.read_tokens(query.flatten(0, 1), keys, pack(query).cu_seqlens).view(2, 7, 16)
    compare(block, golden, out, {"gin_Q": query, "gin_K": keys}, same)


@pytest.mark.parametrize(("rows", "small"), [(2**15, 30), (2**15, 29), (13, 29)])
def test_the_induced_block_is_the_authors(golden, same, rows, small, monkeypatch):
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", rows)
    monkeypatch.setattr(set_transformer, "SMALL_BAG", small)
    golden = golden("st_isab")
    names = [("w_tokens", "w_inducing_points")] + [
        (f"w_{part}_{role}", f"w_{part}_block_{role}")
        for part in ("inducing", "point")
        for role in ("query", "key", "value", "ff")
    ]
    block = InducedBlock(5, MultiheadBlock(16, 12, 16, heads=4), MultiheadBlock(12, 16, 16, heads=4)).double()
    load(block, golden, names=names)
    x = golden["in_X"].requires_grad_()
    out = block(pack(x)).view(2, 30, 16)
    compare(block, golden, out, {"gin_X": x}, same, names)


def test_the_pooling_block_is_the_authors(golden, same):
    golden = golden("st_pma")
    block = PoolingBlock(2, MultiheadBlock(16, 16, 16, heads=4)).double()
    load(block, golden)
    x = golden["in_X"].requires_grad_()
    out, scores, instances = block(pack(x))
    assert scores.shape == (60, 8)
    assert instances.shape == (60, 16)
    compare(block, golden, out, {"gin_X": x}, same)


def test_the_whole_model_is_the_authors(golden, same):
    golden = golden("st_full")
    options = {"embed_dims": (), "width": 16, "heads": 4, "tokens": 5, "sab_layers": 2, "layer_norm": False}
    model = SetTransformer(12, 3, **options).double()
    roles = ("query", "key", "value", "ff")
    names = [("classifier", "output"), ("pool_seeds", "pma_seeds")]
    names += [(f"pool_block_{role}", f"pma_block_{role}") for role in roles]
    names += [(f"decoder_{i}_{role}", f"sab{i + 1}_block_{role}") for i in range(2) for role in roles]
    names += [(f"encoder_{i}_tokens", f"isab{i + 1}_inducing_points") for i in range(2)]
    names += [
        (f"encoder_{i}_{part}_{role}", f"isab{i + 1}_{part}_block_{role}")
        for i in range(2)
        for part in ("inducing", "point")
        for role in roles
    ]
    load(model, golden, names=names)
    x = golden["in_X"].requires_grad_()
    out = model(pack(x)).logits[None]
    compare(model, golden, out, {"gin_X": x}, same, names)


@pytest.mark.parametrize("scale", ["model", "head"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_ways_of_a_block_agree_with_every_matrix_written_out(layer_norm, scale):
    torch.manual_seed(0)
    block = MultiheadBlock(8, 8, 8, heads=2, layer_norm=layer_norm, scale=scale).double()
    tokens, keys = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = (
        layer(x)[0].view(-1, 2, 4).transpose(0, 1)
        for layer, x in ((block.query, tokens), (block.key, keys), (block.value, keys))
    )
    weights = (q @ k.mT / (8 if scale == "model" else 4) ** 0.5).softmax(-1)
    out = (q + weights @ v).transpose(0, 1).flatten(1)
    if layer_norm:
        out = functional.layer_norm(out, (8,))
    out = out + functional.relu(block.ff(out))
    out = functional.layer_norm(out, (8,)) if layer_norm else out
    torch.testing.assert_close(block(tokens, keys[0], (6,))[0], out)
    torch.testing.assert_close(block.read_bags(tokens[0], pack(keys))[0], out)
    torch.testing.assert_close(block.read_tokens(tokens[0], keys, pack(tokens).cu_seqlens), out)
    both = block.attend_within(torch.cat([tokens, keys], 1))
    together = torch.cat([tokens, keys], 1)
    one_by_one = block.read_bags(together[0], pack(together))
    torch.testing.assert_close(both, one_by_one)


@pytest.mark.parametrize("lengths", [(2, 1, 0), (9, 14, 3)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_small_bags_are_read_as_others(layer_norm, lengths, monkeypatch):
    """Few instances read the tokens through folded queries, more instances through projected tokens."""
    torch.manual_seed(0)
    block = MultiheadBlock(6, 10, 8, heads=2, layer_norm=layer_norm).double()
    bags = PackedBags.pack([torch.randn(n, 6, dtype=torch.float64) for n in lengths])
    keys = torch.randn(3, 5, 10, dtype=torch.float64)
    folds = []
    monkeypatch.setattr(block, "_read_folded", lambda *args: folds.append(1) or type(block)._read_folded(block, *args))
    found = block.read_small(bags.values, keys, lengths)
    wanted = block.read_tokens(bags.values, keys, bags.cu_seqlens)
    torch.testing.assert_close(found, wanted)
    assert len(folds) == (lengths[0] == 2)
    for ours, other in zip(
        *(torch.autograd.grad(out.sin().sum(), list(block.parameters())) for out in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, other, atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize("rows", [2**15, 7])
@pytest.mark.parametrize("pma_ff", [False, True])
def test_a_pack_is_its_bags(pma_ff, rows, monkeypatch):
    torch.manual_seed(0)
    model = SetTransformer(
        5, 3, embed_dims=(6,), width=8, heads=2, tokens=3, sab_layers=1, seeds=2, pma_ff=pma_ff
    ).double()
    bags = PackedBags.pack([torch.randn(n, 5, dtype=torch.float64) for n in (6, 1, 0, 20, 0)])
    alone = torch.cat([model(PackedBags.pack([bag])).logits for bag in bags.unpack()])
    alone_grads = torch.autograd.grad(alone.square().sum(), list(model.parameters()))
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", rows)
    monkeypatch.setattr(set_transformer, "SMALL_BAG", 20 if rows > 20 else 0)
    packed = model(bags).logits
    torch.testing.assert_close(packed, alone)
    grads = torch.autograd.grad(packed.square().sum(), list(model.parameters()))
    for found, wanted in zip(grads, alone_grads, strict=True):
        torch.testing.assert_close(found, wanted)


def written_out(model, bag):
    """Equations 1 to 3 for one bag, head by head."""

    def block(mab, x, y):
        q, k, v = mab.query(x), mab.key(y), mab.value(y)
        wide = q.shape[1] // mab.heads
        heads = [slice(first, first + wide) for first in range(0, q.shape[1], wide)]
        o = torch.cat([q[:, j] + (q[:, j] @ k[:, j].T * mab.scale).softmax(1) @ v[:, j] for j in heads], 1)
        o = mab.norm_attn(o)
        return mab.norm_ff(o + functional.relu(mab.ff(o)))

    x = model.embed(bag)
    for isab in model.encoder:
        x = block(isab.point, x, block(isab.inducing, isab.tokens[0], x))
    x = x if model.pool.ff is None else x + functional.relu(model.pool.ff(x))
    z = block(model.pool.block, model.pool.seeds[0], x)
    for sab in model.decoder:
        z = block(sab, z, z)
    return model.classifier(z.flatten())


@pytest.mark.parametrize("small", [256, 0])
@pytest.mark.parametrize(
    ("layer_norm", "scale", "pma_ff", "isab", "sab", "seeds"),
    [(True, "model", False, 2, 2, 1), (True, "head", True, 1, 1, 3), (False, "head", False, 0, 0, 2),
     (False, "model", True, 3, 0, 1)],
)  # fmt: skip
def test_every_form_is_its_equations(layer_norm, scale, pma_ff, isab, sab, seeds, small, monkeypatch):
    monkeypatch.setattr(set_transformer, "SMALL_BAG", small)
    torch.manual_seed(0)
    options = {"layer_norm": layer_norm, "scale": scale, "pma_ff": pma_ff, "seeds": seeds}
    model = SetTransformer(
        5, 3, embed_dims=(7,), width=12, heads=3, tokens=4, isab_layers=isab, sab_layers=sab, **options
    ).double()
    bags = PackedBags.pack([torch.randn(n, 5, dtype=torch.float64) for n in (9, 1, 30)])
    assert model.pool.block.scale == (12 if scale == "model" else 4) ** -0.5
    runs = (model(bags).logits, torch.stack([written_out(model, bag) for bag in bags.unpack()]))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)
    probe = torch.randn(3, 3, dtype=torch.float64)
    gradients = [torch.autograd.grad((logits * probe).sum(), list(model.parameters())) for logits in runs]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-11)


def test_tokens_start_as_wide_as_the_authors():
    bound = (6 / (512 * (64 + 1))) ** 0.5
    tokens = SetTransformer(8, 2).encoder[0].tokens
    assert 0.98 * bound < tokens.abs().max() <= bound


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="3 heads do not divide the width 8"):
        SetTransformer(6, 3, width=8, heads=3)


def test_norms_are_the_papers_and_not_the_default():
    norms = [
        sum(isinstance(part, torch.nn.LayerNorm) for part in model.modules())
        for model in (SetTransformer(8, 2, isab_layers=1), SetTransformer(8, 2, isab_layers=1, layer_norm=True))
    ]
    assert norms == [0, 6]
