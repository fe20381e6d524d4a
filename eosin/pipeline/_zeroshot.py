"""Classes of slides from sentences: how alike tiles and prompts are, without any training.

A tile's score of a class is the cosine between its feature and the class's vector, the mean of its prompts. A slide's
score is the mean of its `top_k` largest (MI-Zero; Lu et al., CVPR 2023, https://arxiv.org/abs/2306.07831), and its
probabilities are the softmax over the classes of the scores times the factor that the model was trained with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from eosin._batch import Outcome, run_batch
from eosin._files import write_text
from eosin._filesets import begin_set, finish_set
from eosin._records import Record, Report
from eosin._tables import csv_text
from eosin.errors import ConfigError, EosinError, FeatureMismatchError, LabelError
from eosin.features._bag import FeatureBag
from eosin.features._store import find_bags, read_bag, read_spec
from eosin.features._text_towers import embed_classes, find_text_tower, load_text_tower
from eosin.mil._crossval import METRICS, PREDICTIONS, Fold, result_files, write_folds
from eosin.mil._evaluate import RESAMPLES
from eosin.mil._probe import NO_FOLDER, require_no_models
from eosin.mil._study import Study
from eosin.mil.tasks._classification import Binary, Classification
from eosin.options import Options, read_yaml

TOP_K = 50
SCORES = "scores.csv"
PLACE = "CLASSNAME"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Prompts:
    """What sentences stand for which class.

    Attributes
    ----------
    classes : mapping of str to tuple of str
        Sentences of each class, in the order of the file.
    """

    classes: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML file: a sentence or a list of them by class.

        With the keys ``classes`` and ``templates``, every name of a class is put into every template in the place of
        ``CLASSNAME``.

        Raises
        ------
        ConfigError
            If it is not such a file, has one class only, or a class without a sentence.
        """
        data = read_yaml(path)
        templates: Sequence[str] = (PLACE,)
        if set(data) == {"classes", "templates"}:
            templates, data = _sentences(data["templates"], "templates", path), data["classes"]
        if not isinstance(data, Mapping) or len(data) < 2:
            found = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ConfigError(f"{path}: prompts of at least two classes are needed, found {found or 'none'}")
        unplaced = [template for template in templates if PLACE not in template]
        if unplaced:
            raise ConfigError(f"{path}: the template {unplaced[0]!r} does not contain {PLACE}")
        names = {str(label): _sentences(said, str(label), path) for label, said in data.items()}
        return cls(
            {
                label: tuple(template.replace(PLACE, name) for template in templates for name in said)
                for label, said in names.items()
            }
        )


def _sentences(said: object, label: str, path: Path) -> tuple[str, ...]:
    texts = [said] if isinstance(said, str) else said
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) and one.strip() for one in texts):
        raise ConfigError(f"{path}: {label} needs a sentence or a list of sentences")
    return tuple(texts)


class ZeroShot(Options):
    """What metrics.json says of how slides were classified.

    Parameters
    ----------
    encoder : str
        Whose text tower embedded the prompts.
    top_k : int
        Tiles of a slide that are averaged for each class.
    prompts : mapping of str to tuple of str
        Sentences by class.
    """

    encoder: str
    top_k: int
    prompts: dict[str, tuple[str, ...]]


def slide_scores(features: NDArray[np.floating[Any]], classes: NDArray[np.float32], top_k: int) -> Floats:
    """Return the score of each class, (classes,), of the tiles' features (n, D); a slide has at least one tile."""
    rows = functional.normalize(torch.from_numpy(np.array(features, np.float32)), dim=1)  # a copy: a map is read-only
    alike = rows @ torch.from_numpy(classes).T  # (n, classes)
    return np.asarray(alike.topk(min(top_k, len(rows)), dim=0).values.double().mean(0))


