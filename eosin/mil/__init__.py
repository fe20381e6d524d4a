"""Multiple-instance learning: packed bags, the three slots of a paper, training, evaluation and prediction."""

from typing import TYPE_CHECKING

from eosin._lazy import lazy

if TYPE_CHECKING:
    from eosin.mil._checkpoint import ModelCard, load_card, load_model, save_model
    from eosin.mil._compare import compare_predictions
    from eosin.mil._convert import convert_checkpoint
    from eosin.mil._data import Examples, FeatureFolder, MemoryBags, make_examples
    from eosin.mil._probe import Probe, probe_study
    from eosin.mil._recipe import RECIPES, Component, Recipe, Term, Training, choose_recipe
    from eosin.mil._splits import Split, check_splits, make_nested_splits, make_splits, read_splits, write_splits
    from eosin.mil._study import Study, crossval_study, fit_study, open_labels, open_study
    from eosin.mil._sweep import Sweep, run_sweep
    from eosin.mil._tables import LabelTable, read_labels
    from eosin.mil._training_run import Fitted
    from eosin.mil.bags import PackedBags
    from eosin.mil.slots import (
        AGGREGATORS,
        LOSS_TERMS,
        STRATEGIES,
        Aggregator,
        AggregatorOutput,
        AttentionOutput,
        LossTerm,
        Step,
        Strategy,
    )
    from eosin.mil.task import Task, make_task

__all__ = [
    "AGGREGATORS",
    "LOSS_TERMS",
    "RECIPES",
    "STRATEGIES",
    "Aggregator",
    "AggregatorOutput",
    "AttentionOutput",
    "Component",
    "Examples",
    "FeatureFolder",
    "Fitted",
    "LabelTable",
    "LossTerm",
    "MemoryBags",
    "ModelCard",
    "PackedBags",
    "Probe",
    "Recipe",
    "Split",
    "Step",
    "Strategy",
    "Study",
    "Sweep",
    "Task",
    "Term",
    "Training",
    "check_splits",
    "choose_recipe",
    "compare_predictions",
    "convert_checkpoint",
    "crossval_study",
    "fit_study",
    "load_card",
    "load_model",
    "make_examples",
    "make_nested_splits",
    "make_splits",
    "make_task",
    "open_labels",
    "open_study",
    "probe_study",
    "read_labels",
    "read_splits",
    "run_sweep",
    "save_model",
    "write_splits",
]

__getattr__, __dir__ = lazy(__name__)
