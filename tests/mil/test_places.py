"""Where tiles lie, from the feature file to the model."""

import numpy as np
import pytest
import torch
from scenes import feature_bag

from eosin.errors import ConfigError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import find_bags, write_bag
from eosin.heatmaps._subject import look
from eosin.mil._data import FeatureFolder, MemoryBags, PatientBags, make_examples
from eosin.mil._evaluate import predict_outputs
from eosin.mil._feed import DeviceBags, pack_bags
from eosin.mil._recipe import Recipe
from eosin.mil._tables import LabelTable
from eosin.mil._train import fit
from eosin.mil.bags import SLIDE_GAP, PackedBags, side_by_side
from eosin.mil.slots import AGGREGATORS, Aggregator, AggregatorOutput
from eosin.mil.task import make_task
from eosin.wsi._grid import TileGrid, Tiling

SPEC = FeatureSpec(encoder="toy", dim=4)


class Corner(Aggregator):
    """Answers with the sum of all places."""

    reads_places = True

    def __init__(self, in_dim, n_outputs):
        super().__init__(in_dim, n_outputs, embed_dim=in_dim)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, bags):
        places = self.require_places(bags).to(bags.values)
        sums = torch.stack([part.sum() for part in bags.unpack(places)])[:, None] * self.scale
        return AggregatorOutput(sums.expand(-1, self.n_outputs), sums.expand(-1, self.embed_dim))


def grid(mpp0, overlap=0):
    """Six tiles of a slide of this resolution, the first two columns of a 3 x 2 rectangle."""
    tiling = Tiling(mpp=0.5, patch_size=40, overlap=overlap)
    step = tiling.step_px0(mpp0)
    cells = np.array([(x, y) for y in range(3) for x in range(2)])
    origins = np.rint(cells * step).astype(np.int64) + 400
    return TileGrid(origins, round(40 * 0.5 / mpp0), tiling, (4000, 4000), mpp0), cells


@pytest.mark.parametrize("mpp0", [0.5, 0.25, 0.2325])
@pytest.mark.parametrize("overlap", [0, 10])
def test_neighbours_are_one_apart_on_every_slide(mpp0, overlap):
    tiles, cells = grid(mpp0, overlap)
    assert tiles.places().dtype == np.float32
    np.testing.assert_allclose(tiles.places(), cells, atol=0.02)  # origins are whole pixels


def test_an_empty_grid_has_no_places():
    empty = TileGrid(np.zeros((0, 2), np.int64), 40, Tiling(mpp=0.5, patch_size=40), (100, 100), 0.5)
    assert empty.places().shape == (0, 2)


def test_slides_of_a_bag_lie_side_by_side():
    first, second = torch.tensor([[0.0, 0.0], [5.0, 1.0]]), torch.tensor([[2.0, 7.0], [3.0, 0.0]])
    both = side_by_side([first, torch.zeros(0, 2), second])
    assert both[:2].tolist() == first.tolist()
    assert both[2:].tolist() == [[5.0 + SLIDE_GAP, 7.0], [6.0 + SLIDE_GAP, 0.0]]


def cohort(folder, names):
    for number, name in enumerate(names):
        tiles, _ = grid(0.25 * (1 + number % 2))
        values = np.random.default_rng(number).normal(size=(6, 4)).astype(np.float32)
        spec = SPEC.model_copy(update={"mpp": 0.5, "patch_size": 40})
        write_bag(folder / f"{name}.h5", FeatureBag(values, spec, name, tiles, {}))
    return FeatureFolder(find_bags(folder))


def test_packs_have_them_where_they_are_asked_for(tmp_path):
    source = cohort(tmp_path, ["a", "b"])
    assert pack_bags(source, ["a", "b"]).places is None
    pack = pack_bags(DeviceBags(source, torch.device("cpu"), 0), ["a", "b"], places=True)
    assert torch.equal(pack.places, torch.cat([source.places("a"), source.places("b")]))
    sample = pack_bags(source, ["a"], most_per_bag=3, generator=torch.Generator().manual_seed(0), places=True)
    for row, place in zip(sample.values, sample.places, strict=True):
        (number,) = (source.load("a") == row).all(1).nonzero()[0]
        assert torch.equal(place, source.places("a")[number])


def test_instances_keep_their_places_when_bags_change():
    pack = PackedBags.pack([torch.randn(4, 2), torch.randn(2, 2)], places=[torch.rand(4, 2), torch.rand(2, 2)])
    keep = torch.tensor([True, False, True, True, False, True])
    assert torch.equal(pack.select(keep).places, pack.places[keep])
    assert torch.equal(pack.with_values(torch.randn(6, 7)).to("cpu", torch.float64).places, pack.places)
    with pytest.raises(ValueError, match="3 coordinates for 6 instances"):
        PackedBags(pack.values, pack.cu_seqlens, pack.lengths, places=torch.zeros(3, 2))


