"""A paper is one file: no method knows another, nothing above knows one, and no other misses a file that is gone."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "eosin"
METHODS = PACKAGE / "mil" / "methods"
BAGS = {"PooledBag", "ReadoutBag", "RowsBag", "MaxBag", "SmoothMaxBag", "NoisyOrBag", "ForwardBag", "CriticalBag"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", sorted(path.name for path in METHODS.glob("*.py")))
def test_a_method_imports_no_other_method(name):
    assert [one for one in imported(METHODS / name) if one.startswith("eosin.mil.methods.")] == []


def test_nothing_outside_imports_a_method():
    outside = [path for path in PACKAGE.rglob("*.py") if METHODS not in path.parents]
    known = {f"eosin.mil.methods.{path.stem}" for path in METHODS.glob("*.py")}
    found = [
        f"{path.relative_to(PACKAGE)}: {one}"
        for path in outside
        for one in imported(path)
        if one in known or one.rpartition(".")[0] in known
    ]
    assert found == []


def test_nothing_asks_which_form_a_bag_has():
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
            if asks and BAGS & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    # that of DSMIL is an assertion about its own class
    assert all(one.startswith("mil/methods/dsmil.py") for one in found)


TEXT = {"what", "kind", "label"}
TESTS = {"startswith", "endswith", "removesuffix", "removeprefix", "replace", "split"}


def test_no_decision_is_read_out_of_display_text():
    found = []
    for package in ("heatmaps", "mil", "viewer", "pipeline", "report"):
        for path in (PACKAGE / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TESTS
                if method and isinstance(node.func.value, ast.Attribute) and node.func.value.attr in TEXT:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
                holds = isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
                if holds and any(isinstance(end, ast.Attribute) and end.attr in TEXT for end in node.comparators):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []


WITHOUT = """
import sys, torch, numpy as np
from pathlib import Path
import eosin, eosin.mil.methods
from eosin.errors import CheckpointError, UnknownNameError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.heatmaps._maps import map_slide
from eosin.mil._convert import recognise
from eosin.mil._recipe import RECIPES
from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES
from eosin.wsi._grid import TileGrid, Tiling

assert Path(eosin.__file__).is_relative_to(sys.argv[1])
small = {"width": 16, "embed_dims": (16,), "hidden": 4, "projection": 4, "landmarks": 4, "tokens": 3, "heads": 2}
grid = TileGrid(np.array([(x, 0) for x in range(0, 360, 40)]), 40, Tiling(mpp=0.5, patch_size=40), (360, 40), 0.5)
values = np.random.default_rng(0).normal(size=(9, 12)).astype(np.float32)
bag = FeatureBag(values, FeatureSpec(encoder="x", dim=12), "s", grid, {})
for name in AGGREGATORS:
    options = {key: value for key, value in small.items() if key in AGGREGATORS.defaults(name)}
    if "host" in AGGREGATORS.defaults(name):
        options["host"] = "abmil"
    model = AGGREGATORS.build(name, 12, 2, options=options).eval()
    assert map_slide(model, bag, classes=("a", "b")).maps, name
broken = []
for name in RECIPES:
    recipe = RECIPES[name]
    try:
        AGGREGATORS.resolve(recipe.aggregator.name, recipe.aggregator.options)
        STRATEGIES.resolve(recipe.strategy.name, recipe.strategy.options)
        [LOSS_TERMS.resolve(term.name, term.options) for term in recipe.terms]
    except UnknownNameError as error:
        broken.append(name)
assert sorted(broken) == ["mhim_dsmil", "mhim_v2_dsmil"], broken
try:
    recognise({"b_classifier.q.weight": torch.ones(2, 2)}, Path("x"))
except CheckpointError as error:
    assert "does not match any network that eosin converts" in error.message
    print(len(AGGREGATORS))
"""


@pytest.mark.long
def test_without_the_file_of_dsmil_only_dsmil_is_missing(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "eosin", ignore=shutil.ignore_patterns("__pycache__", "dsmil.py"))
    code = [sys.executable, "-W", "error", "-c", WITHOUT, str(tmp_path)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from eosin.mil.slots import AGGREGATORS

    assert int(done.stdout) == len(AGGREGATORS) - 1
