"""`eosin init`: what it guesses, and what it leaves to a person."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from eosin.cli.app import app
from eosin.mil._tables import LabelTable
from eosin.pipeline._draft import MARK, guess_target

N = 12
"""Slides of the cohort."""


def init(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


@pytest.fixture(scope="module")
def slides(cohort: Path) -> Path:
    return cohort / "slides"


def table(folder: Path, *, without_slide: int = 0, header: str = "slide,patient,Diagnosis,Age,Remark,Stage") -> Path:
    rows = N + without_slide
    lines = [
        f"S{n:03},p{n // 2},{'Tumour' if n % 4 < 2 else 'Normal'},{50 + n},x{n},{'ab'[n % 2]}" for n in range(rows)
    ]
    path = folder / "labels 2024.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_a_clear_case_needs_no_decision_and_passes_the_check(slides: Path, tmp_path: Path) -> None:
    labels = table(tmp_path)
    made = init(slides, labels, "--out", tmp_path / "study.yaml")
    assert made.exit_code == 0, made.stderr
    assert made.stdout.split() == [str(tmp_path / "study.yaml")]
    study = yaml.safe_load((tmp_path / "study.yaml").read_text())
    assert study["slides"] == str(slides)
    assert study["labels"] == "labels 2024.csv"
    assert (study["target"], study["task"], study["folds"]) == ("Diagnosis", "classification", 3)
    assert MARK not in (tmp_path / "study.yaml").read_text()
    checked = CliRunner().invoke(app, ["check", str(tmp_path / "study.yaml")])
    assert checked.exit_code == 0, checked.stderr


def test_what_cannot_be_decided_is_marked_and_named(slides: Path, tmp_path: Path) -> None:
    labels = table(tmp_path, without_slide=8, header="slide,patient,Marker,Age,Remark,Stage")
    made = init("--slides", slides, "--labels", labels, "--out", tmp_path / "s.yml")
    assert made.exit_code == 0, made.stderr
    text = (tmp_path / "s.yml").read_text()
    assert "to decide, marked DECIDE in the file: target, missing" in made.stderr
    assert "target:  # DECIDE: Marker (Tumour: 10, Normal: 10); Stage (a: 10, b: 10)" in text
    assert "missing:  # DECIDE: 8 of 20 rows have no slide or no label" in text
    assert yaml.safe_load(text)["target"] is None


def test_every_line_of_the_file_is_explained(slides: Path, tmp_path: Path) -> None:
    init(slides, table(tmp_path), "--out", tmp_path / "study.yaml")
    parts = (tmp_path / "study.yaml").read_text().split("\n\n")[1:]
    assert len(parts) > 12
    assert all(part.startswith("# ") and len(part.strip().splitlines()) == 2 for part in parts)


def test_a_file_is_not_overwritten(slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "study.yaml"
    out.write_text("mine")
    refused = init(slides, table(tmp_path), "--out", out)
    assert (refused.exit_code, out.read_text()) == (2, "mine")
    assert "--force" in refused.stderr
    assert init(slides, table(tmp_path), "--out", out, "--force").exit_code == 0


@pytest.mark.parametrize("arguments", [[], ["slides"], ["labels.csv"], ["a.csv", "b.csv", "slides"]])
def test_slides_and_one_table_are_needed(arguments: list[str]) -> None:
    result = init(*arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("columns", "target", "task"),
    [
        ({"label": ["a", "b"] * 6}, "label", "classification"),
        ({"grade": ["1", "2", "3"] * 4}, "grade", "classification"),
        ({"score": [f"{n}.5" for n in range(12)]}, "score", "regression"),
        ({"time": [str(n) for n in range(12)], "event": ["0", "1"] * 6}, "time,event", "survival"),
        ({"outcome": ["a", "b"] * 6, "stage": ["x", "y"] * 6}, "outcome", "classification"),
        ({"a": ["a", "b"] * 6, "b": ["x", "y"] * 6}, None, "classification"),
        ({"remark": [f"r{n}" for n in range(12)]}, None, "classification"),
        ({"received": ["2024-01-01", "2024-01-02"] * 6, "er": ["+", "-"] * 6}, "er", "classification"),
        ({"site": ["x", "y"] * 6, "er": ["+", "-", ""] * 4}, "er", "classification"),
    ],
)
def test_target_and_task(columns: dict[str, list[str]], target: str | None, task: str) -> None:
    ids = tuple(f"s{n}" for n in range(12))
    lines = guess_target(LabelTable(ids, ids, {name: tuple(values) for name, values in columns.items()}))
    assert [line.value for line in lines] == [target, task]


def test_values_of_a_table_cannot_break_out_of_their_comment(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(
        "slide,patient,label\n" + "".join(f'S{n:03},p{n},"{"a: {b #" if n % 2 else "[x"}\njob: /"\n' for n in range(N))
    )
    assert init(slides, tmp_path / "l.csv", "--out", tmp_path / "study.yaml").exit_code == 0
    study = yaml.safe_load((tmp_path / "study.yaml").read_text())
    assert (study["job"], study["target"]) == ("job", "label")
