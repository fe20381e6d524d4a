import pytest
import torch
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.kernels import segment_topk_mask
from eosin.mil._recipe import RECIPES
from eosin.mil.bags import PackedBags
from eosin.mil.methods import mhim, packmil
from eosin.mil.methods.clam import ClamSingleBranch
from eosin.mil.methods.dsmil import Dsmil, DsmilMax
from eosin.mil.slots import AGGREGATORS
from eosin.mil.tasks._classification import Classification

TASK = Classification(classes=("a", "b", "c"))


def test_outputs_and_gradients_are_the_authors(golden, same, complete):
    golden = golden("dsmil")
    model = Dsmil(32, 2, hidden=16).double()
    names = {
        "instance_classifier": "instance_classifier",
        "query.0": "query.0",
        "query.1": "query.2",
        "bag_conv": "classifier",
    }
    files = {f"{ours}.{part}": f"{theirs}.{part}" for theirs, ours in names.items() for part in ("weight", "bias")}
    model.load_state_dict(
        {
            ours: golden[theirs].flatten(1) if ours == "classifier.weight" else golden[theirs]
            for ours, theirs in files.items()
        }
    )
    x = golden["x"].requires_grad_()
    output = model(PackedBags.pack([x]))
    largest = output.instance_logits.amax(0)
    loss = sum(
        functional.binary_cross_entropy_with_logits(logits, golden["label"][0]) / 2
        for logits in (output.logits[0], largest)
    )
    loss.backward()
    found = {
        "instance_logits": output.instance_logits,
        "attention": output.scores.softmax(0),
        "bag_features": output.embedding.view(2, 32),
        "bag_logits": output.logits,
        "max_logits": largest,
        "loss": loss,
        "grad.x": x.grad,
    }
    for name, parameter in model.named_parameters():
        theirs = f"grad.{files[name]}"
        found[theirs] = parameter.grad.view(golden[theirs].shape)
    critical = segment_topk_mask(output.instance_logits, PackedBags.pack([x]).cu_seqlens, 1)
    found["critical_index"] = critical.float().argmax(0)
    same(found, golden)
    complete(golden, {*found, *files.values(), "x", "label"})


@pytest.mark.parametrize("passing_v", [False, True])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_a_pack_is_its_bags_by_hand(nonlinear, passing_v):
    torch.manual_seed(0)
    model = Dsmil(5, 3, embed_dims=(6,), hidden=4, nonlinear=nonlinear, passing_v=passing_v, value_dropout=0.5).eval()
    bags = PackedBags.pack([torch.randn(n, 5) for n in (9, 1, 4)])
    output = model(bags)
    for number, bag in enumerate(bags.unpack()):
        h = functional.relu(model.embed[0](bag))
        critical = model.instance_classifier(h).argmax(0)
        q = model.query(h)
        weights = (q @ q[critical].T / 2).softmax(0)
        values = functional.relu(model.value[1](h)) if passing_v else h
        torch.testing.assert_close(output.logits[number], model.classifier((weights.T @ values).flatten()))


def test_the_first_of_tied_instances_is_critical():
    model = Dsmil(2, 1, hidden=3)
    with torch.no_grad():
        model.instance_classifier.weight.copy_(torch.tensor([[1.0, 0.0]]))
    bag = torch.tensor([[1.0, 5.0], [1.0, -5.0], [0.0, 0.0]])
    query = model.query(bag)
    torch.testing.assert_close(model(PackedBags.pack([bag])).scores[:, 0], query @ query[0] * 3**-0.5)


def test_the_maximum_term_is_the_tasks_loss():
    torch.manual_seed(0)
    model = Dsmil(5, 3, hidden=4)
    term = DsmilMax(model, TASK)
    bags = PackedBags.pack([torch.randn(4, 5), torch.randn(2, 5)])
    output, target = model(bags), torch.tensor([2, 0])
    largest = torch.stack([part.amax(0) for part in bags.unpack(output.instance_logits)])
    torch.testing.assert_close(term(output, bags, target), functional.cross_entropy(largest, target))


def test_both_streams_may_predict_together():
    torch.manual_seed(0)
    one, both = Dsmil(5, 3, hidden=4), Dsmil(5, 3, hidden=4, prediction="mean")
    both.load_state_dict(one.state_dict())
    bags = PackedBags.pack([torch.randn(n, 5) for n in (4, 2, 0)])
    output = one(bags)
    largest = torch.stack(
        [part.amax(0) if len(part) else torch.zeros(3) for part in bags.unpack(output.instance_logits)]
    )
    torch.testing.assert_close(both(bags).logits, (output.logits + largest) / 2)


def test_presets_embed_first_and_pool_a_projection():
    for options in (mhim.NETWORKS["dsmil"], mhim.NETWORKS_V2["dsmil"], packmil.NETWORKS["dsmil"]):
        model = AGGREGATORS.build("dsmil", 20, 2, options=options)
        assert model.embed[0].out_features == 512
        assert len(model.value) == 3
    assert AGGREGATORS.build("dsmil", 20, 2, options=mhim.NETWORKS_V2["dsmil"]).prediction == "mean"
    with pytest.raises(ConfigError, match=r"hidden: .* must be at least 1"):
        Dsmil(5, 3, hidden=0)


def test_the_recipe_starts_without_an_opinion():
    recipe = RECIPES["dsmil"]
    bags = PackedBags.pack([100 * torch.randn(7, 5)])
    fresh = AGGREGATORS.build("dsmil", 5, 3, options=recipe.aggregator.options)(bags)
    assert not fresh.logits.any()
    assert not fresh.instance_logits.any()
    assert fresh.scores.any()
    loud = Dsmil(5, 3)(bags)
    assert loud.instance_logits.abs().amax() > 10


def test_the_term_needs_instance_logits():
    with pytest.raises(ConfigError, match="returns DsmilOutput; ClamSingleBranch returns AttentionOutput"):
        DsmilMax(ClamSingleBranch(5, 3), TASK)
