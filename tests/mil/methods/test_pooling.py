import pytest
import torch

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.methods.pooling import LsePooling
from eosin.mil.slots import AGGREGATORS


@pytest.mark.parametrize("mode", ["mean", "max", "lse"])
def test_pooling_is_the_formula_and_an_empty_bag_pools_to_zero(mode):
    bags = [torch.randn(5, 3), torch.randn(0, 3), torch.randn(1, 3)]
    sharpness = {"sharpness": 2.0} if mode == "lse" else {}
    model = AGGREGATORS.build(mode, 3, 2, options={"embed_dims": (), "dropout": 0.0} | sharpness)
    found = model(PackedBags.pack(bags)).embedding
    formula = {
        "mean": lambda bag: bag.mean(0),
        "max": lambda bag: bag.amax(0),
        "lse": lambda bag: (2 * bag).exp().mean(0).log() / 2,
    }[mode]
    torch.testing.assert_close(found[0], formula(bags[0]))
    torch.testing.assert_close(found[2], formula(bags[2]))
    assert not found[1].any()


def test_smooth_maximum_lies_between_mean_and_maximum():
    bag = torch.randn(9, 4)
    pooled = [
        LsePooling(4, 2, sharpness=r, embed_dims=(), dropout=0.0)(PackedBags.pack([bag])).embedding[0]
        for r in (1e-3, 3.0, 1e3)
    ]
    torch.testing.assert_close(pooled[0], bag.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(pooled[2], bag.amax(0), atol=5e-3, rtol=0)
    assert (pooled[0] <= pooled[1]).all()
    assert (pooled[1] <= pooled[2]).all()


def test_gradients_of_an_empty_bag_are_finite():
    model = LsePooling(3, 2, dropout=0.0)
    model(PackedBags.pack([torch.randn(0, 3), torch.randn(2, 3)])).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["mean", "max", "lse"])
def test_logits_of_instances_may_be_pooled(mode):
    torch.manual_seed(0)
    one, other = (AGGREGATORS.build(mode, 3, 2, options={"level": level}).eval() for level in ("embedding", "instance"))
    bags = PackedBags.pack([torch.randn(5, 3), torch.randn(1, 3), torch.randn(0, 3)])
    output = other(bags)
    by_hand = other.pool(other.classifier(other.embed(bags.values)), bags)
    torch.testing.assert_close(output.logits, by_hand)
    assert not output.logits[2].any()
    one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one(bags).embedding, output.embedding)
    torch.testing.assert_close(one(bags).logits[1], output.logits[1])  # a bag of one instance


def test_another_instance_never_lowers_the_highest_logit():
    torch.manual_seed(0)
    model = AGGREGATORS.build("max", 3, 1, options={"level": "instance"}).eval()
    bags = [torch.randn(n, 3) for n in (4, 9, 2)]
    more = [torch.cat([bag, 10 * torch.randn(3, 3)]) for bag in bags]
    assert (model(PackedBags.pack(more)).logits >= model(PackedBags.pack(bags)).logits).all()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match=r"sharpness: .* must be more than 0"):
        LsePooling(3, 2, sharpness=0.0)
    with pytest.raises(ConfigError, match=r"dropout: .* must be less than 1"):
        LsePooling(3, 2, dropout=2.0)