def test_a_patient_has_those_of_all_slides(tmp_path):
    source = cohort(tmp_path, ["a", "b"])
    patients = PatientBags(source, {"p": ["a", "b"]})
    assert torch.equal(patients.places("p"), side_by_side([source.places("a"), source.places("b")]))
    rows = torch.tensor([source.length("a") + 1, 0, 2])
    assert torch.equal(patients.load("p", rows), patients.load("p")[rows])
    torch.manual_seed(0)
    task = make_task("binary", [{"label": "n"}, {"label": "p"}])
    said = predict_outputs(Corner(4, 1), task, patients, ["p"])
    assert said.shape == (1, 2)


def test_what_ifs_keep_the_places_of_what_remains_and_put_a_donor_aside():
    tiles, _ = grid(0.5)
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    bag = FeatureBag(rows, SPEC, "s", tiles, {})
    subsets = look(Corner(4, 1).double(), bag).subsets
    places = torch.from_numpy(tiles.places()).double()
    assert subsets.logits()[0] == pytest.approx(places.sum().item())
    assert subsets.remove([0, 3])[0] == pytest.approx(places[[1, 2, 4, 5]].sum().item())
    together = subsets.add(subsets.select(np.array([5])))[0]
    assert together == pytest.approx(side_by_side([places, places[[5]]]).sum().item())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("patch_gcn", {"width": 8}),
        ("wikg", {"edges": "near", "width": 8}),
        ("transformer", {"positions": "alibi", "heads": 2}),
    ],
)
def test_what_ifs_of_methods_that_read_places_are_the_model_on_what_remains(name, options):
    tiles, _ = grid(0.5)
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    known = AGGREGATORS.defaults(name)
    model = AGGREGATORS.build(
        name, 4, 2, options={key: value for key, value in options.items() if key in known}
    ).double()
    subsets = look(model.eval(), FeatureBag(rows, SPEC, "s", tiles, {})).subsets
    places = torch.from_numpy(tiles.places()).double()

    def answer(kept):
        with torch.no_grad():
            return model(PackedBags.pack([torch.from_numpy(rows[kept]).double()], places=[places[kept]])).logits[0]

    np.testing.assert_allclose(subsets.remove([0, 3]), answer([1, 2, 4, 5]), rtol=1e-9)
    np.testing.assert_allclose(subsets.only_one()[2], answer([2]), rtol=1e-9)
    np.testing.assert_allclose(subsets.logits() + subsets.leave_one_out()[5], answer([0, 1, 2, 3, 4]), rtol=1e-9)


def test_features_without_coordinates_are_refused_before_training():
    bags = {name: torch.randn(5, 4) for name in "abcd"}
    table = LabelTable(tuple("abcd"), tuple("abcd"), {"label": ("n", "p", "n", "p")})
    task = make_task("classification", table.rows())
    source = MemoryBags(bags, SPEC, places={"a": torch.zeros(5, 2)})
    recipe = Recipe.parse(
        {
            "aggregator": {"name": "transformer", "options": {"positions": "alibi", "width": 8, "heads": 2}},
            "training": {"select": "last", "epochs": 1, "refit": False},
        }
    )
    with pytest.raises(ConfigError, match="the features of b, c, d have no tile coordinates"):
        fit(recipe, task, make_examples(source, table, task))
    with pytest.raises(ConfigError, match="have no places"):
        look(
            AGGREGATORS.build("transformer", 4, 2, options={"positions": "alibi"}),
            feature_bag(np.zeros((3, 4), np.float32), None),
        )


def test_training_and_prediction_read_the_same_places(tmp_path):
    source = cohort(tmp_path, ["a", "b", "c", "d"])
    table = LabelTable(tuple("abcd"), tuple("abcd"), {"label": ("n", "p", "n", "p")})
    task = make_task("classification", table.rows())
    recipe = Recipe.parse(
        {
            "aggregator": {"name": "transformer", "options": {"positions": "alibi", "width": 8, "heads": 2}},
            "training": {"select": "last", "epochs": 2, "refit": False},
        }
    )
    fitted = fit(recipe, task, make_examples(source, table, task))
    assert fitted.model.reads_places
    said = predict_outputs(fitted.model, task, source, ["a"])
    bag = PackedBags.pack([source.load("a").float()], places=[source.places("a")])
    np.testing.assert_allclose(said, task.activate(fitted.model(bag).logits.detach()), rtol=1e-6)
