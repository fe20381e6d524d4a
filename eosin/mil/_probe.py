"""Probes: linear models and nearest neighbours on one vector per slide, tested as a cross-validation is.

The linear probe minimises the mean loss of the task plus ``strength / 2`` times the squared weights, in float64:
logistic regression for classes and labels, ridge regression for numbers, Cox regression for survival. Vectors are
standardised by the training part. The strength is the one with the least loss on inner folds of the training part, by
patient.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from eosin._files import write_text
from eosin._filesets import begin_set, finish_set
from eosin._tables import csv_text
from eosin.errors import ConfigError, EosinError, LabelError
from eosin.mil._checkpoint import CARD, WEIGHTS, ModelCard, build_model, save_model
from eosin.mil._cohort import Cohort, deal
from eosin.mil._crossval import (
    METRICS,
    PREDICTIONS,
    Fold,
    FoldSplits,
    inner_splits,
    result_files,
    write_folds,
    write_predictions,
)
from eosin.mil._data import BagSource, Examples, PatientBags
from eosin.mil._evaluate import RESAMPLES
from eosin.mil._flow import Flow
from eosin.mil._linear import fit_linear, logits_of
from eosin.mil._metrics import Floats, Metrics
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._seen import SEEN, write_seen
from eosin.mil._splits import check_splits
from eosin.mil._study import Study
from eosin.mil.task import Task
from eosin.options import Options

Method = Literal["auto", "linear", "logistic", "ridge", "cox", "hazard", "knn"]
Pool = Literal["mean", "max", "mean_sd"]

STRENGTHS = tuple(10.0**power for power in range(2, -5, -1))
INNER_FOLDS = 5
FEW_SHOT = "few_shot.csv"
BASELINE = "baseline"
NO_FOLDER = r"(?!)"
"""Matches no name: nothing here has folders of folds, and deletes none."""
MODEL = "model"
"""Folder of the probe of all slides, where it is a model of tiles."""
LINEAR = {
    "classification": "logistic",
    "binary": "logistic",
    "ordinal": "logistic",
    "multilabel": "logistic",
    "regression": "ridge",
    "survival": "hazard",
    "cox": "cox",
}
"""What the linear probe of a task is called."""

logger = logging.getLogger(__name__)


class Probe(Options):
    """What is fitted to the vectors of slides.

    Parameters
    ----------
    method : str
        ``logistic`` (classes, labels), ``ridge`` (numbers), ``cox``, ``hazard`` (survival in bins of time) or ``knn``;
        ``auto`` takes the linear one of the task, which is ``linear`` for a task of several.
    pool : str
        How the tiles of a slide become its vector: ``mean``, ``max`` or ``mean_sd``. A file of one vector is itself.
    strength : float, optional
        Of the penalty on the weights; None chooses it on inner folds of the training part.
    neighbours : int
        Training slides that ``knn`` asks; fewer where there are fewer.
    seed : int
        Of the inner folds and of few-shot draws.
    """

    method: Method = "auto"
    pool: Pool = "mean"
    strength: float | None = Field(default=None, gt=0)
    neighbours: int = Field(default=5, ge=1)
    seed: int = Field(default=0, ge=0)

    def of_task(self, task: Task) -> "Probe":
        """Return the probe with the method that ``auto`` stands for.

        Raises
        ------
        ConfigError
            If the method does not fit the task.
        """
        linear = LINEAR.get(task.kind, "linear")
        if self.method == "knn":
            if linear not in ("logistic", "ridge"):
                raise ConfigError(f"nearest neighbours do not predict task {task.kind}; use --method auto")
            return self
        if self.method not in ("auto", linear):
            raise ConfigError(f"method {self.method} does not fit task {task.kind}; use --method auto ({linear})")
        return self.model_copy(update={"method": linear})

    def in_words(self, task: Task) -> str:
        """Return what the probe is, for a person: ``mean of the tiles, logistic regression``."""
        tiles = {"mean": "mean", "max": "maximum", "mean_sd": "mean and deviation"}[self.pool]
        linear = LINEAR.get(task.kind, "linear")
        name = f"{self.neighbours} nearest neighbours" if self.method == "knn" else f"{linear} regression"
        return f"{tiles} of the tiles, {name}"


def pool_vectors(bags: BagSource, ids: Sequence[str], pool: Pool = "mean") -> Floats:
    """Return one vector per bag, (bags, E) float64, from one pass over the bags."""
    return np.stack([_pooled(bags.load(name).numpy().astype(np.float64), pool) for name in ids])


def _pooled(rows: Floats, pool: Pool) -> Floats:
    if pool == "max":
        return np.asarray(rows.max(0))
    return np.asarray(rows.mean(0)) if pool == "mean" else np.concatenate([rows.mean(0), rows.std(0)])


@dataclass(frozen=True, eq=False)
class Vectors:
    """Labelled vectors.

    Attributes
    ----------
    rows : (n, E) float64
    targets : (n, ...) tensor
        As the task encodes them.
    cohort : Cohort
        Ids, patients and strata, in the same order.
    """

    rows: Floats
    targets: Tensor
    cohort: Cohort

    @classmethod
    def of(cls, examples: Examples, cohort: Cohort, pool: Pool) -> "Vectors":
        """Pool the bags of examples."""
        return cls(pool_vectors(examples.bags, examples.ids, pool), examples.targets, cohort)

    def at(self, ids: Sequence[str]) -> "Vectors":
        """Return the vectors of these bags, in the order of the ids."""
        place = {name: number for number, name in enumerate(self.cohort.slide_ids)}
        rows = [place[name] for name in ids]
        whole = self.cohort
        part = Cohort(
            tuple(ids),
            tuple(whole.patient_ids[row] for row in rows),
            tuple(whole.strata[row] for row in rows),
            tuple(whole.sites[row] for row in rows) if whole.sites else (),
            whole.soft,
        )
        return Vectors(self.rows[rows], self.targets[rows], part)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted probe.

    Attributes
    ----------
    task : Task
        With what its training part taught.
    predict : callable
        Returns activated outputs (n, outputs) of vectors (n, E).
    layer : tuple of Tensor, optional
        Weight (K, E) and bias (K,) of the logits, float64, by which a linear probe reads vectors as they are.
    """

    task: Task
    predict: Callable[[Floats], Floats]
    layer: tuple[Tensor, Tensor] | None = None


