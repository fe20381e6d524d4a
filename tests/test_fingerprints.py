"""Change each input of each stage and see its result made again; change nothing and see it kept."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scenes import write_slide

from eosin._files import write_json
from eosin._fingerprints import STAGES, fingerprint, source_hash
from eosin._records import Report
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._encoding import Extraction
from eosin.features._store import write_bag
from eosin.heatmaps._counterfactual import Effect
from eosin.heatmaps._examination import Questions
from eosin.mil._checkpoint import ModelCard, load_model, save_model
from eosin.mil._data import Examples, MemoryBags
from eosin.mil._predict import predict
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._resume import STATE
from eosin.mil._seen import Sight
from eosin.mil._train import fit
from eosin.mil.methods.abmil import Abmil
from eosin.mil.slots import AGGREGATORS
from eosin.mil.tasks._classification import Classification
from eosin.pipeline._cohort_answers import Answers, AskInMemory, AskStage, Question
from eosin.pipeline._embed import EmbedderChoice, EmbedStage, Group
from eosin.pipeline._question import DonorFile
from eosin.pipeline._run import Drawing, DrawStage
from eosin.wsi._coordinates import read_footer, read_grid
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, TissueTiles, tile_slides
from eosin.wsi._quality import QualityLimits
from eosin.wsi._slide_file import SlideFile
from eosin.wsi._tissue import TissueOptions

PLUGIN = """
from eosin.mil.methods.pooling import MeanPooling
from eosin.mil.slots import AGGREGATORS

@AGGREGATORS.register("of_a_user")
class OfAUser(MeanPooling):
    VERSION = {version}
