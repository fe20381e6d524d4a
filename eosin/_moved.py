"""Import paths of 0.1 that have moved: they keep working for one release, with a warning that names the new path."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

MOVED: dict[str, str | tuple[str, ...]] = {
    "eosin.demo": "eosin.pipeline._demo",
    "eosin.deploy": "eosin.pipeline._deploy",
    "eosin.features.devices": ("eosin.features._devices", "eosin._devices"),
    "eosin.heatmaps.attribution": ("eosin.heatmaps._maps", "eosin.heatmaps._subject", "eosin.mil.slots"),
    "eosin.heatmaps.closed_forms": "eosin.mil._closed_forms",
    "eosin.heatmaps.cohort_questions": "eosin.pipeline._cohort_questions",
    "eosin.heatmaps.counterfactual": ("eosin.heatmaps._counterfactual", "eosin.heatmaps._maps"),
    "eosin.heatmaps.evaluation": "eosin.report._evaluation",
    "eosin.heatmaps.explain": "eosin.pipeline._explain",
    "eosin.heatmaps.figures": "eosin.report._figures",
    "eosin.heatmaps.geojson_stream": "eosin.heatmaps._annotations",
    "eosin.heatmaps.mapset": "eosin.heatmaps._maps",
    "eosin.heatmaps.measures": "eosin.report._measures",
    "eosin.heatmaps.pooled": ("eosin.mil._closed_forms", "eosin.mil.subsets"),
    "eosin.heatmaps.question": ("eosin.pipeline._question", "eosin.heatmaps._examination"),
    "eosin.heatmaps.readout": ("eosin.mil._closed_forms", "eosin.mil.subsets"),
    "eosin.heatmaps.reevaluation": "eosin.mil._reevaluation",
    "eosin.heatmaps.report": "eosin.report._page",
    "eosin.heatmaps.rollout": "eosin.mil._rollout",
    "eosin.heatmaps.subsets": (
        "eosin.heatmaps._subject",
        "eosin.mil.subsets",
        "eosin.mil._reevaluation",
        "eosin.mil._closed_forms",
    ),
    "eosin.heatmaps.tracing": ("eosin.mil._rollout", "eosin.mil._nystrom"),
    "eosin.heatmaps.viewer.sums": "eosin.mil._closed_forms",
    "eosin.heatmaps.wording": "eosin.heatmaps._findings",
    "eosin.mil.classification": ("eosin.mil.tasks._classification", "eosin.mil._metrics"),
    "eosin.mil.cox": "eosin.mil.tasks._cox",
    "eosin.mil.data": ("eosin.mil._data", "eosin.mil._tables", "eosin._tables", "eosin._names"),
    "eosin.mil.evaluate": ("eosin.mil._evaluate", "eosin._devices"),
    "eosin.mil.masking": "eosin.mil.methods.mhim",
    "eosin.mil.methods.mhim_ranking": "eosin.mil.methods.mhim",
    "eosin.mil.methods.mhim_recycle": "eosin.mil.methods.mhim",
    "eosin.mil.methods.mhim_teacher": "eosin.mil.methods.mhim",
    "eosin.mil.methods.owlora_layer": "eosin.mil.methods.owlora",
    "eosin.mil.methods.packmil_downsampler": "eosin.mil.methods.packmil",
    "eosin.mil.methods.packmil_labels": "eosin.mil.methods.packmil",
    "eosin.mil.multilabel": "eosin.mil.tasks._multilabel",
    "eosin.mil.multitask": "eosin.mil.tasks._multitask",
    "eosin.mil.polarity": "eosin.mil.tasks._polarity",
    "eosin.mil.predict": ("eosin.mil._predict", "eosin.mil._ensemble"),
    "eosin.mil.regression": "eosin.mil.tasks._regression",
    "eosin.mil.sheets": "eosin._tables",
    "eosin.mil.splits": ("eosin.mil._splits", "eosin.mil._cohort"),
    "eosin.mil.survival": ("eosin.mil.tasks._survival", "eosin.mil._survival_metrics"),
    "eosin.mil.train": ("eosin.mil._train", "eosin.mil._objective", "eosin.mil._training_run"),
    "eosin.result": "eosin.pipeline._result",
    "eosin.selection": "eosin.pipeline._selection",
    "eosin.stages": "eosin.pipeline._two_stage",
    "eosin.viewer.gallery": "eosin.viewer._panel",
    "eosin.viewer.replay": "eosin.viewer._saved",
    "eosin.wsi.names": "eosin._names",
    "eosin.wsi.slide": ("eosin.wsi._slide", "eosin.wsi._slide_file"),
    "eosin.wsi.stain": ("eosin.wsi._stain", "eosin.wsi._ink"),
    "eosin.heatmaps.viewer": "eosin.viewer",
}  # old module -> new module, or the modules that its names went to; a package takes its modules along


def new_paths(old: str) -> tuple[str, ...]:
    """Return the modules in which a module of 0.1 lives now; none for a module that has not moved."""
    for moved, new in MOVED.items():
        if old == moved or old.startswith(f"{moved}."):
            return (new + old.removeprefix(moved),) if isinstance(new, str) else new
    package, _, name = old.rpartition(".")
    private = f"{package}._{name}"
    return (private,) if package.partition(".")[0] == "eosin" and is_file_of(private) else ()


def is_file_of(module: str) -> bool:
    """Tell whether a module of eosin lies in the package: what is private now had no underscore in 0.1."""
    return Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py").is_file()


class MovedFinder:
    """Finds modules under their paths of 0.1.

    It stands first in `sys.meta_path`: a package that has moved would otherwise load its modules a second time. It has
    no base class, because `importlib.abc` takes longer to import than all of this package.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a module that has moved."""
        return ModuleSpec(fullname, self) if new_paths(fullname) else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let Python make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module itself in the old one's place, so that both paths give the same classes."""
        old = module.__name__
        new = new_paths(old)
        message = f"{old} is now {' and '.join(new)}; the old path will be removed in eosin 0.3"
        warnings.warn(message, FutureWarning, stacklevel=2)
        first, *others = map(importlib.import_module, new)
        if others:  # its names went to several modules
            parts = (first, *others)
            module.__dict__.update(
                {name: item for part in parts for name, item in vars(part).items() if name[0] != "_"}
            )
        else:
            sys.modules[old] = first


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedFinder())
