"""What the package shows to the outside: true `__all__`s, documented names, imports without side effects."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import eosin
from eosin.errors import CheckpointError
from eosin.features import FeatureSpec

NAMES = Path(__file__).with_name("public_names.txt")
PUBLIC = ("eosin", "eosin.features", "eosin.features.interop", "eosin.heatmaps", "eosin.kernels", "eosin.mil",
          "eosin.mil.tasks", "eosin.pipeline", "eosin.report", "eosin.viewer", "eosin.wsi")  # fmt: skip
BY_PATH = ("eosin.errors", "eosin.mil.bags", "eosin.mil.layouts", "eosin.mil.options", "eosin.mil.slots",
           "eosin.mil.subsets", "eosin.mil.task", "eosin.options", "eosin.plugins", "eosin.wsi.inventory",
           "eosin.wsi.reader")  # fmt: skip
"""Modules whose path is public: what plug-ins derive from and register with, and the errors."""

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(eosin.__path__, "eosin.") if module.name != "eosin.__main__"
)
OPTIONAL = ("triton_impl",)  # imported on first use, on machines that have triton


def load(name: str) -> ModuleType:
    if name.endswith(OPTIONAL):
        pytest.importorskip("triton")
    return importlib.import_module(name)


def public_members(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name, item in vars(module).items():
        if not name.startswith("_") and getattr(item, "__module__", None) == module.__name__:
            yield name, item


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_exists_once(name: str) -> None:
    module = load(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    assert [one for one in exported if not hasattr(module, one)] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_public_class_and_function_has_a_docstring(name: str) -> None:
    module = load(name)
    assert module.__doc__
    bare = [
        one
        for one, item in public_members(module)
        if (inspect.isclass(item) or inspect.isfunction(item)) and not (item.__doc__ or "").strip()
    ]
    assert bare == []


def test_every_registered_method_has_a_docstring() -> None:
    import eosin.mil.methods
    from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES

    assert eosin.mil.methods.__doc__
    for registry in (AGGREGATORS, LOSS_TERMS, STRATEGIES):
        assert len(registry) > 0
        assert [name for name in registry if not (vars(registry[name]).get("__doc__") or "").strip()] == []


def test_every_recipe_names_parts_and_options_that_exist() -> None:
    import eosin.mil.methods  # noqa: F401 - registers the methods
    from eosin.mil._recipe import RECIPES
    from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES

    assert "abmil" in RECIPES
    for name in RECIPES:
        recipe = RECIPES[name]
        AGGREGATORS.resolve(recipe.aggregator.name, recipe.aggregator.options)
        STRATEGIES.resolve(recipe.strategy.name, recipe.strategy.options)
        for term in recipe.terms:
            LOSS_TERMS.resolve(term.name, term.options)


def test_import_eosin_loads_nothing_but_itself() -> None:
    code = "import sys; before = set(sys.modules); import eosin; print(*sorted(set(sys.modules) - before))"
    loaded = {name for name in in_a_new_process(code).split() if name.split(".")[0] not in sys.stdlib_module_names}
    assert loaded == {"eosin", "eosin._lazy", "eosin._moved"}


@pytest.mark.long
def test_importing_every_module_opens_no_connection_and_changes_no_random_state() -> None:
    code = f"""
