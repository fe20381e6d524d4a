"""Change each input of each stage and see its result made again; change nothing and see it kept."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from eosin.features.bag import FeatureSpec
from eosin.fingerprints import STAGES, fingerprint, source_hash
from eosin.mil.data import Examples, MemoryBags
from eosin.mil.recipe import Component, Recipe, Training
from eosin.mil.resume import STATE
from eosin.mil.slots import AGGREGATORS
from eosin.mil.tasks import Classification
from eosin.mil.train import fit

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

    def run(self, folder: Path) -> bool:
        """Train; return whether a pass was made."""
        generator = torch.Generator().manual_seed(0)
        bags = {name: torch.randn(3, 6, generator=generator) for name in "stuvwxyz"}
        bags["s"][2, 5] += self.shift
        source = MemoryBags(bags, FeatureSpec(encoder=self.encoder, dim=6))
        examples = Examples(source, tuple(bags), self.patients, torch.tensor(self.targets))
        load_plugin(folder.parent, self.plugin)
        recipe = Recipe(
            aggregator=Component(name="of_a_user"), training=Training(epochs=self.epochs, standardize=False, lr=0.1)
        )
        train, val = examples.subset("stuvwxyz"[: self.n_train]), examples.subset("stuvwxyz"[4:])
        passes: list[object] = []
        fit(
            recipe, Classification(classes=self.classes), train, val,
            folder=folder, device="cpu", precision=self.precision, progress=passes.append, state_interval_s=0,
        )  # fmt: skip
        return bool(passes)


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


@dataclass
class Scene:
    """One stage, and for each of its inputs another value of it."""

    make: Callable[..., Any]
    changes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


SCENES = {
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
    assert scene.make(**change).run(tmp_path / "out")
    assert not scene.make(**change).run(tmp_path / "out")


@pytest.mark.parametrize("stage", SCENES)
def test_every_input_of_a_stage_is_changed_here(stage):
    assert set(SCENES[stage].changes) == set(STAGES[stage].inputs)


def test_a_model_is_the_same_as_if_the_old_one_had_never_been_there(tmp_path):
    Training_().run(tmp_path / "used_before")
    Training_(shift=2.0).run(tmp_path / "used_before")
    Training_(shift=2.0).run(tmp_path / "fresh")
    assert files(tmp_path / "used_before") == files(tmp_path / "fresh")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def test_half_a_training_is_not_continued_with_other_features(tmp_path, monkeypatch):
    monkeypatch.setattr("eosin.mil.train.forget_state", lambda _: None)  # as if killed after the last pass
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
