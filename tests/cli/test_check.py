"""`eosin check`, and the list of problems that other commands print before any work."""

import csv
from pathlib import Path

import pytest

from .conftest import Run


@pytest.fixture(scope="module")
def broken(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a table with look-alikes, a missing patient, a blank label, slides that are not there and a rare class."""
    with (cohort / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row["patient_id"] = f"Q{number}"
        row["label"] = "normal" if number else "tumour"
    rows[1]["patient_id"] = "q2"
    rows[3]["patient_id"] = "nan"
    rows[4]["label"] = ""
    path = tmp_path_factory.mktemp("broken") / "labels.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows([*rows, {**rows[5], "slide_id": "nowhere"}, {**rows[5], "slide_id": "neither"}])
    return path


@pytest.mark.parametrize("name", ["check", "run"])
@pytest.mark.long
def test_every_problem_is_printed_with_its_cure_and_nothing_is_written(
    run: Run, cohort: Path, broken: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    result = run(
        name, "--slides", cohort / "slides", "--slides", tmp_path / "none", "--labels", broken,
        "--job", tmp_path / "file/job", "--encoder", "uni", "--recipe", "abmill", "--device", "cuda:99",
        "--max-pen", "2", "--set", "formats=[pngg]", "--set", "tiling.mppp=3", "--study", "a/b",
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (2, "")
    first, *lines = result.stderr.splitlines()
    assert first == f"error: {len(lines)} problems; nothing was done"
    expected = {
        "named 'abmill'": "did you mean abmil",
        "named 'mppp'": "did you mean mpp",
        "quality.max_pen": "at most 1",
        "no such file": "correct --slides",
        "no id of a patient": "complete the table",
        "'q2' = 'Q2'": "--ids merge",
        "2 of 13 labelled slides": "--missing drop",
        "1 slide has no label": "--missing drop",
        "'tumour' has 1 patient": "fewer folds",
        "gated and there is no token": "hf auth login",
        "'pngg'": "did you mean png",
        "'cuda:99' cannot be used": "--device auto",
        "is a file": "correct --job",
        "--study 'a/b'": "use letters",
    }
    for what, cure in expected.items():
        assert any(what in line and cure in line for line in lines), (what, result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_is_the_fault_of_the_machine(
    refused: Run, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 0}))
    line = refused(
        "check",
        "--slides",
        cohort / "slides",
        "--labels",
        cohort / "labels.csv",
        "--job",
        tmp_path,
        "--folds",
        2,
        code=3,
    )
    assert "0 GiB of free space" in line


def test_check_says_in_a_few_lines_that_all_is_right(run: Run, cohort: Path, tmp_path: Path) -> None:
    arguments = ("--slides", cohort / "slides", "--labels", cohort / "labels.csv", "--job", tmp_path / "job")
    result = run("check", *arguments, "--folds", 2)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines()[0] == "slides: 12 found, headers opened"
    assert result.stderr.splitlines()[-1] == "no problems found"
    assert "tumour" in result.stderr
    assert not list(tmp_path.iterdir())
    study = tmp_path / "study.yaml"
    study.write_text(f"slides: {cohort / 'slides'}\nlabels: {cohort / 'labels.csv'}\njob: job\nfolds: 2\n")
    assert _without_disk(run("check", study).stderr) == _without_disk(result.stderr)


def _without_disk(text: str) -> list[str]:
    """Return the lines that do not change while other programs write to the disk."""
    return [line for line in text.splitlines() if not line.startswith("disk: ")]


@pytest.mark.parametrize("name", ["crossval", "train"])
def test_training_lists_what_is_wrong_before_it_begins(
    run: Run, features: Path, broken: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    result = run(
        name, "--features", features, "--labels", broken, "--out", tmp_path / "file/out", "--recipe", "abmill",
        "--device", "cuda:99", "--level", "tile", "--cache-gb", "-1",
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (2, "")
    told = (
        "abmil", "known: patient, slide", "a cache of -1 GB", "no id of a patient", "2 of 13 labelled slides have no",
        "1 slide has no label", "cuda:99", "is a file",
    )  # fmt: skip
    for what in told:
        assert what in result.stderr, what
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_predictions_list_what_is_wrong_before_they_begin(run: Run, tmp_path: Path) -> None:
    base = ("predict", "--model", tmp_path / "none", "--out", tmp_path / "p.doc", "--device", "cuda:99", "--ids", "all")
    result = run(*base, "--slides", tmp_path / "slides", "--job", tmp_path / "job", "--patients", tmp_path / "t.csv")
    assert (result.exit_code, result.stdout) == (2, "")
    told = (
        "known: ask",
        "t.csv: cannot be read",
        "p.doc: predictions",
        "cuda:99",
        "none: is not a",
        "correct --slides",
    )
    for what in told:
        assert what in result.stderr, (what, result.stderr)
    assert "nothing to predict" in run(*base).stderr
    assert not list(tmp_path.iterdir())


def test_the_demo_paints_nothing_when_it_cannot_go_on(run: Run, tmp_path: Path) -> None:
    result = run(
        "demo", "--out", tmp_path / "demo", "--device", "cuda:99", "--set", "pipeline.encoder=he_textur",
        "--set", "pipeline.formats=[pngg]",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.stderr.startswith("error: 3 problems; nothing was done")
    assert not list(tmp_path.iterdir())


def test_a_table_that_lacks_a_slide_or_two_goes_through(run: Run, cohort: Path, tmp_path: Path) -> None:
    text = (cohort / "labels.csv").read_text()
    labels = tmp_path / "labels.csv"
    base = ("check", "--slides", cohort / "slides", "--labels", labels, "--job", tmp_path / "job", "--folds", 2)
    labels.write_text(f"{text}P900,gone,normal\nP901,lost,normal\n")
    strict = run(*base)
    assert (strict.exit_code, "2 of 14 labelled slides" in strict.stderr) == (2, True)
    assert run(*base, "--missing", "drop").exit_code == 0
    labels.write_text(f"{text}P900,gone,normal\n")
    few = run(*base)
    assert few.exit_code == 0, few.stderr
    assert "warning: 1 row has no slide or no label and will be left out: gone" in few.stderr
    assert run(*base, "--missing", "error").exit_code == 2