def fit_probe(probe: Probe, task: Task, train: Vectors) -> Fitted:
    """Fit a probe to a training part.

    Raises
    ------
    ConfigError
        If the method does not fit the task.
    LabelError
        If the training part lacks a class.
    """
    probe = probe.of_task(task)
    task.require_trainable(train.targets)
    own = task.fit_to(train.targets)
    center, scale = train.rows.mean(0), train.rows.std(0)
    scale[scale == 0] = 1.0

    def scaled(rows: Floats) -> Floats:
        return np.asarray((rows - center) / scale)

    if probe.method == "knn":
        return Fitted(own, lambda rows: _neighbours(probe, own, scaled(train.rows), train.targets, scaled(rows)))
    # a rotation changes neither loss nor penalty, and leaves at most as many columns as there are slides
    basis = np.linalg.svd(scaled(train.rows), full_matrices=False)[2]
    rotated = replace(train, rows=scaled(train.rows) @ basis.T)
    strength = probe.strength or _best_strength(own, rotated, probe.seed)
    weights = fit_linear(own, rotated.rows, train.targets, strength)
    weight = (weights[:-1].T @ torch.from_numpy(basis)) / torch.from_numpy(scale)
    layer = weight, weights[-1] - weight @ torch.from_numpy(center)
    return Fitted(own, lambda rows: own.activate(logits_of(torch.from_numpy(scaled(rows) @ basis.T), weights)), layer)


