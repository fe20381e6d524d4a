import math

import pytest
import torch

from eosin.errors import ConfigError
from eosin.mil import _attention as attention
from eosin.mil.bags import PackedBags
from eosin.mil.methods.gdat import Gdat, GdatBlock, GroupedDoubleAttention, Groups

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [2**15, 8])
def test_grouped_attention_is_the_authors(golden, same, rows, monkeypatch):
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", rows)
    golden = golden("comel_gdat_N37")
    layer = GroupedDoubleAttention(16, heads=4, qkv_bias=True).double()
    layer.load_state_dict({name: golden["w_" + name.replace(".", "_")] for name in layer.state_dict()})
    x = golden["x"].requires_grad_()
    groups = Groups.of((37,), int(golden["region_size"]), "official", CPU)
    assert groups.lengths == (37 + int(golden["add_length"]),)
    out = layer(x[0], groups)[None]
    (out * golden["R"]).sum().backward()
    same({"out": out, "g_x": x.grad}, golden)


def test_the_block_is_the_authors(golden, same):
    golden = golden("comel_block")
    block = GdatBlock(16, heads=4, qkv_bias=True, expansion=4, dropout=0.0, norm_eps=float(golden["norm_eps"])).double()
    block.load_state_dict({name: golden["w_" + name.replace(".", "_")] for name in block.state_dict()})
    groups = Groups.of((37,), int(golden["region_size"]), "official", CPU)
    same({"out": block(golden["x"][0], groups)[None]}, golden)


def plain_attention(layer, x, region_size, grouping, padding="official"):
    """Equation 1 for one bag, on the grid."""
    n = len(x)
    side = math.ceil(math.sqrt(n))
    step = 2 if n < 10 else region_size
    side = -(-side // step) * step
    region = side if n < 10 else region_size
    k = side // region
    grid = torch.cat([x, x.new_zeros(side * side - n, x.shape[1])])
    cells = grid.view(k, region, k, region, -1)
    real = (torch.arange(side * side) < n).view(k, region, k, region, 1).double()
    real = real if padding == "masked" else torch.ones_like(real)
    axes = (0, 2) if grouping == "official" else (1, 3)
    counts = real.sum(axes)
    means = (cells * real).sum(axes) / counts.clamp(min=1)
    split = lambda rows: rows.view(-1, 3, layer.heads, x.shape[1] // layer.heads).permute(1, 2, 0, 3)  # noqa: E731
    q, key, value = split(layer.qkv(grid))
    gq, gk, _ = split(layer.qkv(means.flatten(0, 1)))
    no_key, no_group = real.flatten() == 0, counts.flatten() == 0
    read = (gq @ key.mT * layer.scale).masked_fill(no_key, -torch.inf).softmax(-1) @ value
    out = (q @ gk.mT * layer.scale).masked_fill(no_group, -torch.inf).softmax(-1) @ read + 0.1 * value
    return layer.proj(out.transpose(0, 1).flatten(1)[:n])


@pytest.mark.parametrize("region_size", [2, 3, 4])
@pytest.mark.parametrize("grouping", ["official", "spatial"])
@pytest.mark.parametrize("padding", ["official", "masked"])
def test_a_pack_is_its_bags_on_their_grids(padding, grouping, region_size):
    torch.manual_seed(0)
    layer = GroupedDoubleAttention(8, heads=2, qkv_bias=True).double()
    lengths = (1, 30, 0, 5, 9, 10, 17)
    x = torch.randn(sum(lengths), 8, dtype=torch.float64)
    found = layer(x, Groups.of(lengths, region_size, grouping, CPU, padding=padding))
    wanted = [plain_attention(layer, bag, region_size, grouping, padding) for bag in x.split(lengths) if len(bag)]
    torch.testing.assert_close(found, torch.cat(wanted))


def test_masked_padding_takes_no_part():
    """A bag of equal instances stays a bag of equal instances, whatever its padding; zeros would dilute it."""
    torch.manual_seed(0)
    layer = GroupedDoubleAttention(8, heads=2, qkv_bias=True).double()
    one = torch.randn(1, 8, dtype=torch.float64)
    full, padded = one.expand(16, 8), one.expand(11, 8)
    alone = layer(full, Groups.of((16,), 4, "official", CPU, padding="masked"))
    masked = layer(padded, Groups.of((11,), 4, "official", CPU, padding="masked"))
    torch.testing.assert_close(masked, alone[:11])
    assert not torch.allclose(layer(padded, Groups.of((11,), 4, "official", CPU)), alone[:11])
    assert Gdat(5, 2, width=8, heads=2).padding == "masked"


def test_computing_again_what_was_not_kept_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    model = Gdat(5, 3, width=8, heads=4, layers=2, region_size=4).double().eval()
    bags = PackedBags.pack([torch.randn(n, 5, dtype=torch.float64) for n in (0, 1, 40, 7)])
    runs = []
    for rows in (2**15, 16):
        monkeypatch.setattr(attention, "CHECKPOINT_ROWS", rows)
        logits = model(bags).logits
        runs.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    for kept, again in zip(*runs, strict=True):
        torch.testing.assert_close(kept, again)


def test_the_model_reads_any_bag():
    torch.manual_seed(0)
    model = Gdat(5, 3, width=8, heads=2, layers=1, region_size=4)
    output = model(PackedBags.pack([torch.randn(n, 5) for n in (0, 1, 40)]))
    output.logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model(PackedBags.pack([torch.zeros(0, 5)])).logits.isfinite().all()


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="3 heads do not divide the width 8"):
        Gdat(6, 3, width=8, heads=3)
