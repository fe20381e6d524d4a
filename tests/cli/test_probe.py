"""`eosin probe` on pooled tiles and on vectors, and the baseline in the report of a model."""

import csv
import json
from pathlib import Path

import pytest

from .conftest import Run


def test_vectors_are_probed_with_a_report(features: Path, cohort: Path, run: Run, tmp_path: Path) -> None:
    assert run("embed", "--features", features, "--out", tmp_path / "mean").exit_code == 0
    labels = ("--labels", cohort / "labels.csv", "--folds", 2)
    result = run("probe", "--features", tmp_path / "mean", *labels, "--few-shot", "1", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    paths = [tmp_path / "out" / n for n in ("metrics.json", "predictions.csv", "few_shot.csv", "model", "report.html")]
    assert result.stdout.split() == list(map(str, paths))
    assert "column 'slide_id'" in result.stderr  # what was understood is said, and with it warnings about sites
    assert json.loads(paths[0].read_text())["recipe"]["method"] == "logistic"
    page = paths[4].read_text()
    assert "Few-shot" in page
    assert "mean of the tiles, logistic regression" in page


@pytest.mark.long
def test_a_probe_answers_for_slides_and_draws_maps(features: Path, cohort: Path, run: Run, tmp_path: Path) -> None:
    labels = ("--labels", cohort / "labels.csv", "--folds", 2)
    assert run("probe", "--features", features, *labels, "--out", tmp_path / "out").exit_code == 0
    given = ("--model", tmp_path / "out/model", "--features", features)
    assert run("predict", *given, "--out", tmp_path / "said.csv").exit_code == 0
    with (tmp_path / "said.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list(features.glob("*.h5")))
    result = run(
        "heatmap",
        *given,
        "--slides",
        cohort / "slides",
        "--out",
        tmp_path / "maps",
        "--maps",
        "effect",
        "--format",
        "png",
    )
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "maps").rglob("*.png"))) == len(rows)


def test_refusals_are_one_line(features: Path, cohort: Path, run: Run, refused: Run, tmp_path: Path) -> None:
    def line(*arguments: object) -> str:
        given = ("--features", features, "--labels", cohort / "labels.csv", "--folds", 2, "--out", tmp_path / "out")
        return refused("probe", *given, *arguments)

    assert "few-shot with 32 patients" in line("--few-shot", "1,32")
    assert "whole numbers" in line("--few-shot", "0,two")
    assert "method" in line("--method", "svm")
    assert "does not fit task classification" in line("--method", "cox")
    given = ("--features", features, "--labels", cohort / "labels.csv", "--folds", 2, "--out", tmp_path / "out")
    result = run("probe", *given, "--target", "label,patient_id")
    assert result.exit_code == 2
    assert "pass --task survival, cox or multilabel" in result.stderr.splitlines()[-1]  # behind what was understood
    assert not (tmp_path / "out").exists()