"""


@dataclass
class Training_:
    """What one training is made from."""

    epochs: int = 2
    classes: tuple[str, ...] = ("a", "b")
    shift: float = 0.0
    patients: tuple[str, ...] = tuple("abcdefgh")
    targets: tuple[int, ...] = (0, 1) * 4
    n_train: int = 4
    precision: str = "fp32"
    plugin: int = 0
    encoder: str = "toy"
    teacher: int | None = None
    places: bool = False
    moved: float = 0.0

    def run(self, folder: Path) -> bool:
        """Train; return whether a pass was made."""
        generator = torch.Generator().manual_seed(0)
        bags = {name: torch.randn(3, 6, generator=generator) for name in "stuvwxyz"}
        bags["s"][2, 5] += self.shift
        places = {name: torch.arange(6.0).reshape(3, 2) + self.moved for name in bags}
        source = MemoryBags(bags, FeatureSpec(encoder=self.encoder, dim=6), places=places)
        examples = Examples(source, tuple(bags), self.patients, torch.tensor(self.targets))
        load_plugin(folder.parent, self.plugin)
        recipe = self.recipe(folder)
        train, val = examples.subset("stuvwxyz"[: self.n_train]), examples.subset("stuvwxyz"[4:])
        passes: list[object] = []
        fit(
            recipe, Classification(classes=self.classes), train, val,
            folder=folder, device="cpu", precision=self.precision, progress=passes.append, state_interval_s=0,
        )  # fmt: skip
        return bool(passes)

    def recipe(self, folder: Path) -> Recipe:
        """Return a recipe, which starts from a model in a folder if there is a teacher."""
        training = Training(epochs=self.epochs, standardize=False, lr=0.1)
        if self.places:
            options = {"width": 8, "heads": 2, "feed_forward": 8, "positions": "sincos"}
            return Recipe(aggregator=Component(name="transformer", options=options), training=training)
        if self.teacher is None:
            return Recipe(aggregator=Component(name="of_a_user"), training=training)
        Predict(seed=self.teacher).save(folder.parent)
        strategy = Component(name="mhim", options={"init_from": folder.parent / "model"})
        return Recipe(aggregator=Component(name="abmil"), strategy=strategy, training=training)


def load_plugin(folder: Path, version: int) -> None:
    """Define an aggregator in a module outside the package."""
    name = f"plugin_{folder.name}"
    (folder / f"{name}.py").write_text(PLUGIN.format(version=version))
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    sys.dont_write_bytecode = True
    importlib.import_module(name)


@pytest.fixture(autouse=True)
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(AGGREGATORS, "_items", dict(AGGREGATORS._items))


def paint(path: Path, seed: int, down: int = 2) -> None:
    """Write a slide of pink noise on glass."""
    if path.with_suffix(f".{seed}").exists():
        return
    rng = np.random.default_rng(seed)
    pixels = np.full((1024, 1024, 3), 245, np.uint8)
    pixels[200:800, 200:800] = np.array([200, 90, 150]) + rng.integers(-40, 40, (600, 600, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_slide(path, pixels, mpp=0.5, downsamples=(down,))
    path.with_suffix(f".{seed}").touch()


@dataclass
class Tile:
    """What the tiles of one slide are made from, and what features are made from them."""

    seed: int = 0
    slide_mpp: float | None = None
    scene: int | None = None
    min_tissue: float = 0.25
    min_area_um2: float = 1000.0
    quality: tuple[str, float] = ("max_pen", 0.9)
    outline: int = 0
    encoder: str = "he_texture"
    weights: str = "aa"

    def tile(self, folder: Path) -> Report:
        path = folder / "slides" / "s.tiff"
        paint(path, self.seed)
        contours = None
        if self.outline:
            contours = folder / f"contours_{self.outline}"
            write_json(contours / "s.geojson", square(100.0 * self.outline))
        return tile_slides(
            [SlideFile(path, "s", self.slide_mpp, self.scene)],
            JobFolder(folder / "job"),
            TissueTiles(
                Tiling(mpp=0.5, patch_size=128, min_tissue=self.min_tissue),
                TissueOptions(min_area_um2=self.min_area_um2),
                QualityLimits.parse(dict([self.quality]), source="test"),
                contours=contours,
            ),
        )

    def run(self, folder: Path) -> bool:
        """Tile; return whether it was done now."""
        report = self.tile(folder)
        assert not report.failed, report.failed
        return report.count("skipped") == 0


def square(side: float) -> dict[str, Any]:
    ring = [[200, 200], [700 + side, 200], [700 + side, 700], [200, 700], [200, 200]]
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}


class Extract(Tile):
    """Features of these tiles."""

    def run(self, folder: Path) -> bool:
        """Encode; return whether it was done now."""
        self.tile(folder)
        run = Extraction(JobFolder(folder / "job"), Tiling(mpp=0.5, patch_size=128).folder, StandIn(self))
        slide = SlideFile(folder / "slides" / "s.tiff", "s")
        if run.is_done(slide):
            return False
        grid = read_grid(run.patches(slide))
        rows = np.zeros((grid.n_tiles, 4), np.float32)
        write_bag(run.output(slide), run.bag(slide, grid, read_footer(run.patches(slide)), rows))
        return True


class StandIn:
    """What `Extraction` asks an encoder."""

    dim, revision, compiled, precision = 4, "", False, "fp32"

    def __init__(self, scene: Tile) -> None:
        self.spec = SimpleNamespace(name="toy")
        self.weights_hash, self._transform = scene.weights, scene.encoder

    def describe(self) -> dict[str, str]:
        return {"transform": self._transform}


@dataclass
class Predict:
    """What a row of predictions is made from."""

    seed: int = 0
    threshold: float | None = None
    shift: float = 0.0
    edit: bool = False

    def run(self, folder: Path) -> bool:
        """Predict; return whether the row was made now."""
        spec = self.save(folder)
        rows = np.random.default_rng(0).random((3, 6), np.float32) + np.float32(self.shift)
        write_bag(folder / "s.h5", FeatureBag(rows, spec, "s"))
        out = folder / "out.csv"
        if self.edit and out.exists():
            out.write_text(out.read_text().replace("ok,", "ok,well done", 1))
        made = predict([folder / "model"], {"s": folder / "s.h5"}, out).count("skipped") == 0
        self.edit = False
        return made

    def save(self, folder: Path) -> FeatureSpec:
        """Write the folder of the model."""
        torch.manual_seed(self.seed)
        spec = FeatureSpec(encoder="toy", dim=6)
        task = Classification(classes=("a", "b"), threshold=self.threshold)
        card = ModelCard(
            recipe=Recipe(training=Training(standardize=False)), task=task.model_dump(mode="json"), features=spec
        )
        save_model(folder / "model", Abmil(6, 2), card)
        return spec


@dataclass
class Embed:
    """What a vector of a slide is made from."""

    seed: int = 0
    shift: float = 0.0
    encoder: str = "mean"
    per: str = "slide"

    def run(self, folder: Path) -> bool:
        """Make the vector; return whether it was made now."""
        spec = Predict(seed=self.seed).save(folder)
        write_bag(folder / "features/s.h5", FeatureBag(np.full((3, 6), 1 + self.shift, np.float32), spec, "s"))
        model = folder / "model" if self.encoder == "model" else None
        stage = EmbedStage(EmbedderChoice("mean" if model else self.encoder, model), folder / "out", self.per)
        item = Group("s", (folder / "features/s.h5",))
        if stage.is_done(item):
            return False
        stage.do(item)
        return True


@dataclass
class Map:
    """What the files of a map are made from; drawing itself is another test's."""

    threshold: float | None = None
    features: bytes = b"features"
    slide: bytes = b"slide"
    slide_mpp: float | None = None
    formats: tuple[str, ...] = ("png",)
    cut: bool = False

    def run(self, folder: Path) -> bool:
        """Draw where it is needed; return whether it was."""
        Predict(threshold=self.threshold).run(folder)
        for name, data in (("s.h5", self.features), ("s.tiff", self.slide)):
            (folder / name).write_bytes(data)
        slide = SlideFile(folder / "s.tiff", "s", self.slide_mpp)
        item = Drawing(slide, folder / "s.h5", folder / "model", folder, self.formats)
        if self.cut:
            (folder / "s_alone.png").write_bytes(b"half")
        if DrawStage().is_done(item):
            return False
        files = [folder / f"s_alone.{name}" for name in self.formats]
        for path in files:
            path.write_bytes(b"picture")
        write_json(item.note, item.origin(files))
        self.cut = False
        return True


