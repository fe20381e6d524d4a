import numpy as np
import pytest
import torch

from eosin.mil.bags import PackedBags
from eosin.mil.methods.varmil import VarMil


def build(**options):
    torch.manual_seed(0)
    small = {"embed_dims": (6,), "hidden": 4, "variances": 3, "head_dim": 5}
    return VarMil(5, 2, **small | options).double().eval()


@pytest.mark.parametrize(
    ("name", "options"), [("varmil", {}), ("varmil_separate_log", {"separate": True, "spread": "log"})]
)
def test_outputs_and_gradients_are_the_authors(authors, same, name, options):
    wanted = authors(name)
    model = VarMil(7, 3, embed_dims=(8,), hidden=5, variances=4, head_dim=6, **options).double().eval()
    attns = ["enc_and_attend.attns.0", "enc_and_attend.attns.1"] if options else ["enc_and_attend.1"]
    names = {"embed.0": "encoder.0", "directions": "var_pool.var_projections", "head.0": "head.0", "head.3": "head.2"}
    for number, attn in enumerate(attns):
        parts = {"V": "tanh_layer.0", "U": "sigmoid_layer.0", "w": "w"}
        names |= {f"attentions.{number}.{ours}": f"{attn}.{theirs}" for ours, theirs in parts.items()}
    state = {
        f"{ours}.{part}": wanted.get(f"state/{his}.{part}")
        for ours, his in names.items()
        for part in ("weight", "bias")
    }
    model.load_state_dict({key: value for key, value in state.items() if value is not None})
    x = wanted["x"].requires_grad_()
    logits = model(PackedBags.pack([x])).logits
    logits.square().sum().backward()
    same({"logits": logits, "grad_x": x.grad}, wanted, rtol=1e-8)  # the root has a floor of its own


def test_what_ifs_are_exact_and_two_attentions_have_none():
    bag = PackedBags.pack([torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 50])
    for spread in ("root", "log"):
        model = build(spread=spread)
        with torch.no_grad():
            form = model.readout(bag, model(bag))
            without = [model(bag.select(torch.arange(12) != i)).logits[0].numpy() for i in range(12)]
        np.testing.assert_allclose(form.logits() + form.leave_one_out(), without, rtol=1e-7, atol=1e-9)
    model = build(separate=True)
    assert model.readout(bag, model(bag)) is None


def test_a_bag_of_one_tile_has_no_variance_and_a_finite_gradient():
    model = build()
    rows = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    output = model(PackedBags.pack([rows]))
    assert output.embedding[0, 6:].abs().max() < 1e-5
    output.logits.sum().backward()
    assert rows.grad.isfinite().all()