def zeroshot_slides(
    features: Path | str | Mapping[str, Path],
    prompts: Path | str,
    out: Path | str = Path("zeroshot"),
    *,
    weights: Path | str | None = None,
    top_k: int = TOP_K,
    allow_remote_code: bool = False,
    study: Study | None = None,
    progress: Callable[[Record], None] | None = None,
) -> "ZeroShotResult":
    """Classify slides by sentences.

    Parameters
    ----------
    features : Path or mapping of str to Path
        Feature files of a tile encoder with a text tower: ``plip``, ``conch_v1_contrast``, ``keep``.
    prompts : Path
        YAML file, see `Prompts.read`.
    out : Path
        Folder that receives ``scores.csv``, one row per slide; with a study ``predictions.csv`` and ``metrics.json``.
    weights : Path, optional
        Local folder of the model.
    top_k : int
        Tiles of a slide that are averaged for each class.
    allow_remote_code : bool
        Whether code of the model's repository may run with the rights of the user.
    study : Study, optional
        Labels; the names of the classes are those of the prompts.
    progress : callable, optional
        Is given each slide's record.

    Returns
    -------
    ZeroShotResult

    Raises
    ------
    ConfigError
        If prompts or options cannot be used, code is not allowed, or the model cannot be had.
    FeatureMismatchError
        If no file has features of an encoder with a text tower.
    LabelError
        If the labels of the study are not the classes of the prompts.
    """
    if top_k < 1:
        raise ConfigError(f"top-k {top_k}: pass 1 or more")
    said, folder = Prompts.read(Path(prompts)), Path(out)
    require_no_models(folder)
    files = dict(features) if isinstance(features, Mapping) else find_bags(Path(features))
    if study is not None:
        require_classes_of(study, said)
    encoder = _encoder_of(files)
    tower = load_text_tower(
        encoder, weights=None if weights is None else Path(weights), allow_remote_code=allow_remote_code
    )
    judge = _Judge(encoder, tower.scale, embed_classes(tower, list(said.classes.values())).numpy(), top_k)
    rows: dict[str, Floats] = {}

    def work(slide: str) -> Outcome:
        bag = read_bag(files[slide])
        judge.require(bag, files[slide])
        if not bag.n_instances:
            return Outcome("empty", "no tiles")
        rows[slide] = slide_scores(bag.features, judge.classes, top_k)
        return Outcome()

    report = run_batch(list(files), work, key=str, stage="zeroshot", progress=progress)
    begin_set(folder, [SCORES, PREDICTIONS, METRICS], pattern=NO_FOLDER)
    write_text(folder / SCORES, _table(report, rows, list(said.classes), judge))
    how = ZeroShot(encoder=encoder, top_k=top_k, prompts=dict(said.classes))
    metrics = None if study is None else _judged(study, rows, judge, how, folder)
    finish_set(folder, [SCORES, *([] if metrics is None else result_files(metrics))])
    return ZeroShotResult(folder, report, metrics)


@dataclass(frozen=True)
class ZeroShotResult:
    """What `zeroshot_slides` found.

    Attributes
    ----------
    folder : Path
    report : Report
        What became of each slide.
    metrics : dict, optional
        As `eosin.mil._crossval.crossval` returns, of one fold; None without labels.
    """

    folder: Path
    report: Report
    metrics: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class _Judge:
    """The classes as vectors, and the factor of the softmax."""

    encoder: str
    scale: float
    classes: NDArray[np.float32]
    top_k: int

    def require(self, bag: FeatureBag, path: Path) -> None:
        if bag.spec.encoder != self.encoder or bag.spec.dim != self.classes.shape[1]:
            raise FeatureMismatchError(
                path,
                f"has features of {bag.spec.encoder} ({bag.spec.dim} wide); the prompts are embedded by {self.encoder} "
                f"({self.classes.shape[1]} wide)",
            )

    def probabilities(self, scores: Floats) -> Floats:
        return np.asarray(torch.from_numpy(self.scale * scores).softmax(-1))


def _encoder_of(files: Mapping[str, Path]) -> str:
    """Return the encoder of the first readable file, if it has a text tower."""
    for path in files.values():
        try:
            encoder = read_spec(path).encoder
        except EosinError:
            continue
        return find_text_tower(encoder).encoder
    raise ConfigError(f"none of the {len(files)} feature files can be read; `eosin verify` says why")


def require_classes_of(study: Study, prompts: Prompts) -> None:
    """Refuse labels that are not the classes of the prompts.

    Raises
    ------
    LabelError
    """
    classes: tuple[str, ...] = getattr(study.task, "classes", ())
    if not isinstance(study.task, Classification | Binary) or set(classes) != set(prompts.classes):
        raise LabelError(
            f"the labels are {', '.join(classes) or study.task.kind} and the prompts are of "
            f"{', '.join(prompts.classes)}; the names of both must be the same"
        )


def _table(report: Report, rows: Mapping[str, Floats], classes: Sequence[str], judge: _Judge) -> str:
    lines: list[list[object]] = [
        ["slide_id", "status", "reason", "message", *(f"prob_{name}" for name in classes), "predicted",
         *(f"cosine_{name}" for name in classes)]
    ]  # fmt: skip
    for record in report.records:
        found: list[object] = [""] * (2 * len(classes) + 1)
        if record.slide_id in rows:
            scores = rows[record.slide_id]
            found = [*judge.probabilities(scores), classes[int(scores.argmax())], *scores]
        lines.append([record.slide_id, record.status, record.reason, record.message, *found])
    return csv_text(lines)


def _judged(study: Study, rows: Mapping[str, Floats], judge: _Judge, how: ZeroShot, out: Path) -> dict[str, Any]:
    """Write the predictions and metrics of the labelled slides, as one fold that nobody was trained for."""
    known = study.examples.subset(name for name in study.examples.ids if name in rows)
    order = [list(how.prompts).index(name) for name in getattr(study.task, "classes", ())]
    outputs = np.stack([judge.probabilities(rows[name])[order] for name in known.ids])
    targets = known.targets.numpy()
    fold = Fold(0, known.ids, known.patient_ids, outputs, targets, study.task.metrics(outputs, targets), study.task)
    return write_folds(how, study.task, [fold], out, resamples=RESAMPLES)