@dataclass
class Ask(Map):
    """What the answers of one slide of a cohort are made from; asking itself is another test's."""

    regions: bytes = b"regions"
    donor: bytes = b"donor"
    seed: int = 0
    class_name: str = "a"
    region_classes: tuple[str, ...] = ()

    def run(self, folder: Path) -> bool:
        """Write the answers where it is needed; return whether it was."""
        Predict(threshold=self.threshold).run(folder)
        for name, data in (
            ("s.h5", self.features), ("s.tiff", self.slide), ("s.geojson", self.regions), ("d.h5", self.donor)
        ):  # fmt: skip
            (folder / name).write_bytes(data)
        slide = SlideFile(folder / "s.tiff", "s", self.slide_mpp)
        item = Question("s", folder / "s.h5", folder, slide, folder / "s.geojson")
        donors = (DonorFile(folder / "d.h5"),)
        questions = Questions(seed=self.seed)
        stage = AskStage(folder / "model", self.class_name, {}, self.region_classes, donors, questions, self.formats)
        if self.cut:
            item.note.write_text(item.note.read_text().replace("0.25", "0.75", 1))
        if stage.is_done(item):
            return False
        answers = Answers({}, [Effect("remove", "tiles", 1, 0.25, 0.5)], [], [], Sight(), "")
        stage.write(item, answers)
        self.cut = False
        return True


@dataclass
class Scene:
    """One stage, and for each of its inputs another value of it."""

    make: Callable[..., Any]
    changes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


