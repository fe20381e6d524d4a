import numpy as np
import pytest
import torch
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil._recipe import RECIPES
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import PRESETS, Abmil
from eosin.mil.slots import AGGREGATORS
from eosin.mil.tasks._classification import Binary


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-9, 1e-10), (torch.float32, 2e-4, 2e-5)])
def test_outputs_and_gradients_are_the_authors(shared, gated, dtype, rtol, atol):
    golden = np.load(shared / f"golden/abmil_{'gated' if gated else 'plain'}.npz")
    width, hidden = golden["x"].shape[1], golden["attention.V.weight"].shape[0]
    model = Abmil(width, 1, embed_dims=(), gated=gated, hidden=hidden, dropout=0.0).to(dtype)
    names = {name for name in golden.files if name.split(".")[0] in ("attention", "classifier") and "." in name}
    model.load_state_dict({name: torch.from_numpy(golden[name]) for name in names})
    x = torch.from_numpy(golden["x"]).to(dtype).requires_grad_()
    bags = PackedBags.pack([x, x.detach()[:0]])

    output = model(bags)
    target = torch.from_numpy(golden["label"]).long()
    loss = Binary(classes=("0", "1")).loss(output.logits[:1], target)
    loss.backward()

    compared = {"x", "label", *names}

    def check(found, wanted):
        compared.add(wanted)
        np.testing.assert_allclose(found.detach().double(), golden[wanted], rtol=rtol, atol=atol)

    check(output.scores[:, 0], "attention_logits")
    check(output.scores[:, 0].softmax(0), "attention")
    check(output.embedding[0], "bag_embedding")
    check(output.logits[0], "logit")
    check(output.logits[0].sigmoid(), "prob")
    check((output.logits[0] > 0).to(dtype), "y_hat")
    check(loss, "loss")
    check(x.grad, "grad.x")
    for name, parameter in model.named_parameters():
        check(parameter.grad, f"grad.{name}")
    assert compared == set(golden.files)


def test_presets_differ_where_the_repositories_do():
    names = [*PRESETS, "acmil", "mhim", "mhim_v2", "packmil"]
    recipes = {name: RECIPES[f"abmil_{name}"].aggregator for name in names}
    built = {name: AGGREGATORS.build(one.name, 1024, 2, options=one.options) for name, one in recipes.items()}
    assert built["clam"].attention.w.in_features == 256
    assert built["acmil"].embed[0].bias is None
    assert built["mhim"].attention.U is None
    assert built["mhim"].attention.activation == "relu"
    assert not built["mhim"].embed[0].bias.any()
    assert isinstance(built["packmil"].embed[1], torch.nn.GELU)
    assert built["millab"].attention.w.in_features == 384
    assert [type(layer) for layer in built["classic"].embed].count(torch.nn.Dropout) == 1
    assert isinstance(built["classic"].embed[-1], torch.nn.Dropout)
    assert isinstance(built["mhim_v2"].embed[1], torch.nn.GELU)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_dropout_may_follow_the_last_layer_only(activation):
    torch.manual_seed(0)
    options = {"embed_dims": (50, 40), "embed_activation": activation, "dropout": 0.5}
    each, last = (Abmil(30, 2, dropout_after=after, **options).embed for after in ("each", "last"))
    last.load_state_dict({name.replace("3.", "2."): value for name, value in each.state_dict().items()})
    x = torch.randn(200, 30)
    whole = last.eval()(x)
    torch.testing.assert_close(each.eval()(x), whole)
    dropped = last.train()(x)
    kept = dropped != 0
    assert 0.4 < kept[whole != 0].float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])  # the layers before are as they were
    assert not torch.allclose(each.train()(x)[kept], 2 * whole[kept])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_every_variant_is_its_equation(gated, activation, bias, heads):
    torch.manual_seed(0)
    options = {"embed_dims": (6,), "embed_activation": "gelu", "embed_bias": bias, "attention_bias": bias}
    model = Abmil(5, 3, hidden=4, gated=gated, attention_activation=activation, heads=heads, **options)
    model.double().eval()
    bag = torch.randn(9, 5, dtype=torch.float64)
    part = model.attention
    h = functional.gelu(functional.linear(bag, model.embed[0].weight, model.embed[0].bias))
    hidden = getattr(torch, activation)(functional.linear(h, part.V.weight, part.V.bias))
    if gated:
        hidden = hidden * functional.linear(h, part.U.weight, part.U.bias).sigmoid()
    scores = functional.linear(hidden, part.w.weight, part.w.bias)
    logits = model.classifier((scores.softmax(0).T @ h).flatten())
    output = model(PackedBags.pack([bag]))
    torch.testing.assert_close(output.scores, scores, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.logits[0], logits, rtol=1e-12, atol=1e-12)


def test_a_width_or_dropout_that_makes_no_sense_is_refused():
    for options, message in (
        ({"embed_dims": (8, 0)}, r"embed_dims\.1: .* must be at least 1"),
        ({"hidden": 0}, "hidden: .* must be at least 1"),
        ({"heads": 0}, "heads: .* must be at least 1"),
        ({"dropout": 1.5}, "dropout: .* must be less than 1"),
        ({"gate_dropout": -0.1}, "gate_dropout: .* must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Abmil(5, 3, **options)


def test_heads_are_concatenated():
    torch.manual_seed(0)
    model = Abmil(5, 3, embed_dims=(4,), heads=2, hidden=6, dropout=0.0)
    bag = torch.randn(7, 5)
    output = model(PackedBags.pack([bag]))
    instances = model.embed(bag)
    by_hand = functional.softmax(model.attention(instances), dim=0).T @ instances
    torch.testing.assert_close(output.embedding[0], by_hand.flatten())
