import pytest
import torch

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.methods.patch_gcn import PatchGcn


def theirs(state, layers=3):
    """The authors' weights under our names."""
    names = {"embed.0": "fc.0", "phi.0": "path_phi.0", "classifier.0": "path_rho.0", "classifier.2": "classifier"}
    names |= {f"attention.{ours}": f"path_attention_head.attention_{his}" for ours, his in
              (("V", "a.0"), ("U", "b.0"), ("w", "c"))}  # fmt: skip
    for layer in range(layers):
        names |= {
            f"convs.{layer}.mlp.{ours}": f"layers.{layer}.conv.mlp.{his}" for ours, his in ((0, 0), (1, 1), (3, 4))
        }
        names |= {f"norms.{layer - 1}": f"layers.{layer}.norm"} if layer else {}
    found = {f"convs.{layer}.temperature": state[f"layers.{layer}.conv.aggr_module.t"] for layer in range(layers)}
    for ours, his in names.items():
        found |= {f"{ours}.{part}": state[f"{his}.{part}"] for part in ("weight", "bias") if f"{his}.{part}" in state}
    return found


def test_outputs_and_gradients_are_the_authors(authors, same):
    wanted = authors("patch_gcn")
    model = PatchGcn(7, 3, width=4, neighbours=5).double().eval()
    state = {key.removeprefix("state/"): value for key, value in wanted.items() if key.startswith("state/")}
    model.load_state_dict(theirs(state))
    x = wanted["x"].requires_grad_()
    logits = model(PackedBags.pack([x], places=[wanted["places"]])).logits
    logits.square().sum().backward()
    same({"logits": logits, "grad_x": x.grad}, wanted)


def test_a_tile_alone_and_an_empty_bag_have_finite_gradients():
    model = PatchGcn(4, 2, width=4)
    x = torch.randn(1, 4, requires_grad=True)
    output = model(PackedBags.pack([x, torch.zeros(0, 4)], places=[torch.zeros(1, 2), torch.zeros(0, 2)]))
    output.logits.sum().backward()
    assert torch.isfinite(output.logits).all()
    assert torch.isfinite(x.grad).all()


def test_far_tiles_do_not_matter_to_a_tile_of_one_layer():
    model = PatchGcn(4, 2, width=4, layers=1, neighbours=3).eval()
    places = torch.tensor([(x, 0) for x in range(12)], dtype=torch.float32)
    x = torch.randn(12, 4)
    changed = x.clone()
    changed[-1] += 1
    one, other = (model(PackedBags.pack([rows], places=[places])).instances for rows in (x, changed))
    torch.testing.assert_close(one[:8], other[:8], rtol=0, atol=0)
    assert not torch.equal(one[10], other[10])


def test_places_are_needed():
    with pytest.raises(ConfigError, match="PatchGcn reads where tiles lie"):
        PatchGcn(5, 2, width=4)(PackedBags.pack([torch.randn(4, 5)]))
