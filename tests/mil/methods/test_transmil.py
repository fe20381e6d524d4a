import pytest
import torch
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil import _attention as attention
from eosin.mil._nystrom import pseudo_inverse
from eosin.mil.bags import PackedBags
from eosin.mil.methods import mhim, packmil
from eosin.mil.methods.transmil import TokenLayout, TransMil


def small(**options):
    torch.manual_seed(0)
    return TransMil(6, 3, width=8, heads=4, **options).double()


def draw(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in lengths]


def test_outputs_and_gradients_are_the_authors(golden, same):
    golden = golden("transmil")
    model = TransMil(24, 2, width=16, heads=8, landmarks=8).double().eval()
    theirs = {
        name: name.replace("embed.0", "embed").replace("to_", "attn.to_").replace("res_conv", "attn.res_conv")
        for name in model.state_dict()
    }
    model.load_state_dict({name: golden[file].view(model.state_dict()[name].shape) for name, file in theirs.items()})
    x = golden["x"].requires_grad_()
    output = model(PackedBags.pack([x]))
    loss = functional.cross_entropy(output.logits, golden["label"])
    loss.backward()
    found = {"logits": output.logits, "prob": output.logits.softmax(1), "loss": loss, "grad.x": x.grad}
    for name, parameter in model.named_parameters():
        file = f"grad.{theirs[name]}"
        if file in golden:
            found[file] = parameter.grad.view(golden[file].shape)
    assert len(found) == 11
    same(found, golden, rtol=1e-8)


def plain_attention(layer, tokens, landmarks):
    """Equation 3 for one bag with every matrix written out; also the class token's weights."""
    heads, (count, width) = layer.heads, tokens.shape
    x = layer.norm(tokens)
    x = torch.cat([x.new_zeros(-count % landmarks, width), x])
    q, k, v = (part.view(len(x), heads, -1).transpose(0, 1) for part in layer.to_qkv(x).chunk(3, 1))  # (H, P, d)
    q = q * q.shape[2] ** -0.5
    marks_q, marks_k = (part.view(heads, landmarks, -1, part.shape[2]).mean(2) for part in (q, k))
    a1, a2, a3 = ((left @ right.mT).softmax(-1) for left, right in ((q, marks_k), (marks_q, marks_k), (marks_q, k)))
    whole = a1 @ pseudo_inverse(a2[None], layer.pinv_iterations)[0] @ a3  # (H, P, P)
    out = whole @ v + layer.res_conv(v[None])[0]
    out = layer.to_out(out.transpose(0, 1).flatten(1))[-count:]
    return tokens + out, whole[:, -count, -count:].T


def plain(model, bag):
    h = model.embed(bag)
    side = int(len(h) ** 0.5 - 1e-9) + 1 if len(h) else 0
    copies = side * side - len(h)
    in_bag = model.padding == "bag"
    tokens = torch.cat([model.cls_token, h, h[:copies] if in_bag else h[:0]])
    tokens, weights = plain_attention(model.layer1, tokens, model.landmarks)
    if side:
        body = tokens[1:] if in_bag else torch.cat([tokens[1:], tokens[1 : copies + 1]])
        if not in_bag and side < 7:
            body = torch.cat([body, body.new_zeros(49 - len(body), body.shape[1])])
            side = 7
        grid = body.T.reshape(1, -1, side, side)
        grid = grid + model.ppeg.conv7(grid) + model.ppeg.conv5(grid) + model.ppeg.conv3(grid)
        tokens = torch.cat([tokens[:1], grid.reshape(grid.shape[1], -1).T[: len(tokens) - 1]])
    tokens, _ = plain_attention(model.layer2, tokens, model.landmarks)
    body = weights[1:].clone()
    body[: len(body) - len(h)] += body[len(h) :]
    return model.classifier(model.norm(tokens[0])), body[: len(h)]


