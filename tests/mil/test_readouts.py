"""What every registered aggregator says of itself is true of it: its report sentence, its forms, single instances."""

import numpy as np
import pytest
import torch
from scenes import feature_bag

import eosin.mil.methods  # noqa: F401 - registers the methods
from eosin.heatmaps._findings import describe_method
from eosin.heatmaps._subject import look
from eosin.mil.bags import PackedBags
from eosin.mil.slots import AGGREGATORS
from eosin.mil.subsets import Target

DIM, N = 8, 13
SMALL = {
    "embed_dims": (8,), "width": 8, "hidden": 6, "branches": 3, "projection": 4, "landmarks": 4, "tokens": 3,
    "region_size": 2, "d_state": 4, "rank": 2, "feed_forward": 6, "variances": 3, "head_dim": 5,
}  # fmt: skip
HEADS = {"acmil_mha", "gdat", "ilra", "set_transformer", "transformer", "transmil"}
HOST = {"host": "abmil", "host_options": {"embed_dims": (8,), "hidden": 6}}
CASES = [
    # what a method that reads places answers depends on them, see test_places.py
    *((name, {}) for name in AGGREGATORS if not AGGREGATORS[name].reads_places),
    ("ins", {"pooling": "max"}),
    ("ins", {"pooling": "noisy_or"}),
    ("mean", {"level": "instance"}),
    ("max", {"level": "instance"}),
    ("lse", {"level": "instance"}),
    ("varmil", {"spread": "log"}),
    ("varmil", {"separate": True}),
    ("dsmil", {"prediction": "mean"}),
    ("dsmil", {"prediction": "mean", "embed_dims": (8,), "passing_v": True}),
]
LINEAR = {"abmil", "acmil", "clam_mb", "clam_sb", "mean", "owlora"}  # owlora around abmil


def build(name, options, n_outputs=2):
    torch.manual_seed(3)
    known = AGGREGATORS.defaults(name)
    small = {key: value for key, value in SMALL.items() if key in known}
    small |= {"heads": 2} if name in HEADS else {}
    small |= HOST if "host" in known else {}
    return AGGREGATORS.build(name, DIM, n_outputs, options=small | options).double().eval()


def features(seed=0, n=N):
    return np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)


def forward(model, rows):
    with torch.no_grad():
        return model(PackedBags.pack([torch.from_numpy(rows).double()])).logits[0].numpy()


