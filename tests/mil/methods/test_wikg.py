import pytest
import torch

from eosin.errors import ConfigError
from eosin.mil import _attention as attention
from eosin.mil.bags import PackedBags
from eosin.mil.methods.wikg import WiKg

NAMES = {
    "embed": "_fc1.0",
    "head": "W_head",
    "tail": "W_tail",
    "sums": "linear1",
    "products": "linear2",
    "scores.0": "readout.gate_nn.0",
    "scores.2": "readout.gate_nn.2",
    "norm": "norm",
    "classifier": "fc",
}


def test_outputs_and_gradients_are_the_authors(authors, same):
    wanted = authors("wikg")
    model = WiKg(7, 3, width=8, neighbours=3).double().eval()
    parts = ((ours, his, part) for ours, his in NAMES.items() for part in ("weight", "bias"))
    model.load_state_dict({f"{ours}.{part}": wanted[f"state/{his}.{part}"] for ours, his, part in parts})
    x = wanted["x"].requires_grad_()
    logits = model(PackedBags.pack([x])).logits
    logits.square().sum().backward()
    same({"logits": logits, "grad_x": x.grad}, wanted)


def edges_of(model, bags):
    to, there = model._edges(bags, bags.values, bags.values)
    return [sorted(row[real].tolist()) for row, real in zip(to, there, strict=True)]


@pytest.mark.parametrize("chunk", [attention.CHUNK_ELEMENTS, 20])
def test_near_edges_are_the_neighbourhood_on_the_slide(chunk, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", chunk)
    places = torch.tensor([(x, y) for y in range(4) for x in range(5)], dtype=torch.float32)
    bags = PackedBags.pack([torch.zeros(3, 2), torch.zeros(20, 2)], places=[places[:3], places])
    found = edges_of(WiKg(2, 2, width=2, neighbours=9, edges="near"), bags)
    assert found[:3] == [[0, 1, 2]] * 3  # a small bag has fewer edges
    for number, (x, y) in enumerate(places.tolist()):
        if 0 < x < 4 and 0 < y < 3:
            around = [3 + int(5 * (y + dy) + x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            assert found[3 + number] == sorted(around)


def test_places_are_needed_for_near_edges_only():
    bags = PackedBags.pack([torch.randn(4, 5)])
    WiKg(5, 2, width=4)(bags)
    with pytest.raises(ConfigError, match="WiKg reads where tiles lie"):
        WiKg(5, 2, width=4, edges="near")(bags)
