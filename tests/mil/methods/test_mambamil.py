import pytest
import torch
from torch.nn import functional

from eosin.mil import _attention as attention
from eosin.mil.bags import PackedBags
from eosin.mil.methods import mambamil
from eosin.mil.methods.mambamil import MambaMil, MixerLayer


def small(**options):
    torch.manual_seed(0)
    sizes = {"width": 8, "d_state": 3, "dt_rank": 2, "hidden": 4, "rate": 3}
    return MambaMil(6, 3, **(sizes | options)).double()


def golden_names(layer):
    names = {}
    for name in layer.state_dict():
        file = name.replace("branches.0.", "").replace("branches.1.", "branch2_").replace(".", "_")
        names[name] = file
    return names


def load(layer, golden, prefix="w_"):
    names = {name: prefix + file for name, file in golden_names(layer).items()}
    shapes = layer.state_dict()
    layer.load_state_dict({name: golden[file].view(shapes[name].shape) for name, file in names.items()})


@pytest.mark.parametrize("channels", [2**24, 0])
@pytest.mark.parametrize(("file", "branches"), [("mamba_block", 1), ("srmamba_block", 2)])
def test_the_mixer_is_the_authors(golden, same, file, branches, channels, monkeypatch):
    """The block without norm and residual; in groups of 16 channels and at once."""
    monkeypatch.setattr(mambamil, "GROUP_ELEMENTS", channels)
    golden = golden(file)
    layer = MixerLayer(16, 32, branches=branches, d_state=8, d_conv=4, dt_rank=1).double()
    layer.norm = torch.nn.Identity()
    load(layer, golden)
    x = golden["x"].requires_grad_()
    bags = PackedBags.pack(list(x))
    orders = (
        (None, mambamil.strided_order(bags.cu_seqlens, int(golden["rate"])))[:branches] if branches == 2 else (None,)
    )
    out = (layer(bags.values, bags.cu_seqlens, orders) - bags.values).view(x.shape)
    (out * golden["R"]).sum().backward()
    found = {"out": out, "g_x": x.grad}
    for name, parameter in layer.named_parameters():
        file = f"g_{golden_names(layer)[name]}"
        found[file] = parameter.grad.view(golden[file].shape)
    same(found, golden)


def test_the_whole_model_is_the_authors(golden, same):
    golden = golden("mambamil_sr")
    model = MambaMil(24, 3, width=32, hidden=16, dt_rank=2).double().eval()
    names = {"embed.0": "embed", "norm": "final_norm", "attention.V": "att_hidden", "attention.w": "att_score"}
    names["classifier"] = "classifier"
    state = {
        f"{ours}.{part}": golden[f"w_{theirs}_{part}"] for ours, theirs in names.items() for part in ("weight", "bias")
    }
    for number, layer in enumerate(model.layers):
        for name, file in golden_names(layer).items():
            file = f"w_layer{number}_" + (file if file.startswith("norm") else f"mixer_{file}")
            state[f"layers.{number}.{name}"] = golden[file].view(layer.state_dict()[name].shape)
    model.load_state_dict(state)
    bag = golden["bag"].requires_grad_()
    output = model(PackedBags.pack([bag]))
    output.logits[0, 1].backward()
    hazards = output.logits.sigmoid()
    found = {
        "logits": output.logits,
        "prob": output.logits.softmax(1),
        "hazards": hazards,
        "survival": (1 - hazards).cumprod(1),
        "tokens_after_norm": output.instances[None],
        "att_raw": output.scores[None],
        "g_bag_logit1": bag.grad,
    }
    same(found, golden)


def plain_branch(branch, x, order):
    """Equation 2 for one bag, one step after the other; zeros where the order is padded."""
    x = torch.stack([x[row] if row >= 0 else torch.zeros_like(x[0]) for row in order])
    taps = branch.conv_weight.shape[1]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    c = functional.silu(sum(padded[j : j + len(x)] * branch.conv_weight[:, j] for j in range(taps)) + branch.conv_bias)
    step, b, read = branch.select_proj(c).split([branch.dt_proj.in_features, branch.d_state, branch.d_state], 1)
    delta, a = functional.softplus(branch.dt_proj(step)), -branch.A_log.exp()
    state, rows = x.new_zeros(a.shape), {}
    for t, row in enumerate(order):
        state = (delta[t][:, None] * a).exp() * state + (delta[t] * c[t])[:, None] * b[t]
        rows[row] = state @ read[t] + branch.D * c[t]
    return torch.stack([rows[row] for row in range(max(order) + 1)])


def second_order(kind, n, rate):
    if kind == "bi":
        return list(range(n))[::-1]
    k = -(-n // rate)
    rows = [(j % k) * rate + j // k for j in range(k * rate)]
    return [row if row < n else -1 for row in rows]


def plain(model, bag):
    h = functional.gelu(model.embed[0](bag))
    for layer in model.layers:
        x, z = layer.in_proj(layer.norm(h)).chunk(2, 1)
        orders = [list(range(len(h)))]
        if model.kind != "plain":
            orders.append(second_order(model.kind, len(h), model.rate))
        y = sum(plain_branch(branch, x, order) for branch, order in zip(layer.branches, orders, strict=True))
        h = h + layer.out_proj(y * functional.silu(z))
    h = model.norm(h)
    weights = model.attention.w(torch.tanh(model.attention.V(h))).softmax(0)
    return model.classifier((weights * h).sum(0))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bi", "sr"])
def test_a_pack_is_its_bags_step_by_step(kind, many, monkeypatch):
    if many:
        monkeypatch.setattr(attention, "CHECKPOINT_ROWS", 1)
        monkeypatch.setattr(mambamil, "GROUP_ELEMENTS", 0)
    model = small(kind=kind, expand=4)
    bags = PackedBags.pack([torch.randn(n, 6, dtype=torch.float64) for n in (7, 1, 2, 12)])
    found, wanted = model(bags).logits, torch.stack([plain(model, bag) for bag in bags.unpack()])
    torch.testing.assert_close(found, wanted)
    probe = torch.randn_like(found)
    parameters = list(model.parameters())
    gradients = zip(
        torch.autograd.grad((found * probe).sum(), parameters),
        torch.autograd.grad((wanted * probe).sum(), parameters),
        strict=True,
    )
    for first, second in gradients:
        torch.testing.assert_close(first, second)


def test_an_empty_bag_is_defined():
    output = small()(PackedBags.pack([torch.zeros(0, 6).double(), torch.ones(2, 6).double()]))
    assert output.logits.isfinite().all()
    torch.testing.assert_close(output.logits[0], small().classifier.bias)


def test_steps_start_as_mamba_or_as_the_authors():
    def steps(model):
        return torch.stack([functional.softplus(branch.dt_proj.bias) for branch in model.layers[0].branches])

    mamba = steps(small(width=64))
    assert 1e-3 <= mamba.min() < 2e-3 < 5e-2 < mamba.max() <= 0.1 + 1e-6
    assert torch.equal(mamba[0], mamba[1])
    halved = torch.full((2, 16), 2.0, dtype=torch.float64).log()
    torch.testing.assert_close(steps(small(dt_init="official")), halved)


def test_decay_rates_are_marked_for_the_optimizer():
    marked = {name.rsplit(".", 1)[1] for name, p in small().named_parameters() if getattr(p, "no_weight_decay", False)}
    assert marked == {"A_log", "D"}
