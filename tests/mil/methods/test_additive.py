import numpy as np
import pytest
import torch

from eosin.mil.bags import PackedBags
from eosin.mil.methods.additive import Additive


def bags_of(*lengths, dim=5):
    generator = torch.Generator().manual_seed(1)
    return PackedBags.pack([torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in lengths])


def test_outputs_and_gradients_are_the_authors(authors, same):
    wanted = authors("additive")
    model = Additive(8, 3, embed_dims=(), gated=False, hidden=5, head_dims=(6,), bias="tiles").double().eval()
    names = {
        "attention.V": "pointer.model.0",
        "attention.w": "pointer.model.2",
        "head.0": "classifier.model.0",
        "head.3": "classifier.model.2",
    }
    own = {key.removeprefix("state/"): value for key, value in wanted.items() if key.startswith("state/")}
    last = [key for key in own if key.startswith("classifier.model") and key.endswith("weight")][-1]
    names["head.3"] = last.removesuffix(".weight")
    model.load_state_dict(
        {f"{ours}.{part}": own[f"{his}.{part}"] for ours, his in names.items() for part in ("weight", "bias")}
    )
    x = wanted["x"].requires_grad_()
    output = model(PackedBags.pack([x]))
    output.logits.square().sum().backward()
    found = {"logits": output.logits, "evidence": output.instance_logits, "attention": output.scores.softmax(0)[:, 0]}
    same(found | {"grad_x": x.grad}, wanted)


@pytest.mark.parametrize("bias", ["bag", "tiles"])
def test_evidence_adds_up_to_the_prediction(bias):
    torch.manual_seed(0)
    model = Additive(5, 3, embed_dims=(6,), hidden=4, head_dims=(7, 4), bias=bias).double().eval()
    if model.bias is not None:
        torch.nn.init.normal_(model.bias)
    bags = bags_of(9, 1, 4)
    output = model(bags)
    sums = torch.stack([part.sum(0) for part in bags.unpack(output.instance_logits)])
    torch.testing.assert_close(sums + (0 if model.bias is None else model.bias), output.logits)


def test_without_biases_a_weight_passes_through_the_network():
    """What equation 2 says is what the sums of the exact form say, and it is not so with a bias in every layer."""
    torch.manual_seed(0)
    for bias, equal in (("bag", True), ("tiles", False)):
        model = Additive(5, 2, embed_dims=(), hidden=4, bias=bias).double().eval()
        rows = bags_of(6).values
        assert torch.allclose(model.head(0.3 * rows), 0.3 * model.head(rows)) is equal


def test_what_ifs_are_exact_with_a_bias_of_the_bag_only():
    torch.manual_seed(0)
    bag = bags_of(12)
    for bias in ("bag", "tiles"):
        model = Additive(5, 2, embed_dims=(6,), hidden=4, bias=bias).double().eval()
        with torch.no_grad():
            form = model.readout(bag, model(bag))
            without = [model(bag.select(torch.arange(12) != i)).logits[0].numpy() for i in range(12)]
        if bias == "tiles":
            assert form is None
        else:
            np.testing.assert_allclose(form.logits() + form.leave_one_out(), without, rtol=1e-9, atol=1e-12)