@pytest.mark.parametrize("rows", [2**15, 10])
@pytest.mark.parametrize(("landmarks", "padding"), [(None, "bag"), (5, "bag"), (5, "grid")])
def test_a_pack_is_its_bags_with_every_matrix_written_out(landmarks, padding, rows, monkeypatch):
    monkeypatch.setattr(attention, "CHECKPOINT_ROWS", rows)
    model = small(landmarks=landmarks, padding=padding).eval()
    bags = PackedBags.pack(draw(11, 1, 0, 60, 2, 16, 3))
    output = model(bags)
    wanted = [plain(model, bag) for bag in bags.unpack()]
    torch.testing.assert_close(output.logits, torch.stack([logits for logits, _ in wanted]))
    torch.testing.assert_close(output.weights, torch.cat([weights for _, weights in wanted]))
    for scores, (_, weights) in zip(bags.unpack(output.scores), wanted, strict=True):
        positive = weights > 1e-12
        torch.testing.assert_close(scores[positive].exp(), weights[positive])
        assert (scores[~positive] < -20).all()
    probe = torch.randn(7, 3, dtype=torch.float64)
    found = torch.autograd.grad((output.logits * probe).sum(), list(model.parameters()))
    by_hand = sum((logits * row).sum() for (logits, _), row in zip(wanted, probe, strict=True))
    for gradient, other in zip(found, torch.autograd.grad(by_hand, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, other)


def test_bags_of_a_pack_do_not_see_each_other():
    model = small().eval()
    bags = draw(9, 30, 2)
    before = model(PackedBags.pack(bags)).logits
    for changed in range(3):
        moved = [bag + (number == changed) for number, bag in enumerate(bags)]
        differs = (model(PackedBags.pack(moved)).logits - before).abs().amax(1) > 1e-12
        assert differs.tolist() == [number == changed for number in range(3)]


def test_scores_carry_a_gradient_to_the_attention():
    model = small()
    bags = PackedBags.pack(draw(12, 5))
    output = model(bags)
    bags.unpack(output.scores)[0].softmax(0).square().sum().backward()
    assert model.layer1.to_qkv.weight.grad.abs().sum() > 0
    assert model.cls_token.grad.isfinite().all()


def test_the_layout_repeats_the_first_instances():
    layout = TokenLayout.of((5, 0, 1), 4, torch.device("cpu"))
    assert layout.source.tolist() == [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 0, 0, 6]
    assert layout.first.tolist() == [0, 10, 11]
    assert layout.lengths == (10, 1, 2)
    assert layout.zeros.tolist() == [2, 3, 2]
    assert layout.copies.tolist() == [6, 7, 8, 9]
    assert layout.originals.tolist() == [1, 2, 3, 4]


def test_the_grid_may_have_the_repeats_for_itself():
    layout = TokenLayout.of((5, 0, 53), 4, torch.device("cpu"), padding="grid")
    assert layout.lengths == (6, 1, 54)
    assert not len(layout.copies)
    assert layout.grid == (10 + 3 + 11, 8)
    assert layout.placed[:9].tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert layout.placed_cell[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]  # rows of 7, in a grid that is 8 wide
    assert layout.placed[9:].tolist() == [*range(8, 61), *range(8, 19)]
    assert layout.body.tolist() == [*range(1, 6), *range(8, 61)]
    assert layout.cell[:5].tolist() == [0, 1, 2, 3, 4]


def test_presets_are_the_other_repositories():
    networks = {"mhim": mhim.NETWORKS, "mhim_v2": mhim.NETWORKS_V2, "packmil": packmil.NETWORKS}
    built = {name: TransMil(6, 3, width=16, **options["transmil"]) for name, options in networks.items()}
    assert isinstance(built["packmil"].embed[1], torch.nn.GELU)
    assert isinstance(built["mhim"].embed[1], torch.nn.ReLU)
    assert isinstance(built["mhim_v2"].embed[1], torch.nn.GELU)
    for model in built.values():
        assert model.padding == "grid"
        assert model.embed[2].p == 0.25
        assert not model.layer1.to_out.bias.any()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="3 heads do not divide the width 8"):
        TransMil(6, 3, width=8, heads=3)
    with pytest.raises(ConfigError, match=r"heads: .* must be at least 1"):
        TransMil(6, 3, width=8, heads=0)
    with pytest.raises(ConfigError, match="pinv_iterations 31 is more than 30"):
        TransMil(6, 3, width=8, heads=4, pinv_iterations=31)
