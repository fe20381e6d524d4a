"""Every worked example in configs/ is understood and describes a model that can be built and trained a step."""

from pathlib import Path

import pytest
import torch

import eosin.mil.methods  # noqa: F401 (registers)
from eosin.mil.bags import PackedBags
from eosin.mil.checkpoint import build_model
from eosin.mil.recipe import Recipe
from eosin.mil.tasks import Classification
from eosin.mil.train import Objective
from eosin.options import read_yaml

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


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