SLIDE = {
    "slide": [{"seed": 1}],
    "slide_mpp": [{"slide_mpp": 0.49}],
}

SCENES = {
    "tile": Scene(
        Tile,
        {
            **SLIDE,
            "picture": [{"scene": 1}],
            "tiling": [{"min_tissue": 0.5}],
            "tissue": [{"min_area_um2": 2000.0}],
            "quality": [{"quality": ("max_pen", 0.8)}],
            "outline": [{"outline": 1}],
        },
    ),
    "extract": Scene(
        Extract,
        {
            "slide": [{"seed": 1}],
            "tiles": [{"min_tissue": 0.9}, {"slide_mpp": 0.49}, {"outline": 1}],
            "encoder": [{"encoder": "he_texture of another transform"}],
            "weights": [{"weights": "bb"}],
        },
    ),
    "predict": Scene(
        Predict, {"models": [{"seed": 1}, {"threshold": 0.9}], "features": [{"shift": 0.1}], "row": [{"edit": True}]}
    ),
    "embed": Scene(
        Embed,
        {
            "features": [{"shift": 0.1}],
            "encoder": [{"encoder": "max"}, {"per": "patient"}],
            "weights": [{"encoder": "model"}],
        },
    ),
    "map": Scene(
        Map,
        {
            "model": [{"threshold": 0.9}],
            "features": [{"features": b"others"}],
            "slide": [{"slide": b"other"}],
            "slide_mpp": [{"slide_mpp": 0.25}],
            "formats": [{"formats": ("png", "csv")}, {"cut": True}],
        },
    ),
    "counterfactual": Scene(
        Ask,
        {
            "model": [{"threshold": 0.9}],
            "features": [{"features": b"others"}],
            "slide": [{"slide": b"other"}],
            "slide_mpp": [{"slide_mpp": 0.25}],
            "regions": [{"regions": b"others"}],
            "donors": [{"donor": b"other"}],
            "questions": [{"seed": 1}, {"class_name": "b"}, {"region_classes": ("fat",)}],
            "formats": [{"formats": ("geojson",)}, {"cut": True}],
        },
    ),
    "train": Scene(
        Training_,
        {
            "recipe": [{"epochs": 3}],
            "task": [{"classes": ("a", "c")}],
            "features": [{"shift": 1e-3}, {"encoder": "other"}],
            "train": [
                {"patients": tuple("ibcdefgh")},
                {"targets": (1, 0, 0, 1) + (0, 1) * 2},
                {"n_train": 3},
            ],
            "validation": [{"patients": tuple("abcdefgi")}, {"targets": (0, 1) * 2 + (1, 0, 0, 1)}],
            "machine": [{"precision": "bf16"}],
            "plugins": [{"plugin": 1}],
        },
    ),
}

CASES = [
    pytest.param(stage, change, id=f"{stage}-{name}-{'-'.join(change)}")
    for stage, scene in SCENES.items()
    for name, changes in scene.changes.items()
    for change in changes
]


@pytest.mark.parametrize(("stage", "change"), CASES)
def test_a_changed_input_is_seen_and_the_same_inputs_are_not_worked_on_again(stage, change, tmp_path):
    scene = SCENES[stage]
    assert scene.make().run(tmp_path / "out")
    assert not scene.make().run(tmp_path / "out")
    changed = scene.make(**change)
    assert changed.run(tmp_path / "out")
    assert not changed.run(tmp_path / "out")


@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"select", "study", "tissue"}))  # tests/pipeline, tests/features
def test_every_input_of_a_stage_is_changed_here(stage):
    assert set(SCENES[stage].changes) == set(STAGES[stage].inputs)


def test_a_model_is_the_same_as_if_the_old_one_had_never_been_there(tmp_path):
    Training_().run(tmp_path / "used_before")
    Training_(shift=2.0).run(tmp_path / "used_before")
    Training_(shift=2.0).run(tmp_path / "fresh")
    assert files(tmp_path / "used_before") == files(tmp_path / "fresh")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def test_a_model_that_an_option_names_is_an_input_with_its_weights(tmp_path):
    assert Training_(teacher=0).run(tmp_path / "out")
    assert not Training_(teacher=0).run(tmp_path / "out")
    assert Training_(teacher=1).run(tmp_path / "out")
    assert not Training_(teacher=1).run(tmp_path / "out")