def save_probe(probe: Probe, study: Study, vectors: Vectors, folder: Path) -> None:
    """Write the model folder of a linear probe of all slides: the mean or the maximum of the tiles, and one layer.

    What is fitted is the probe that the folds have tested; its strength is chosen on inner folds of all slides.
    """
    fitted = fit_probe(probe, study.task, vectors)
    assert fitted.layer is not None  # as `can_be_saved` says
    spec = study.examples.bags.spec
    network = Component(name=probe.pool, options={"embed_dims": (), "level": "embedding"})
    recipe = Recipe(aggregator=network, training=Training(standardize=False))
    model = build_model(recipe, fitted.task, spec.dim)
    weight, bias = (part.to(torch.float32) for part in fitted.layer)
    model.load_state_dict({"classifier.weight": weight, "classifier.bias": bias})
    level = "patient" if isinstance(study.examples.bags, PatientBags) else "slide"
    facts = {"probe": probe.in_words(study.task), "level": level, "n_train": len(vectors.rows)}
    files = {SEEN: write_seen(folder, study.examples, None)}
    card = ModelCard(
        recipe=recipe, task=fitted.task.model_dump(mode="json"), features=spec, training=facts, files=files
    )
    save_model(folder, model.eval(), card)


def can_be_saved(probe: Probe) -> bool:
    """Return whether a probe is a model of tiles: it is linear in their mean or maximum."""
    return probe.method != "knn" and probe.pool != "mean_sd"


def _best_strength(task: Task, train: Vectors, seed: int) -> float:
    """Return the strength with the least loss on inner folds; that of the middle where patients are too few."""
    groups = len(train.cohort.groups())
    if groups < 2 * INNER_FOLDS:
        return 1.0
    place = {name: number for number, name in enumerate(train.cohort.slide_ids)}
    parts = deal(train.cohort, INNER_FOLDS, np.random.default_rng(seed))
    losses = np.zeros(len(STRENGTHS))
    for part in parts:
        held = np.array([place[name] for name in part])
        rest = np.setdiff1d(np.arange(len(place)), held)
        weights: Tensor | None = None
        for number, strength in enumerate(STRENGTHS):  # from strong to weak, each from where the last one ended
            weights = fit_linear(task, train.rows[rest], train.targets[rest], strength, weights)
            said = logits_of(torch.from_numpy(train.rows[held]), weights)
            losses[number] += float(task.bag_losses(said, train.targets[held]).sum())
    return STRENGTHS[int(np.argmin(losses))]


