"""The model card of a finished run, whichever command made it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eosin._seals import read_json
from eosin.errors import ConfigError, EosinError
from eosin.mil._checkpoint import ModelCard, load_card
from eosin.mil._crossval import METRICS
from eosin.pipeline._studies import find_study
from eosin.report._card import CardPart
from eosin.report._model_card import model_card
from eosin.wsi._job import JobFolder

PLACES = ("", "crossval", "chosen", "crossval/chosen")
"""Where metrics are, from the folder of `eosin run`, of `eosin crossval` and its sweeps, and of `eosin train`."""

MODELS = ("", "../model", "fold_0", "../fold_0")
"""Where a model is, from the folder of the metrics: the one for other slides before that of a fold."""


def card_of_run(run: Path, study: str | None = None) -> tuple[CardPart, ...]:
    """Return the model card of a run.

    Parameters
    ----------
    run : Path
        Folder of `eosin run`, `eosin crossval` or `eosin train`.
    study : str, optional
        Study of the job; the newest finished one unless it is given.

    Raises
    ------
    ConfigError
        If the folder holds no metrics.
    """
    if (run / "study.json").is_file() or (run / "studies").is_dir():
        run = find_study(JobFolder(run), study).path
    folder = next((run / place for place in PLACES if (run / place / METRICS).is_file()), None)
    if folder is None:
        raise ConfigError(f"{run}: has no {METRICS}; pass a folder of eosin run, crossval or train that is finished")
    metrics: Mapping[str, Any] = read_json(folder / METRICS)
    return model_card(metrics, _model(folder))


def _model(folder: Path) -> ModelCard | None:
    for place in MODELS:
        try:
            return load_card(folder / place)
        except (EosinError, OSError):
            continue
    return None
