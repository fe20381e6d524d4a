"""Every worked example in configs/ is understood and describes a model that can be built and trained a step."""

import math
from pathlib import Path

import pytest
import torch

import eosin.mil.methods  # noqa: F401 (registers)
from eosin.cli._settings import GROUPS, Settings
from eosin.errors import ConfigError
from eosin.features._bag import FeatureSpec
from eosin.mil._checkpoint import build_model
from eosin.mil._data import Examples, MemoryBags
from eosin.mil._evaluate import predict_outputs
from eosin.mil._objective import Objective
from eosin.mil._recipe import Recipe
from eosin.mil._selection import tile_ratio
from eosin.mil._train import fit
from eosin.mil.bags import PackedBags
from eosin.mil.slots import AttentionOutput
from eosin.mil.tasks._classification import Classification
from eosin.options import read_yaml
from eosin.pipeline._two_stage import SecondStage
from eosin.wsi._grid import Tiling

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
RUNS = sorted(FOLDER.glob("run/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_worked_example_trains(path):
    recipe = Recipe.parse(read_yaml(path), source=path.name)
    task = Classification(classes=("a", "b"))
    torch.manual_seed(0)
    objective = Objective(recipe, build_model(recipe, task, 16), task).train()
    bags = PackedBags.pack([torch.randn(30, 16), torch.randn(25, 16)])
    total, *_ = objective(bags, torch.tensor([0, 1]))
    total.backward()
    assert total.isfinite()


def test_there_are_examples():
    assert CONFIGS
    assert RUNS


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_worked_example_of_a_run_is_understood(path):
    settings = Settings.read(path, [], GROUPS)
    recipe = settings.parse("recipe", Recipe)
    first, second = settings.parse("tiling", Tiling), settings.parse("second", SecondStage)
    assert tile_ratio(first, second.tiling) >= 1
    assert issubclass(build_model(recipe, Classification(classes=("a", "b")), 16).output_type, AttentionOutput)


@pytest.mark.long
def test_three_papers_are_trained_together(make_examples):
    recipe = Recipe.parse(read_yaml(FOLDER / "acmil_aem_mhim.yaml"))
    assert [part.name for part in (recipe.aggregator, *recipe.terms, recipe.strategy)] == [
        "acmil", "acmil_branches", "acmil_diversity", "attention_entropy", "mhim",
    ]  # fmt: skip
    quick = {"epochs": 15, "lr": 1e-3, "bags_per_step": 4, "select": "last", "refit": False}
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=quick)})
    task, train, test = Classification(classes=("a", "b")), make_examples(60, 0), make_examples(60, 1)
    fitted = fit(recipe, task, train)
    last = fitted.history[-1]
    parts = ("bag", "consistency", "acmil_branches", "acmil_diversity", "attention_entropy")
    assert all(math.isfinite(last[f"train_{name}"]) for name in parts)
    outputs = predict_outputs(fitted.model, task, test.bags, test.ids)
    assert task.metrics(outputs, test.targets.numpy())["auc"] > 0.9


def test_three_papers_that_make_no_sense_are_refused_when_built():
    data = read_yaml(FOLDER / "acmil_aem_mhim.yaml")
    task = Classification(classes=("a", "b"))
    for wrong, told in [
        ({"aggregator": {"name": "mean"}}, "needs an aggregator that returns"),
        ({"strategy": {"name": "ins"}}, "InsStrategy needs an aggregator that returns InsOutput"),
        ({"aggregator": {"name": "abmil"}}, "AcmilBranches needs an aggregator that returns"),
    ]:
        recipe = Recipe.parse(data | wrong)
        with pytest.raises(ConfigError, match=told):
            Objective(recipe, build_model(recipe, task, 16), task)


@pytest.fixture
def make_examples():
    """Return a function that draws bags, every second one with a few shifted instances."""

    def make(n_bags: int, seed: int) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        bags = {str(number): torch.randn(20, 16, generator=generator) for number in range(n_bags)}
        for number, bag in enumerate(bags.values()):
            bag[:3] += 2.0 * (number % 2)
        ids = tuple(bags)
        return Examples(MemoryBags(bags, FeatureSpec(encoder="toy", dim=16)), ids, ids, torch.arange(n_bags) % 2)

    return make