def _neighbours(probe: Probe, task: Task, train: Floats, targets: Tensor, rows: Floats) -> Floats:
    """Return the mean answer of the nearest training slides by the angle between vectors."""
    near = np.argsort(-_unit(rows) @ _unit(train).T, axis=1, kind="stable")[:, : min(probe.neighbours, len(train))]
    classes: tuple[str, ...] = getattr(task, "classes", ())
    answers = np.eye(len(classes))[targets.numpy()] if classes else targets.numpy().reshape(len(targets), -1)
    return np.asarray(answers[near].mean(1), np.float64)


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def probe_study(
    study: Study,
    out: Path | str = Path("probe"),
    *,
    probe: Probe | None = None,
    splits: Sequence[FoldSplits] | None = None,
    shots: Sequence[int] = (),
    repeats: int = 20,
    resamples: int = RESAMPLES,
    flow: Flow | None = None,
) -> dict[str, Any]:
    """Fit and test a probe on every fold of a study.

    Parameters
    ----------
    study : Study
        See `eosin.mil._study.open_study`; of vectors of slides, or of tiles that are pooled here.
    out : Path
        Receives ``predictions.csv`` and ``metrics.json`` as a cross-validation does, ``few_shot.csv``, and in
        ``model`` the linear probe of all slides, for `eosin.mil._predict.predict`, unless it reads deviations.
    probe : Probe, optional
    splits : sequence of Split, or of sequences of Split, optional
        As `eosin.mil._study.Study.splits` returns; five new folds by patient unless given. The validation part, with
        which a model chooses when to stop, is part of what a probe is fitted to.
    shots : sequence of int
        Numbers of patients of each class that few-shot probes are fitted to.
    repeats : int
        Draws of each number in each fold.
    resamples : int
        Of the bootstrap over patients.
    flow : Flow, optional
        What became of the slides that were given.

    Returns
    -------
    dict
        As `eosin.mil._crossval.crossval` returns; with ``few_shot`` where there are shots.

    Raises
    ------
    ConfigError
        If the method does not fit the task, or few-shot is asked of a task without classes.
    LabelError
        If the splits leak, or a class of a training part has fewer patients than a shot.
    """
    chosen = (probe or Probe()).of_task(study.task)
    parts, folder = splits or study.splits(seed=chosen.seed), Path(out)
    for fold in parts:
        check_splits(inner_splits(fold), study.cohort)
    require_shots(study.task, study.cohort, parts, shots)
    require_no_models(folder)
    vectors = Vectors.of(study.examples, study.cohort, chosen.pool)
    saved = [f"{MODEL}/{name}" for name in (CARD, WEIGHTS, SEEN)] if can_be_saved(chosen) else []
    more = [*saved, *([FEW_SHOT] if shots else [])]
    begin_set(folder, [PREDICTIONS, METRICS, *more], pattern=MODEL)
    folds = [_fold(chosen, study.task, vectors, number, fold) for number, fold in enumerate(parts)]
    summary = write_folds(chosen, study.task, folds, folder, resamples=resamples, flow=flow)
    if shots:
        few = few_shot(chosen, study.task, vectors, parts, shots=shots, repeats=repeats)
        write_text(folder / FEW_SHOT, csv_text([list(few[0]), *(list(row.values()) for row in few)]))
        summary["few_shot"] = summarise_shots(few)
    if saved:
        save_probe(chosen, study, vectors, folder / MODEL)
    finish_set(folder, [*result_files(summary), *more])
    return summary


def require_no_models(out: Path) -> None:
    """Refuse the folder of a cross-validation, whose predictions would be overwritten and not its models.

    Raises
    ------
    ConfigError
    """
    if any(out.glob("fold_*")):
        raise ConfigError(f"{out}: holds the models of a cross-validation; pass another --out")


def write_baseline(study: Study, splits: Sequence[FoldSplits], out: Path, *, probe: Probe | None = None) -> Path | None:
    """Write ``predictions.csv`` of a probe on the folds of a cross-validation, for the report of a model.

    Returns
    -------
    Path, optional
        None where the task cannot be probed, which is logged.
    """
    try:
        chosen = (probe or Probe()).of_task(study.task)
        vectors = Vectors.of(study.examples, study.cohort, chosen.pool)
        folds = [_fold(chosen, study.task, vectors, number, fold) for number, fold in enumerate(splits)]
    except EosinError as error:
        logger.warning("the report has no baseline: %s", error)
        return None
    begin_set(out, [PREDICTIONS], pattern=NO_FOLDER)
    write_predictions(out / PREDICTIONS, folds)
    finish_set(out, [PREDICTIONS])
    return out / PREDICTIONS


def training_ids(fold: FoldSplits) -> tuple[str, ...]:
    """Return what a probe of a fold is fitted to: the training and validation parts of its first split."""
    split = inner_splits(fold)[0]
    return (*split.train, *split.val)


def _fold(probe: Probe, task: Task, vectors: Vectors, number: int, fold: FoldSplits) -> Fold:
    train, test = vectors.at(training_ids(fold)), vectors.at(inner_splits(fold)[0].test)
    fitted = fit_probe(probe, task, train)
    outputs, targets = fitted.predict(test.rows), test.targets.numpy()
    ids, patients = test.cohort.slide_ids, test.cohort.patient_ids
    metrics = fitted.task.metrics(outputs, targets)
    return Fold(number, ids, patients, outputs, targets, metrics, fitted.task, n_train=len(train.rows))


