"""A clinic's workbook, with everything that such workbooks have, through `eosin check` and `eosin run`."""

import csv
import datetime
from pathlib import Path

import pytest
from openpyxl import Workbook

from .conftest import Run

SPELLINGS = {"tumour": ("Tumour", "Tumour ", "Tumour\u00a0"), "normal": ("Normal", "Normal", " Normal")}


@pytest.fixture(scope="module")
def workbook(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workbook about the cohort: sheets, titles, merged cells, dates, decimal commas, blanks, a lost slide."""
    with (cohort / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    book = Workbook()
    book.active.title = "Read me"
    book.active.append(["Exported by the laboratory system"])
    sheet = book.create_sheet("Fälle 2024")
    sheet.append(["Fälle 2024, Stand März"])
    sheet.append([])
    sheet.append(["Case", None, "Pathology", None, "Clinic", None, None])
    sheet.append(["Patient ID", "Slide", "Diagnose", "Ki67 %", "Age", "Comment", "Stain date"])
    for number, row in enumerate(rows):
        label = SPELLINGS[row["label"]][number % 3]
        patient = row["patient_id"] if number % 2 == 0 else None  # merged with the cell above
        day = datetime.datetime(2024, 2, 1 + number)
        comment = "repeat; see letter" if number == 3 else None
        sheet.append([patient, f"{row['slide_id']}.tiff", label, f"{number},5", 50 + number, comment, day])
        if number % 2:
            sheet.merge_cells(start_row=4 + number, end_row=5 + number, start_column=1, end_column=1)
    sheet.merge_cells("C3:D3")
    sheet.append(["P900", "nowhere.tiff", "Normal", None, None, None, None])
    sheet.append([None] * 7)
    book.create_sheet("Patients").append(["Patient ID", "Born"])
    book.create_sheet("old").append(["Slide", "Patient ID", "Diagnose"])
    book["old"].sheet_state = "hidden"
    path = tmp_path_factory.mktemp("clinic") / "labels 2024 final (2).xlsx"
    book.save(path)
    return path


def test_a_clinics_workbook_is_understood_at_the_first_attempt(
    run: Run, cohort: Path, workbook: Path, tmp_path: Path
) -> None:
    result = run("check", "--slides", cohort / "slides", "--labels", workbook, "--job", tmp_path / "job", "--folds", 2)
    assert result.exit_code == 0, result.stderr
    assert "7 patients with 13 slides" in result.stderr
    assert "classes Normal (6), Tumour (6), positive: Tumour" in result.stderr
    assert "sheet: 'Fälle 2024' of 4; the others are not read" in result.stderr
    assert "1 row has no slide or no label and will be left out: nowhere" in result.stderr
    assert "the label was taken from 'Diagnose'" in result.stderr


@pytest.mark.long
def test_a_clinics_workbook_runs_to_the_report(run: Run, cohort: Path, workbook: Path, tmp_path: Path) -> None:
    result = run(
        "run", "--slides", cohort / "slides", "--labels", workbook, "--job", tmp_path / "job", "--folds", 2,
        "--set", "recipe.training.epochs=2", "--set", "tiling.patch_size=128",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "job/report.html").is_file()
    assert "12 used" in [line.strip() for line in result.stderr.splitlines()]
