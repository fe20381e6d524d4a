import pytest
import torch
from torch.nn import functional

from eosin.mil.bags import PackedBags
from eosin.mil.methods.dtfd import Dtfd, DtfdFirstTier
from eosin.mil.tasks._classification import Classification

NAMES = {
    "embed.0": "dim_reduction.fc1",
    "first_classifier": "classifier.fc",
    "classifier": "att_classifier.classifier.fc",
}
PARTS = {"V": "attention_V.0", "U": "attention_U.0", "w": "attention_weights"}


@pytest.mark.parametrize(("distillation", "their"), [("afs", "AFS"), ("max", "MaxS"), ("maxmin", "MaxMinS")])
def test_both_tiers_are_the_authors(authors, same, distillation, their):
    wanted = authors("dtfd")
    model = Dtfd(7, 2, embed_dims=(8,), hidden=5, groups=3, distillation=distillation).double().eval()
    names = dict(NAMES)
    for ours, theirs in (("first", "attention"), ("second", "att_classifier.attention")):
        names |= {f"{ours}.{part}": f"{theirs}.{name}" for part, name in PARTS.items()}
    state = {
        f"{ours}.{part}": wanted.get(f"state/{his}.{part}")
        for ours, his in names.items()
        for part in ("weight", "bias")
    }
    model.load_state_dict({key: value for key, value in state.items() if value is not None})
    output = model(PackedBags.pack([wanted["x"]]))
    same({"pseudo": output.pseudo_logits[0], f"logits_{their}": output.logits}, wanted)


@pytest.mark.parametrize("distillation", ["afs", "max", "maxmin"])
def test_scores_are_the_weights_that_make_the_bag(distillation):
    torch.manual_seed(0)
    model = Dtfd(5, 2, embed_dims=(6,), hidden=4, groups=3, distillation=distillation, kept=2).double().eval()
    bags = PackedBags.pack([torch.randn(n, 5, dtype=torch.float64) for n in (10, 2, 1)])
    output = model(bags)
    for bag, scores, rows in zip(
        output.embedding, bags.unpack(output.scores), bags.unpack(output.instances), strict=True
    ):
        torch.testing.assert_close(scores.softmax(0).T @ rows, bag[None])


def test_pseudo_bags_are_drawn_in_training_and_dealt_in_evaluation():
    model = Dtfd(5, 2, embed_dims=(6,), groups=3)
    bags = PackedBags.pack([torch.randn(n, 5) for n in (10, 2)])
    order, counts = model.eval()._dealt(bags)
    assert counts.tolist() == [[4, 3, 3], [1, 1, 0]]
    assert order.tolist() == [0, 3, 6, 9, 1, 4, 7, 2, 5, 8, 10, 11]
    torch.manual_seed(0)
    drawn, counts = model.train()._dealt(bags)
    assert counts.tolist() == [[4, 3, 3], [1, 1, 0]]
    assert sorted(drawn[:10].tolist()) == list(range(10))
    assert drawn[:10].tolist() != order[:10].tolist()


def test_the_first_tier_has_the_labels_of_the_slides():
    torch.manual_seed(0)
    task = Classification(classes=("a", "b"))
    model = Dtfd(5, 2, embed_dims=(6,), groups=3).eval()
    bags, target = PackedBags.pack([torch.randn(n, 5) for n in (10, 2)]), torch.tensor([1, 0])
    output = model(bags)
    logits = torch.cat([output.pseudo_logits[0], output.pseudo_logits[1, :2]])
    wanted = functional.cross_entropy(logits, torch.tensor([1, 1, 1, 0, 0]))
    torch.testing.assert_close(DtfdFirstTier(model, task)(output, bags, target), wanted)
