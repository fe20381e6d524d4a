import torch

from eosin.features._bag import FeatureSpec
from eosin.mil._data import MemoryBags
from eosin.mil._standardize import ROWS_PER_BAG, Standardized, Standardizer
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil


def source(*bags):
    return MemoryBags({str(i): bag for i, bag in enumerate(bags)}, FeatureSpec(encoder="toy", dim=bags[0].shape[1]))


def test_training_bags_get_mean_zero_and_deviation_one():
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([1e-3, 1.0, 1e5]), torch.tensor([50.0, 0.0, 1e7])
    bags = [torch.randn(n, 3, generator=generator) * scale + shift for n in (30, 0, 70)]
    standardizer = Standardizer.measure(source(*bags), ["0", "1", "2"])
    values = standardizer(PackedBags.pack(bags)).values
    torch.testing.assert_close(values.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(values.std(0, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)


def test_features_that_never_vary_are_ignored_whatever_they_do_later():
    bags = [torch.tensor([[1.0, 7.1], [2.0, 7.1]]), torch.tensor([[3.0, 7.1]])]
    standardizer = Standardizer.measure(source(*bags), ["0", "1"])
    values = standardizer(PackedBags.pack([torch.tensor([[1.0, 9e9]])])).values
    assert values[0, 1] == 0
    assert values.isfinite().all()


def test_only_the_named_bags_are_measured():
    bags = source(torch.zeros(2, 1), torch.ones(2, 1) * 100, torch.ones(2, 1) * 2)
    assert Standardizer.measure(bags, ["0", "2"]).mean.item() == 1.0


def test_a_large_bag_is_sampled_evenly():
    rows = torch.arange(20.0 * ROWS_PER_BAG)[:, None]
    standardizer = Standardizer.measure(source(rows), ["0"])
    torch.testing.assert_close(standardizer.mean, rows.mean(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(1 / standardizer.scale, rows.std(0), rtol=1e-3, atol=0)


def test_no_instances_leave_features_as_they_are():
    standardizer = Standardizer.measure(source(torch.zeros(0, 4)), ["0"])
    values = torch.randn(3, 4)
    assert torch.equal(standardizer(PackedBags.pack([values])).values, values)


def test_the_wrapped_model_keeps_its_capabilities():
    bags = [torch.randn(5, 4) * 100]
    model = Standardized(Standardizer.measure(source(*bags), ["0"]), Abmil(4, 2)).eval()
    pack = PackedBags.pack(bags)
    assert model.output_type is Abmil.output_type
    assert torch.equal(model(pack).logits, model.aggregator(model.standardizer(pack)).logits)