import importlib, socket
def refuse(*_): raise AssertionError("a connection was opened on import")
socket.socket.connect = refuse
import numpy, torch
def state():
    return (torch.initial_seed(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(),
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
before = state()
for name in {[name for name in MODULES if not name.endswith(OPTIONAL)]!r}:
    importlib.import_module(name)
assert state() == before
assert not torch.cuda.is_initialized()
"""
    in_a_new_process(code)


def test_the_public_names_are_those_of_the_list() -> None:
    """What is in the list is a promise: a name may be added to it, and goes only with a release that says so."""
    names = [
        f"{package}.{name}"
        for package in (*PUBLIC, *BY_PATH)
        for name in sorted(importlib.import_module(package).__all__)
    ]
    assert names == NAMES.read_text(encoding="utf-8").split()


def test_a_module_is_private_by_name_unless_its_path_is_public() -> None:
    commands = {name for name in MODULES if name.startswith(("eosin.cli.", "eosin.mil.methods."))}
    kernels = {name for name in MODULES if name.startswith("eosin.kernels.")}  # named after their operation
    public = {name for name in MODULES if not any(part.startswith("_") for part in name.split("."))}
    assert sorted(public - commands - kernels) == sorted(
        {
            *PUBLIC,
            *BY_PATH,
            "eosin.cli",
            "eosin.cluster",
            "eosin.heatmaps.export",
            "eosin.mil.continual",
            "eosin.mil.methods",
        }
        - {"eosin"}
    )


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_lists_all_that_it_imports_for_type_checkers(package: str) -> None:
    from eosin import _lazy

    module = importlib.import_module(package)
    offered = set(_lazy._places(package)) - {"run_stages"}  # a name of 0.1
    if offered:
        assert offered == set(module.__all__) - {"__version__"}
        assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = module.no_such_name


def test_a_name_of_a_package_is_that_of_its_module() -> None:
    from eosin.mil._study import fit_study
    from eosin.pipeline._explain import explain_slide

    assert eosin.fit is fit_study
    assert eosin.explain is explain_slide


@pytest.mark.parametrize("name", eosin.__all__)
def test_where_a_function_takes_a_path_it_takes_text(name: str) -> None:
    """People write paths as text in notebooks."""
    function = getattr(eosin, name)
    if not inspect.isfunction(function):
        return
    parameters = inspect.signature(function).parameters.values()
    hints = {one.name: str(one.annotation) for one in parameters if "pathlib.Path" in str(one.annotation)}
    assert [one for one, hint in hints.items() if "Path | str" not in hint and "Mapping" not in hint] == []


def test_text_is_read_as_a_path(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with eosin.open_slide(str(tmp_path / "a.png"), mpp=0.5) as slide:
        assert slide.size_px0 == (64, 64)
    assert [one.slide_id for one in eosin.find_slides(str(tmp_path))] == ["a"]
    bag = eosin.FeatureBag(np.zeros((2, 3), np.float32), FeatureSpec(encoder="toy", dim=3), "a")
    eosin.write_bag(str(tmp_path / "a.h5"), bag)
    assert eosin.read_bag(str(tmp_path / "a.h5")).slide_id == "a"
    assert list(eosin.find_bags(str(tmp_path))) == ["a"]
    assert eosin.JobFolder(str(tmp_path)).thumbnail("a").parent == tmp_path / "thumbnails"
    with pytest.raises(CheckpointError, match=r"model\.json"):
        eosin.load_model(str(tmp_path))


def test_python_m_eosin_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "eosin", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == eosin.__version__


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.long
def test_imports_of_0_1_still_work() -> None:
    code = """
from eosin.pipeline import Pipeline, run_pipeline, run_stages
from eosin.stages import SecondStage, run_two_stage
from eosin.heatmaps.viewer.server import Viewer
from eosin.selection import tile_selected
import eosin.pipeline._run
assert run_pipeline is eosin.pipeline._run.run_pipeline
"""
    in_a_new_process(code)


def test_objects_print_what_they_are(tmp_path: Path) -> None:
    import numpy as np
    import torch

    from eosin._records import Record, Report
    from eosin.features._bag import FeatureSpec

    grid = eosin.TileGrid(np.array([[0, 0], [256, 0]]), 256, eosin.Tiling(), (1000, 800), 0.5)
    bag = eosin.FeatureBag(np.ones((2, 3), np.float32), FeatureSpec(encoder="toy", dim=3), "S1", grid)
    printed = [grid, bag, eosin.Heatmap(np.array([0.25, 1]), grid, "attention", "attention")]
    printed += [eosin.PackedBags.pack([torch.ones(2, 3), torch.ones(4, 3)]), Report((Record("S1", "tile", "ok"),))]
    assert [repr(one) for one in printed] == [
        "<TileGrid: 2 tiles of 0.5mpp_256px_0px_overlap on 1000 x 800 px>",
        "<FeatureBag S1: 2 x 3 float32, toy>",
        "<Heatmap attention: 2 tiles, 0.25 to 1>",
        "<PackedBags: 2 bags, 6 instances x 3, float32 on cpu>",
        "<Report: 1 slide: 1 ok>",
    ]


def test_objects_that_hold_much_print_one_line_about_it(tmp_path: Path) -> None:
    import numpy as np
    import torch

    from eosin.features._bag import FeatureSpec
    from eosin.heatmaps import MapSet
    from eosin.mil import Examples, MemoryBags, Split
    from eosin.wsi import ArraySlide, TissueMask

    bags = MemoryBags({"a": torch.ones(2, 3), "b": torch.ones(1, 3)}, FeatureSpec(encoder="toy", dim=3))
    grid = eosin.TileGrid(np.array([[0, 0]]), 256, eosin.Tiling(), (1000, 800), 0.5)
    printed = [
        ArraySlide(np.zeros((6, 8, 3), np.uint8), mpp=0.5, path=tmp_path / "a.png"),
        ArraySlide(np.zeros((6, 8, 3), np.uint8), mpp=None),
        TissueMask(np.ones((100, 200), bool), (16, 16), (3200, 1600), 0.5),
        Split(("a", "b"), (), ("c",)),
        Examples(bags, ("a", "b"), ("1", "1"), torch.arange(2)),
        MapSet([eosin.Heatmap(np.ones(1), grid, "attention", "attention")], {"effect": "it would take too long"}),
    ]
    assert [repr(one) for one in printed] == [
        "<Slide a.png: 8 x 6 px, 0.5 µm/px, memory>",
        "<Slide array: 8 x 6 px, no µm/px, memory>",
        "<TissueMask: 1.28 mm² on 200 x 100 cells>",
        "<Split: 2 train, 0 val, 1 test>",
        "<Examples: 2 bags of 1 patients, toy>",
        "<MapSet: attention; 1 absent>",
    ]


@pytest.mark.parametrize("old", ["eosin.mil.checkpoint", "eosin.wsi.grid", "eosin.heatmaps.export.png", "eosin.demo"])
def test_a_module_that_is_private_now_keeps_its_path_of_the_first_version(old: str) -> None:
    with pytest.warns(FutureWarning, match=f"{old} is now eosin\\."):
        module = importlib.import_module(old)
    assert module.__name__ != old


HANDED_ON = {  # module of the first version -> names that are elsewhere now, or are only handed on
    "eosin.heatmaps.question": ("Questions",),
    "eosin.mil.classification": ("Binary", "EVEN"),
    "eosin.mil.data": ("LabelTable", "PATIENT_COLUMNS", "SLIDE_COLUMNS", "Table", "detect_column", "normalised",
                       "read_labels", "read_table", "shown", "slide_id"),
    "eosin.mil.evaluate": ("choose_device",),
    "eosin.mil.polarity": ("split_target",),
    "eosin.mil.predict": ("Ensemble", "load_ensemble"),
    "eosin.mil.splits": ("Cohort",),
    "eosin.mil.survival": ("DiscreteSurvival", "concordance"),
    "eosin.mil.tasks": ("Binary", "Classification", "Columns", "Cox", "DiscreteSurvival", "MultiLabel", "MultiTask",
                        "Ordinal", "Regression", "Row", "Task", "load_task", "make_task", "sorted_labels", "wide"),
    "eosin.mil.train": ("Fitted", "Objective", "fit"),
    "eosin.wsi.slide": ("Slide", "SlideFile", "find_slides", "open_slide"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("module", HANDED_ON)
def test_names_are_still_found_where_the_first_version_had_them(module: str) -> None:
    there = vars(importlib.import_module(module))
    assert [name for name in HANDED_ON[module] if name not in there] == []


def test_other_packages_with_the_same_habit_are_left_alone() -> None:
    assert importlib.import_module("eosin._moved").new_paths("tensorboard.lazy") == ()
