"""`eosin studies`, and how other commands find the study that is meant."""

import csv
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from eosin.cli._arguments import Model
from eosin.cli._common import Done, command
from eosin.mil.tasks._classification import Classification
from eosin.pipeline._studies import StudyKey, place_study
from eosin.wsi._job import JobFolder

from .conftest import Run

TASK = Classification(classes=("normal", "tumour"))


def a_study(job: Path, name: str, *, signal: float, lr: float, n: int = 40, finished: bool = True) -> Path:
    """Write what a study of `n` patients leaves behind, without training."""
    study = place_study(
        JobFolder(job), StudyKey(name * 16, {"recipe.training.lr": lr, "folds": 5}, "t", "f", "he"), name
    )
    study.begin()
    if not finished:
        return study.path
    truth = np.arange(n) % 2
    score = 1 / (1 + np.exp(-(signal * (truth - 0.5) + np.random.default_rng(0).normal(size=n))))
    table = TASK.table(np.stack([1 - score, score], 1))
    (study.path / "crossval").mkdir()
    (study.path / "model").mkdir()
    with (study.path / "crossval/predictions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["fold", "slide_id", "patient_id", "label", *table])
        for row in range(n):
            label = TASK.classes[truth[row]]
            rows.writerow([row % 5, f"s{row}", f"p{row}", label, *(column[row] for column in table.values())])
    metrics = {
        "task": TASK.model_dump(mode="json"),
        "out_of_fold": {"auc": {"value": 0.5 + signal / 10, "lower": 0.4, "upper": 0.9}},
    }
    (study.path / "crossval/metrics.json").write_text(json.dumps(metrics))
    (study.path / "model/model.json").write_text("{}")
    return study.path


def test_studies_are_compared_with_the_oldest(run: Run, tmp_path: Path) -> None:
    a_study(tmp_path, "a", signal=0.5, lr=1e-4)
    a_study(tmp_path, "b", signal=3.0, lr=1e-3)
    a_study(tmp_path, "c", signal=3.0, lr=1e-3, n=30)
    a_study(tmp_path, "d", signal=3.0, lr=1e-2, finished=False)
    result = run("studies", tmp_path)
    assert result.exit_code == 0, result.output
    rows = {cells[1].strip(): cells for line in result.stdout.splitlines() if len(cells := line.split("│")) > 3}
    assert "recipe.training.lr" in result.stdout
    assert "folds" not in result.stdout
    assert [text in "".join(rows["b"]) for text in ("0.001", "auc 0.800", "0.400 to 0.900", "+0.")] == [True] * 4
    assert "not comparable" in "".join(rows["c"])
    assert "unfinished" in "".join(rows["d"])
    assert "c: not comparable with a: only one of the two runs has predictions for" in result.stderr
    assert "differences by DeLong over the same patients" in result.stderr
    turned = run("studies", tmp_path, "--against", "b")
    assert "-0." in next(line for line in turned.stdout.splitlines() if line.split("│")[1:2] == [" a     "])


def test_a_folder_without_studies(refused: Run, tmp_path: Path) -> None:
    assert "has no study; make one with eosin run" in refused("studies", tmp_path)


@pytest.mark.parametrize(
    ("text", "arguments", "found"),
    [
        ("job: job\n", (), "studies/b/model"),
        ("job: job\nstudy: a\n", (), "studies/a/model"),
        ("job: job\n", ("--set", "study=a"), "studies/a/model"),
        ("job: empty\n", (), "empty/model"),
    ],
)
def test_a_study_file_means_the_newest_study_or_the_named_one(
    tmp_path: Path, text: str, arguments: tuple[str, ...], found: str
) -> None:
    a_study(tmp_path / "job", "a", signal=1.0, lr=1e-4)
    a_study(tmp_path / "job", "b", signal=1.0, lr=1e-3)
    a_study(tmp_path / "job", "c", signal=1.0, lr=1e-2, finished=False)
    seen = []

    def go(*, model: Model, features: Annotated[Path, typer.Option()]) -> Done:
        seen.append((model, features))
        return Done()

    (tmp_path / "s.yaml").write_text(text)
    small = typer.Typer(pretty_exceptions_enable=False)
    small.command()(command("tiling", of_job={"model": "model"})(go))
    result = CliRunner().invoke(small, [str(tmp_path / "s.yaml"), *arguments])
    assert result.exit_code == 0, result.stderr
    (model, features) = seen[0]
    assert model == tmp_path / (found if found.startswith("empty") else f"job/{found}")
    assert features.parent.parent == tmp_path / text.split()[1]


@pytest.mark.parametrize("name", ["train", "crossval"])
def test_a_study_is_not_overwritten_by_a_training(
    run: Run, features: Path, cohort: Path, tmp_path: Path, name: str
) -> None:
    path = a_study(tmp_path, "a", signal=1.0, lr=1e-4)
    arguments = ("--features", features, "--labels", cohort / "labels.csv", "--out", path / "model")
    result = run(name, *arguments)
    assert (result.exit_code, "belongs to a study of eosin run" in result.stderr) == (2, True)