class Calls:
    """Counts how often a model is run."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self.step)

    def step(self, module, inputs):
        self.count += 1

    def during(self, action):
        before = self.count
        action()
        return self.count - before


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_sentence_of_a_report_says_when_the_model_is_run(name, options):
    model = build(name, options)
    calls = Calls(model)
    subsets = look(model, feature_bag(features(), None)).subsets
    removed = calls.during(lambda: subsets.remove([0, 5]))
    each = calls.during(subsets.leave_one_out)
    if "the model run again on the tiles that remain" in subsets.how:
        assert removed
        assert each
    elif "run again where a tile is taken" in subsets.how:
        assert calls.during(lambda: subsets.remove([subsets.critical[0]])) == 1
        assert calls.during(lambda: subsets.remove(np.setdiff1d(np.arange(N), subsets.critical)[:3])) == 0
        assert 1 <= each <= 2  # once per critical tile
    else:
        assert subsets.how.startswith("All numbers are exact")
        assert removed == each == calls.during(subsets.only_one) == 0
        assert calls.during(lambda: subsets.greedy(Target(1), "min", 3)) == 0


@pytest.mark.parametrize(("name", "options"), CASES)
def test_only_models_that_are_linear_after_pooling_say_so(name, options):
    """A weighted mean of what tiles say alone lies between the least and the most that one of them says."""
    model = build(name, options)
    bags = [features(seed) * 3 for seed in range(12)]
    alone = [np.stack([forward(model, rows[i : i + 1]) for i in range(N)]) for rows in bags]
    whole = [forward(model, rows) for rows in bags]
    inside = all(
        (one >= each.min(0) - 1e-9).all() and (one <= each.max(0) + 1e-9).all()
        for one, each in zip(whole, alone, strict=True)
    )
    how = look(model, feature_bag(bags[0], None)).subsets.how
    assert ("is linear after" in how) == (name in LINEAR)
    assert inside or "is linear after" not in how


@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"pooling": "max"}, {"pooling": "noisy_or"}])
def test_what_ins_says_of_its_pooling_is_what_it_does(options):
    model = build("ins", options)
    rows = features()
    with torch.no_grad():
        each = model(PackedBags.pack([torch.from_numpy(rows).double()])).instance_logits
    chance = each.softmax(1)[:, 1]
    odds = forward(model, rows) @ [-1, 1]
    how = look(model, feature_bag(rows, None)).subsets.how
    claims = {
        "averages the probabilities of its tiles": torch.logit(chance.mean()),
        "the largest log-odds that any tile has": (each[:, 1] - each[:, 0]).max(),
        "whether any tile has the class": torch.logit(1 - (1 - chance).prod()),
    }
    said = [claim for claim in claims if claim in how]
    assert len(said) == 1
    assert odds == pytest.approx(claims[said[0]].item())


@pytest.mark.parametrize("level", ["embedding", "instance"])
def test_what_poolings_say_is_what_they_do(level):
    rows = features()
    values = torch.from_numpy(rows).double()
    for name, claim, pool in (
        ("max", "keeps the largest value of each channel", lambda x: x.amax(0)),
        ("lse", "a smooth maximum", lambda x: (5 * x).exp().mean(0).log() / 5),
        ("mean", "averaging its tiles", lambda x: x.mean(0)),
    ):
        model = build(name, {"level": level})
        embedded = model.embed(values)
        expected = model.classifier(pool(embedded)) if level == "embedding" else pool(model.classifier(embedded))
        assert claim in look(model, feature_bag(rows, None)).subsets.how
        np.testing.assert_allclose(forward(model, rows), expected.detach().numpy())


def test_no_two_forms_share_a_sentence():
    said = {}
    for name, options in CASES:
        seen = look(build(name, options), feature_bag(features(), None))
        sentence = describe_method(seen, seen.subsets.greedy(Target(1), "min", 1))
        said.setdefault(sentence, set()).add(type(seen.subsets).__name__)
    assert all(len(forms) == 1 for forms in said.values())


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("n_outputs", [1, 2, 3])
def test_each_tile_alone_is_the_model_on_that_tile(name, options, n_outputs):
    model = build(name, options, n_outputs)
    rows = features()
    subsets = look(model, feature_bag(rows, None)).subsets
    expected = [forward(model, rows[i : i + 1]) for i in range(N)]
    np.testing.assert_allclose(subsets.only_one(), expected, rtol=1e-8, atol=1e-10)
    if n_outputs == 1:
        wide = look(model, feature_bag(rows, None), single_logit_is_second_class=True).subsets.only_one()
        np.testing.assert_allclose(wide[:, 1], subsets.only_one()[:, 0])
        assert (wide[:, 0] == 0).all()


@pytest.mark.parametrize("options", [{}, {"embed_dims": (8,), "passing_v": True}])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_dsmil_by_the_mean_of_its_streams_is_exact(options, n_outputs):
    model = build("dsmil", {"prediction": "mean"} | options, n_outputs)
    rows = features()
    subsets = look(model, feature_bag(rows, None)).subsets
    assert not subsets.price
    expected = [forward(model, np.delete(rows, i, 0)) for i in range(N)]
    np.testing.assert_allclose(subsets.logits() + subsets.leave_one_out(), expected, rtol=1e-9, atol=1e-11)
    donor = look(model, feature_bag(features(7), None)).subsets
    both = np.concatenate([rows, features(7)[[2, 5]]])
    np.testing.assert_allclose(subsets.add(donor.select(np.array([2, 5]))), forward(model, both), rtol=1e-9)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_edits_of_a_viewer_are_the_model_on_what_is_left(name, options):
    model = build(name, options)
    rows, others = features(), features(9, 5)
    subsets = look(model, feature_bag(rows, None)).subsets
    donor = look(model, feature_bag(others, None)).subsets
    present, added = np.ones(N, dtype=bool), np.array([True, False, True, False, False])
    present[[1, 4]] = False
    np.testing.assert_allclose(subsets.edited(present), forward(model, rows[present]), rtol=1e-8, atol=1e-10)
    third, some = features(11, 4), np.array([False, True, True, False])
    more = look(model, feature_bag(third, None)).subsets
    for donors, rest in (([(donor, added)], []), ([(donor, added), (more, some)], [third[some]])):
        whole = np.concatenate([rows[present], others[added], *rest])
        np.testing.assert_allclose(subsets.edited(present, donors), forward(model, whole), rtol=1e-8, atol=1e-10)


def test_a_method_that_joined_as_in_0_1_is_still_exact():
    from eosin.mil._closed_forms import contributions, linear_terms
    from eosin.mil.methods.abmil import Abmil
    from eosin.mil.slots import Aggregator
    from eosin.mil.subsets import as_array

    class Mine(Abmil):
        readout = Aggregator.readout

    assert look(Mine(DIM, 2, embed_dims=(8,), hidden=6).double().eval(), feature_bag(features(), None)).subsets.price

    @contributions.register
    def _of_mine(model: Mine, output):
        return linear_terms("ne,ke->nk", output.instances, model.classifier.weight)[:, None], as_array(
            model.classifier.bias
        )

    assert look(Mine(DIM, 2, embed_dims=(8,), hidden=6).double().eval(), feature_bag(features(), None)).subsets.instant
