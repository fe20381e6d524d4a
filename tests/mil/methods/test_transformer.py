import numpy as np
import pytest
import torch
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil import _attention as attention
from eosin.mil._rollout import rollout
from eosin.mil.bags import PackedBags
from eosin.mil.methods.transformer import Transformer, waves


def build(positions="none", **options):
    torch.manual_seed(0)
    small = {"width": 8, "heads": 2, "feed_forward": 6, "positions": positions}
    return Transformer(5, 3, **small | options).double().eval()


def bags_of(*lengths, dim=5):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in lengths]
    places = [torch.randint(0, 9, (n, 2), generator=generator).float() for n in lengths]
    return PackedBags.pack(values, places=places)


def stamp(state):
    """The authors' weights under our names."""
    ours = {"cls_token": state["class_token"]}
    names = {"project_features.0": "embed.0", "transformer.norm": "norm", "mlp_head.0": "classifier"}
    for layer in range(2):
        old, new = f"transformer.layers.{layer}", f"layers.{layer}"
        names |= {f"{old}.0.norm": f"{new}.norm", f"{old}.0.mhsa.out_proj": f"{new}.out"}
        names |= {f"{old}.1.{number}": f"{new}.mlp.{number}" for number in (0, 1, 4)}
        for part in ("weight", "bias"):
            thirds = state[f"{old}.0.mhsa.in_proj_{part}"].chunk(3)
            ours |= {
                f"{new}.{name}.{part}": third for name, third in zip(("query", "key", "value"), thirds, strict=True)
            }
    return ours | {f"{new}.{part}": state[f"{old}.{part}"] for old, new in names.items() for part in ("weight", "bias")}


def test_outputs_and_gradients_are_those_of_stamp(authors, same):
    wanted = authors("transformer")
    model = Transformer(7, 3, width=8, heads=2, feed_forward=6).double().eval()
    model.load_state_dict(stamp({key.removeprefix("state/"): value for key, value in wanted.items()}))
    x = wanted["x"].requires_grad_()
    logits = model(PackedBags.pack([x])).logits
    logits.square().sum().backward()
    same({"logits": logits, "grad_x": x.grad}, wanted)


def by_hand(model, rows, places):
    """Equations 1 to 3 for one bag, every token in every layer."""
    h = functional.gelu(model.embed[0](rows))
    if model.positions == "sincos":
        h = h + waves(places, 8)
    tokens = torch.cat([model.cls_token[None], h])
    far = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    far[1:, 1:] = torch.cdist(places, places)
    maps = []
    for layer in model.layers:
        q, k, v = (
            part(layer.norm(tokens)).view(-1, 2, 4).transpose(0, 1) for part in (layer.query, layer.key, layer.value)
        )
        scores = q @ k.mT / 2
        if model.positions == "alibi":
            scores = scores - torch.tensor([2**-4, 2**-8])[:, None, None] * far
        maps.append(scores.softmax(2))
        tokens = tokens + layer.out((maps[-1] @ v).transpose(0, 1).flatten(1))
        tokens = tokens + layer.mlp(tokens)
    return model.classifier(model.norm(tokens[0])), maps


@pytest.mark.parametrize("chunk", [attention.CHUNK_ELEMENTS, 50])
@pytest.mark.parametrize("positions", ["none", "alibi", "sincos"])
def test_a_pack_is_its_bags_by_hand(positions, chunk, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", chunk)
    model, bags = build(positions), bags_of(9, 1, 4, 12)
    rows = bags.values.requires_grad_()
    output = model(bags.with_values(rows))
    parts = zip(bags.unpack(rows), bags.unpack(bags.places.double()), strict=True)
    wanted, maps = zip(*(by_hand(model, *part) for part in parts), strict=True)
    torch.testing.assert_close(output.logits, torch.stack(wanted), rtol=1e-9, atol=1e-12)
    for scores, layers in zip(bags.unpack(output.scores), maps, strict=True):
        row = layers[-1][:, 0, 1:]
        torch.testing.assert_close(scores.softmax(0).T, row / row.sum(1, keepdim=True))
    ours, theirs = (
        torch.autograd.grad(logits.square().sum(), rows, retain_graph=True)[0]
        for logits in (output.logits, torch.stack(wanted))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("positions", ["none", "alibi"])
def test_the_trace_is_the_rollout_of_whole_maps(positions, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", 60)
    model, bag = build(positions, layers=3), bags_of(7)
    maps = [each.mean(0).detach().numpy() for each in by_hand(model, bag.values, bag.places.double())[1]]
    row = rollout(maps)[-1][0, 1:]
    np.testing.assert_allclose(model.trace(bag).row(), row / row.sum(), rtol=1e-8)


def test_log_weights_are_how_often_a_tile_is_read():
    model, bag = build(), bags_of(6)
    value = lambda logits: logits[0] - logits[1]  # noqa: E731
    slope = model.weight_gradient(bag, value)
    step = 1e-6
    embedded = bag.with_values(model.embed(bag.values).detach())
    for tile in (0, 3):
        weights = torch.zeros(6, dtype=torch.float64)
        weights[tile] = step
        moved, whole = (
            value(model.aggregate(embedded, log_weights=w).logits[0]).item() for w in (weights, 0 * weights)
        )
        assert (moved - whole) / step == pytest.approx(slope[tile], rel=1e-4, abs=1e-8)


def test_places_matter_only_where_they_are_read():
    bag = bags_of(8)
    moved = PackedBags.pack([bag.values], places=[bag.places * torch.tensor([3.0, 1.0])])
    for positions, differs in (("none", False), ("alibi", True), ("sincos", True)):
        model = build(positions)
        assert (not torch.allclose(model(bag).logits, model(moved).logits)) is differs
    # ALiBi sees distances alone
    shifted = PackedBags.pack([bag.values], places=[bag.places + 100])
    model = build("alibi")
    torch.testing.assert_close(model(bag).logits, model(shifted).logits)


def test_without_places_a_model_that_reads_them_says_so():
    with pytest.raises(ConfigError, match="Transformer reads where tiles lie"):
        build("alibi")(PackedBags.pack([torch.randn(3, 5).double()]))
    with pytest.raises(ConfigError, match="3 heads do not divide"):
        Transformer(5, 2, width=8, heads=3)
    with pytest.raises(ConfigError, match="width that 4 divides"):
        Transformer(5, 2, width=6, heads=2, positions="sincos")
