import pytest
import torch

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.methods.rrt import Rrt, laid_out, listed, region_places

POOLING = {"attention.V": "attention.0", "attention.w": "attention.2"}
GATED = {"attention.V": "attention_a.0", "attention.U": "attention_b.0", "attention.w": "attention_c"}


def theirs(state, layers, pooling):
    """The authors' weights under our names."""
    names = {"embed.0": "patch_to_emb.0", "norm": "online_encoder.norm", "classifier": "predictor"}
    names |= {ours: f"pool_fn.attention.{his}" for ours, his in pooling.items()}
    blocks = {f"within.{layer}": f"online_encoder.layers.{layer}" for layer in range(layers)}
    for ours, his in (blocks | {"between": "online_encoder.cr_msa"}).items():
        parts = {"norm": "norm", "attend.qkv": "attn.attn.qkv", "attend.proj": "attn.attn.proj"}
        names |= {f"{ours}.{new}": f"{his}.{old}" for new, old in parts.items()}
    deep = "online_encoder.cr_msa.attn.phi.0.weight" in state
    names |= {f"between.scores.{n}": f"online_encoder.cr_msa.attn.phi.{n}" for n in (0, 2)} if deep else {}
    found = {f"within.{n}.attend.epeg.weight": state[f"online_encoder.layers.{n}.attn.attn.pe.weight"]
             for n in range(layers)}  # fmt: skip
    found |= {} if deep else {"between.scores.weight": state["online_encoder.cr_msa.attn.phi"].T}
    for ours, his in names.items():
        found |= {f"{ours}.{part}": state[f"{his}.{part}"] for part in ("weight", "bias") if f"{his}.{part}" in state}
    return found


OPTIONS = {
    "rrt": {"taps": 3, "tokens": 3, "cross_heads": 2},
    "rrt_deep": {"layers": 2, "taps": 5, "tokens": 2, "cross_heads": 1, "scores": "deep", "shortcut": True,
                 "pool_activation": "tanh", "gated": True, "embed_activation": "gelu"},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_gradients_are_the_authors(authors, same, name):
    wanted, options = authors(name), OPTIONS[name]
    model = Rrt(7, 3, width=8, hidden=6, heads=2, regions=2, **options).double().eval()
    state = {key.removeprefix("state/"): value for key, value in wanted.items() if key.startswith("state/")}
    model.load_state_dict(theirs(state, options.get("layers", 1), GATED if options.get("gated") else POOLING))
    bags = [wanted[f"x{size}"].requires_grad_() for size in ("", "_small")]
    for size, bag in zip(("", "_small"), bags, strict=True):
        logits = model(PackedBags.pack([bag])).logits
        logits.square().sum().backward()
        found = {"logits": logits, "grad_x": bag.grad}
        same(found, {part: wanted[f"{part}{size}"] for part in found})
    together = model(PackedBags.pack(bags)).logits
    same({"both": together}, {"both": torch.cat([wanted["logits"], wanted["logits_small"]])})


def test_regions_are_squares_of_the_list():
    places = region_places(13, 2)
    assert places.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 13, 13]]  # 13 is no tile
    tiles = torch.randn(13, 3)
    assert not laid_out(tiles, places)[places == 13].any()
    assert torch.equal(listed(laid_out(tiles, places), places, 13), tiles)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 3}, "3 heads do not divide the width 8"), ({"taps": 4}, "taps 4 is even")],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Rrt(5, 2, width=8, **options)