@pytest.mark.parametrize("places", [False, True])
def test_where_tiles_lie_is_an_input_of_models_that_read_it(tmp_path, places):
    assert Training_(places=places).run(tmp_path / "out")
    assert not Training_(places=places).run(tmp_path / "out")
    assert Training_(places=places, moved=1.5).run(tmp_path / "out") == places


def test_a_slide_is_asked_again_when_its_patient_turns_out_to_be_seen(tmp_path):
    Training_(places=True).run(tmp_path / "model")
    item = Question("new", tmp_path / "new.h5", tmp_path)
    item.features.write_bytes(b"features")
    answers = Answers({}, [Effect("remove", "tiles", 1, 0.25, 0.5)], [], [], Sight(), "model")

    def stage(**patient_of: str) -> AskStage:
        return AskStage(tmp_path / "model", "a", patient_of, (), (), Questions(), ("csv",))

    stage().write(item, answers)
    assert stage().is_done(item)
    assert stage(new="somebody else").is_done(item)
    assert not stage(new="a").is_done(item)


def test_answers_of_a_model_without_a_file_are_not_kept(tmp_path):
    Training_(places=True).run(tmp_path / "model")
    item = Question("new", tmp_path / "new.h5", tmp_path)
    item.features.write_bytes(b"features")
    fields = ("a", {}, (), (), Questions(), ("csv",))
    stage = AskInMemory(tmp_path, *fields, load_model(tmp_path / "model"))
    stage.write(item, Answers({}, [], [], [], Sight(), ""))
    assert not stage.is_done(item)


def test_half_a_training_is_not_continued_with_other_features(tmp_path, monkeypatch):
    monkeypatch.setattr("eosin.mil._train.forget_state", lambda _: None)  # as if killed after the last pass
    Training_().run(tmp_path / "killed")
    (tmp_path / "killed" / "model.json").unlink()
    assert (tmp_path / "killed" / STATE).is_file()
    Training_(shift=2.0).run(tmp_path / "killed")
    Training_(shift=2.0).run(tmp_path / "fresh")
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_no_input_can_be_left_out_or_have_no_hash():
    everything = dict.fromkeys(STAGES["predict"].inputs, "x")
    assert len(fingerprint("predict", **everything)) == 16
    elsewhere = fingerprint("predict", **(everything | {"row": Path("a/run")}))
    assert elsewhere != fingerprint("predict", **(everything | {"row": Path("b/run")}))
    with pytest.raises(TypeError, match="is made from models, features, row"):
        fingerprint("predict", models="x")
    with pytest.raises(TypeError, match="object has no fingerprint"):
        fingerprint("predict", **(everything | {"row": object()}))


@pytest.mark.parametrize(
    ("one", "other"),
    [(["ab", "c"], ["a", "bc"]), (["a"], "a"), (1, "1"), (1, 1.5), (None, ""), (b"1", "1"), ({"a": 1}, {"b": 1})],
)
def test_values_that_differ_have_different_fingerprints(one, other):
    made = [fingerprint("predict", models="", features="", row=value) for value in (one, other)]
    assert made[0] != made[1]


def test_the_packages_own_classes_need_no_source():
    assert source_hash(Recipe) == ""
    assert source_hash(Scene) != ""


def test_the_page_for_readers_has_every_stage_and_input():
    page = (Path(__file__).parents[1] / "docs" / "fingerprints.md").read_text(encoding="utf-8")
    for stage, made in STAGES.items():
        for name, words in made.inputs.items():
            assert f"| {stage} | {name} | {words} |" in page, f"docs/fingerprints.md: add {stage}, {name}"