def require_shots(task: Task, cohort: Cohort, folds: Sequence[FoldSplits], shots: Sequence[int]) -> None:
    """Refuse few-shot probes that cannot be drawn, before any work.

    Raises
    ------
    ConfigError
        If the task has no classes, or a number is not positive.
    LabelError
        If a class of a training part has fewer patients than a number.
    """
    if not shots:
        return
    if not getattr(task, "classes", ()):
        raise ConfigError(f"few-shot probes need one class per slide; task {task.kind} has none; remove --few-shot")
    if min(shots) < 1:
        raise ConfigError(f"few-shot with {min(shots)} patients of each class: pass numbers from 1")
    for number, fold in enumerate(folds):
        part = cohort.select(training_ids(fold))
        for label in sorted(set(cohort.strata)):
            known = {patient for patient, one in zip(part.patient_ids, part.strata, strict=True) if one == label}
            if len(known) < max(shots):
                raise LabelError(
                    f"few-shot with {max(shots)} patients of each class: class {label} has {len(known)} in the "
                    f"training part of fold {number}; pass smaller numbers to --few-shot"
                )


def few_shot(
    probe: Probe,
    task: Task,
    vectors: Vectors,
    folds: Sequence[FoldSplits],
    *,
    shots: Sequence[int],
    repeats: int,
) -> list[dict[str, float | int | None]]:
    """Return the metrics of probes that are fitted to one slide of each of `shots` patients of each class.

    Of `repeats` draws in each fold, tested on the fold's test part. The strength is 1 unless the probe states one:
    there is nothing to choose it on.
    """
    fixed = probe.model_copy(update={"strength": probe.strength or 1.0})
    found: list[dict[str, float | int | None]] = []
    for number, fold in enumerate(folds):
        train, test = vectors.at(training_ids(fold)), vectors.at(inner_splits(fold)[0].test)
        for k in sorted(shots):
            for repeat in range(repeats):
                rng = np.random.default_rng([probe.seed, number, k, repeat])
                fitted = fit_probe(fixed, task, train.at(_draw(train.cohort, k, rng)))
                metrics: Metrics = fitted.task.metrics(fitted.predict(test.rows), test.targets.numpy())
                found.append({"k": k, "fold": number, "repeat": repeat, **metrics})
    return found


def _draw(cohort: Cohort, k: int, rng: np.random.Generator) -> list[str]:
    """Return one slide of each of k patients of each class."""
    drawn = []
    for label in sorted(set(cohort.strata)):
        slides_of: dict[str, list[str]] = {}
        for slide, patient, one in zip(cohort.slide_ids, cohort.patient_ids, cohort.strata, strict=True):
            if one == label:
                slides_of.setdefault(patient, []).append(slide)
        patients = sorted(slides_of)
        drawn += [str(rng.choice(slides_of[patients[i]])) for i in rng.choice(len(patients), k, replace=False)]
    return drawn


def summarise_shots(rows: Sequence[Mapping[str, float | int | None]]) -> list[dict[str, float | int | None]]:
    """Return mean and standard deviation of each metric over folds and draws, a row per number of patients."""
    names = [name for name in rows[0] if name not in ("k", "fold", "repeat")]
    made: list[dict[str, float | int | None]] = []
    for k in sorted({row["k"] for row in rows if row["k"] is not None}):
        of_k = [row for row in rows if row["k"] == k]
        line: dict[str, float | int | None] = {"k": k, "n": len(of_k)}
        for name in names:
            values = [value for row in of_k if (value := row[name]) is not None]
            line[name] = float(np.mean(values)) if values else None
            line[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        made.append(line)
    return made
