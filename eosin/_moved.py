"""Import paths of 0.1 that have moved: they keep working for one release, with a warning that names the new path."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "eosin.demo": "eosin.pipeline.demo",
    "eosin.deploy": "eosin.pipeline.deploy",
    "eosin.heatmaps.cohort_questions": "eosin.pipeline.cohort_questions",
    "eosin.heatmaps.evaluation": "eosin.report.evaluation",
    "eosin.heatmaps.explain": "eosin.pipeline.explain",
    "eosin.heatmaps.figures": "eosin.report.figures",
    "eosin.heatmaps.measures": "eosin.report.measures",
    "eosin.heatmaps.question": "eosin.pipeline.question",
    "eosin.heatmaps.report": "eosin.report.page",
    "eosin.heatmaps.viewer": "eosin.viewer",
    "eosin.mil.sheets": "eosin.tables",
    "eosin.wsi.names": "eosin.names",
    "eosin.result": "eosin.pipeline.result",
    "eosin.selection": "eosin.pipeline.selection",
    "eosin.stages": "eosin.pipeline.two_stage",
}  # old module -> new module; a package takes its modules along


def new_path(old: str) -> str | None:
    """Return where a module of 0.1 lives now, or None for a module that has not moved."""
    for moved, new in MOVED.items():
        if old == moved or old.startswith(f"{moved}."):
            return new + old.removeprefix(moved)
    return None


class MovedFinder:
    """Finds modules under their paths of 0.1.

    It stands first in `sys.meta_path`: a package that has moved would otherwise load its modules a second time. It has
    no base class, because `importlib.abc` takes longer to import than all of this package.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a module that has moved."""
        return ModuleSpec(fullname, self) if new_path(fullname) else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let Python make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module itself in the old one's place, so that both paths give the same classes."""
        old = module.__name__
        new = new_path(old)
        assert new is not None
        message = f"{old} is now {new}; the old path will be removed in eosin 0.3"
        warnings.warn(message, FutureWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedFinder())
