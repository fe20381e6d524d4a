"""What `eosin methods` lists and explains."""

import pytest

import eosin.mil.methods
from eosin.mil._recipe import RECIPES, Recipe
from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES

from .conftest import Run

assert eosin.mil.methods.__doc__  # importing it registers the methods


def test_every_registered_name_is_listed(run: Run) -> None:
    result = run("methods")
    assert result.exit_code == 0
    for registry in (AGGREGATORS, LOSS_TERMS, STRATEGIES, RECIPES):
        for name in registry:
            assert f" {name} " in result.stdout


@pytest.mark.parametrize("name", ["abmil", "supervised"])
def test_a_part_is_explained_with_its_options(run: Run, name: str) -> None:
    result = run("methods", name)
    assert result.exit_code == 0
    assert "options:" in result.stdout


def test_the_printed_recipe_can_be_used_as_a_configuration(run: Run) -> None:
    import yaml

    text = run("methods", "abmil").stdout
    printed = yaml.safe_load(text[text.index("recipe:") :])
    assert Recipe.parse(printed["recipe"]) == RECIPES["abmil"]


@pytest.mark.parametrize(
    "name", [name for registry in (AGGREGATORS, LOSS_TERMS, STRATEGIES) for name in registry if name != "supervised"]
)
def test_every_part_gives_its_paper_once_its_equations_deviations_and_a_recipe(run: Run, name: str) -> None:
    text = run("methods", name).stdout
    for said in ("https://", "\n1. ", "eviation", "options:", "recipe:"):
        assert said in text
    assert text.count("\n1. ") == 1
    assert name in text[text.index("recipe:") :]


def test_an_unknown_name_suggests_the_nearest(refused: Run) -> None:
    assert "did you mean abmil" in refused("methods", "abmill")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_its_papers(run: Run, name: str) -> None:
    assert "https://" in run("methods", name).stdout
