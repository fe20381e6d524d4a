"""Rules that no linter holds: no circles, no names that come through a third module, methods unknown above `mil`."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "eosin"
MOST_POSITIONAL = 5
SOURCES = {
    ".".join(("eosin", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}
FACES = {module for module, path in SOURCES.items() if path.name == "__init__.py"} | {"eosin.__main__", "eosin._moved"}

KNOWN_CIRCLE = {
    "eosin.wsi.array_impl",
    "eosin.wsi.dicom_impl",
    "eosin.wsi.geometry",
    "eosin.wsi.grid",
    "eosin.wsi.openslide_impl",
    "eosin.wsi.overview",
    "eosin.wsi.picture",
    "eosin.wsi.reader",
    "eosin.wsi.readers",
    "eosin.wsi.refine",
    "eosin.wsi.slide",
    "eosin.wsi.tiff_impl",
    "eosin.wsi.tiled",
    "eosin.wsi.tissue",
    "eosin.wsi.zarr_impl",
}
"""The readers of slides are registered by name and imported where a file is opened. May only shrink."""

KNOWN_HANDED_ON = {
    "eosin.mil.classification.EVEN",
    "eosin.mil.data.LabelTable",
    "eosin.mil.data.PATIENT_COLUMNS",
    "eosin.mil.data.SLIDE_COLUMNS",
    "eosin.mil.data.Table",
    "eosin.mil.data.detect_column",
    "eosin.mil.data.normalised",
    "eosin.mil.data.read_labels",
    "eosin.mil.data.read_table",
    "eosin.mil.data.shown",
    "eosin.mil.predict.Ensemble",
    "eosin.mil.predict.load_ensemble",
    "eosin.mil.splits.Cohort",
    "eosin.mil.survival.concordance",
    "eosin.mil.tasks.Binary",
    "eosin.mil.tasks.Classification",
    "eosin.mil.tasks.Columns",
    "eosin.mil.tasks.Cox",
    "eosin.mil.tasks.DiscreteSurvival",
    "eosin.mil.tasks.MultiLabel",
    "eosin.mil.tasks.MultiTask",
    "eosin.mil.tasks.Ordinal",
    "eosin.mil.tasks.Regression",
    "eosin.mil.tasks.Row",
    "eosin.mil.tasks.Task",
    "eosin.mil.tasks.load_task",
    "eosin.mil.tasks.sorted_labels",
    "eosin.mil.tasks.wide",
    "eosin.mil.train.Fitted",
    "eosin.mil.train.Objective",
    "eosin.pipeline.question.Questions",
}
"""Names that a module hands on from another. May only shrink."""

KNOWN_LONG = {
    "eosin.cli.counterfactual._ask_cohort",
    "eosin.cli.counterfactual._ask_slide",
    "eosin.cli.heatmap._explain",
    "eosin.cli.train._judge",
    "eosin.cli.train._report",
    "eosin.heatmaps.examination._curves",
    "eosin.mil.attention._attended",
    "eosin.mil.attention.forward",
    "eosin.mil.crossval.crossval",
    "eosin.mil.methods.gdat._moved",
    "eosin.mil.methods.packmil.residual_loss",
    "eosin.mil.reevaluation._best",
    "eosin.mil.survival_metrics._area_at",
    "eosin.mil.survival_metrics._share_of_pairs",
    "eosin.mil.sweep.run_sweep",
    "eosin.mil.train._refit",
    "eosin.pipeline.cohort_questions._write_cohort",
    "eosin.pipeline.question._write",
}
"""Functions that take more. May only shrink."""


def imported(module: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield module, name and new name of what a module imports from eosin, in functions and for type checkers too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "eosin":
            for alias in node.names:
                yield str(node.module), alias.name, alias.asname


def neighbours(module: str) -> set[str]:
    targets = {name if (name := f"{place}.{one}") in SOURCES else place for place, one, _ in imported(module)}
    return {target for target in targets if target in SOURCES and target not in FACES} - {module}


def circles() -> set[frozenset[str]]:
    """Return the groups of modules that reach each other, by Tarjan's algorithm."""
    graph = {module: neighbours(module) for module in SOURCES if module not in FACES}
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = set()

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.add(frozenset(group))

    for module in graph:
        if module not in order:
            visit(module)
    return found


def test_no_module_reaches_itself_by_any_import() -> None:
    assert [sorted(group) for group in circles() if not group <= KNOWN_CIRCLE] == []


def test_no_module_hands_on_a_name_of_another() -> None:
    found = {
        f"{module}.{new}"
        for module in SOURCES
        if module not in FACES
        for _, name, new in imported(module)
        if new == name
    }
    assert sorted(found - KNOWN_HANDED_ON) == []


def test_nothing_above_mil_knows_a_method() -> None:
    found = {
        f"{module}: {place}.{name}"
        for module in SOURCES
        if not module.startswith("eosin.mil") and module != "eosin"
        for place, name, _ in imported(module)
        if f"{place}.{name}".startswith("eosin.mil.methods")
    }
    assert found == set()


def test_no_function_takes_more_than_five_positional_arguments() -> None:
    found = {
        f"{module}.{node.name}"
        for module, tree in TREES.items()
        if not module.startswith("eosin.kernels")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and sum(one.arg not in ("self", "cls") for one in node.args.posonlyargs + node.args.args) > MOST_POSITIONAL
    }
    assert sorted(found - KNOWN_LONG) == []
