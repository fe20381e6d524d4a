"""Tables as clinics write them: each kind is understood, or stops with a line that says what it is."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from openpyxl import Workbook

from eosin.pipeline._preflight import Problems, Question, check_labels

SLIDES = [f"s{number:02d}" for number in range(12)]
PATIENTS = [f"P{number // 2:02d}" for number in range(12)]
LABELS = ["tumour" if number // 2 % 2 else "normal" for number in range(12)]
HEAD = ["slide_id", "patient_id", "label"]
ROWS = [list(row) for row in zip(SLIDES, PATIENTS, LABELS, strict=True)]
Rows = Sequence[Sequence[object]]


def text(rows: Rows, *, separator: str = ",") -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=separator, lineterminator="\n").writerows(rows)
    return file.getvalue()


def checked(path: Path, *, there: Sequence[str] = SLIDES, **asked) -> tuple[str, str]:
    """Return how a table is understood (nothing where it is refused), and what is said against it."""
    problems = Problems()
    question = Question(path, missing="few", folds=0 if "task" in asked else 2, **asked)
    labelled = check_labels(problems, question, there)
    told = [*problems.warnings, *(error.message for error in problems.errors)]
    return "" if labelled is None else labelled.in_words(), "; ".join(told)


def of_rows(path: Path, rows: Rows, **asked) -> tuple[str, str]:
    path.write_text(text(rows), encoding="utf-8")
    return checked(path, **asked)


@pytest.mark.parametrize(
    "head",
    [
        ("Slide file", "Patient", "Label"), ("Filename", "Patient ID", "Label"), ("Image", "Case", "Diagnosis"),
        ("File name", "Patient No.", "Class"), ("SlideID", "PatientID", "Label"), ("slide-id", "patient-id", "Label"),
        ("WSI file name", "Case number", "Label"), ("Image File", "Subject", "Label"), ("svs", "pat_id", "label"),
        ("Schnitt", "Fallnummer", "Befund"), ("Objektträger", "Patienten-ID", "Diagnose"),
        ("Dateiname", "Fall", "Diagnose"), ("Lame", "N° patient", "Diagnostic"),
        ("Nom de fichier", "Numéro patient", "Classe"), ("Lámina", "Paciente", "Diagnóstico"),
        ("ARCHIVO", "ID PACIENTE", "DIAGNÓSTICO"), ("Vetrino", "Paziente", "Diagnosi"),
        ("Szkiełko", "Pacjent", "Rozpoznanie"), ("NAZWA PLIKU", "NR PACJENTA", "ROZPOZNANIE"),
        ("Dosya adı", "Hasta No", "Tanı"), ("切片号", "患者编号", "诊断"), ("文件名", "病人", "标签"),
        ("スライド", "患者", "診断"), ("Файл", "Пациент", "Диагноз"), ("Bestandsnaam", "Patiënt", "Diagnose"),
    ],
)  # fmt: skip
def test_columns_are_found_in_many_languages(tmp_path: Path, head: tuple[str, str, str]) -> None:
    understood, told = of_rows(tmp_path / "t.csv", [head, *ROWS])
    assert f"slides: column {head[0]!r}; patients: column {head[1]!r} (6 patients with 12 slides)" in understood, told
    assert f"label: column {head[2]!r}, classes normal (6), tumour (6)" in understood


def test_a_column_of_any_name_is_found_by_the_slides_in_it(tmp_path: Path) -> None:
    head = ["Ordnungsbegriff", "patient", "label"]
    assert "slides: column 'Ordnungsbegriff'" in of_rows(tmp_path / "t.csv", [head, *ROWS])[0]
    files = [[f"{slide}.svs", *rest] for slide, *rest in ROWS]
    assert "slides: column 'Ordnungsbegriff'" in of_rows(tmp_path / "t.csv", [head, *files], there=())[0]
    # "Slide" is the block here, and the file says which slide it is
    two = [["Slide", "Filename", "patient", "label"], *([f"A{place}", *row] for place, row in enumerate(files))]
    assert "slides: column 'Filename'" in of_rows(tmp_path / "t.csv", two)[0]


@pytest.mark.parametrize(
    ("negative", "positive", "group"),
    [
        (["Gutartig", "GUTARTIG"], ["Bösartig", "BÖSARTIG"], "'BÖSARTIG' and 'Bösartig'"),
        (["Bénin", "BENIN"], ["Malin", "MALIN"], "'BENIN' and 'Bénin'"),
        (["No", "NO"], ["Sí", "SI"], "'SI' and 'Sí'"),
        (["łagodny", "LAGODNY"], ["złośliwy", "ZŁOŚLIWY"], "'LAGODNY' and 'łagodny'"),
        (["hayır", "HAYIR"], ["evet", "EVET"], "'HAYIR' and 'hayır'"),
        (["Норма", "НОРМА"], ["Опухоль", "ОПУХОЛЬ"], "'НОРМА' and 'Норма'"),
        (["Normal", "Ｎｏｒｍａｌ"], ["肿瘤"], "'Normal' and 'Ｎｏｒｍａｌ'"),
        (["B\u00e9nin", "Be\u0301nin"], ["Malin"], "which look like one class"),
        (["0", "0,0"], ["1", "1.0"], "'0' and '0,0'; '1' and '1.0'"),
        (["HER2 neg", "HER2-neg"], ["HER2 pos"], "'HER2 neg' and 'HER2-neg'"),
        (["normal", "normal."], ["tumour"], "'normal' and 'normal.'"),
    ],
)
def test_spellings_of_one_class_stop_and_merge_into_one(
    tmp_path: Path, negative: list[str], positive: list[str], group: str
) -> None:
    words = {"normal": negative, "tumour": positive}
    rows = [[slide, patient, words[label][n % len(words[label])]] for n, (slide, patient, label) in enumerate(ROWS)]
    understood, told = of_rows(tmp_path / "t.csv", [HEAD, *rows])
    assert not understood
    assert group in told
    assert "pass --ids merge" in told
    merged = of_rows(tmp_path / "t.csv", [HEAD, *rows], ids="merge")[0]
    assert merged.count(" (6)") == 2, "six slides in each of two classes"


@pytest.mark.parametrize(
    ("negative", "positive"),
    [
        ("阴性", "阳性"), ("良性", "恶性"), ("无", "有"), ("正常", "癌"), ("łagodny", "złośliwy"),
        ("iyi huylu", "kötü huylu"),
        ("HAYIR", "EVET"), ("нет", "да"), ("норма", "опухоль"), ("отрицательный", "положительный"), ("nie", "tak"),
        ("ujemny", "dodatni"), ("ER-", "ER+"), ("gutartig", "bösartig"), ("0", "1"),
    ],
)  # fmt: skip
def test_the_positive_class_is_known_in_many_languages(tmp_path: Path, negative: str, positive: str) -> None:
    rows = [[slide, patient, negative if label == "normal" else positive] for slide, patient, label in ROWS]
    assert f"positive: {positive} (" in of_rows(tmp_path / "t.csv", [HEAD, *rows])[0]


@pytest.mark.parametrize(
    "words",
    [("keine Angabe", "k.A."), ("n/d", "ND"), ("brak danych", "nieznany"), ("bilinmiyor",), ("未知", "不详"),
     ("#REF!",), ("inconnu", "non renseigné"), ("sin datos", "S/D"), ("not recorded", "not reported")],
)  # fmt: skip
def test_words_for_nothing_are_no_patient(tmp_path: Path, words: tuple[str, ...]) -> None:
    rows = [
        [slide, words[n % len(words)] if n < 4 else patient, label] for n, (slide, patient, label) in enumerate(ROWS)
    ]
    understood, told = of_rows(tmp_path / "t.csv", [HEAD, *rows])
    assert not understood
    assert "rows 2, 3, 4, 5 have no id of a patient" in told


def test_words_that_may_be_a_label_stay_one(tmp_path: Path) -> None:
    rows = [[slide, patient, "NR" if label == "normal" else "R"] for slide, patient, label in ROWS]
    assert "classes NR (6), R (6)" in of_rows(tmp_path / "t.csv", [HEAD, *rows])[0]


REPEATED = [HEAD, *ROWS, ["s00", "P00", "tumour"], ["s01", "nan", "x"]]
PAIRS = [(PATIENTS[n], f"s{n:02d}", f"s{n + 1:02d}", LABELS[n]) for n in range(0, 12, 2)]
REFUSED: dict[str, tuple[Rows, str]] = {
    "rounded patients": ([HEAD, *([s, "2.02401E+11", y] for s, _, y in ROWS)], "row 2 is a number that was rounded"),
    "rounded, comma": ([HEAD, *([s, "2,024E+11", y] for s, _, y in ROWS)], "number that was rounded (2,024E+11)"),
    "a date among ids": ([HEAD, *ROWS[:3], ["s03", "01.02.2024", "tumour"], *ROWS[4:]], "row 5 is a date (01.02.2024)"),
    "quoted ids": ([HEAD, *([f"“{s}”", p, y] for s, p, y in ROWS)], "'\\u201cs00\\u201d' = 's00'"),
    "apostrophes": ([HEAD, *([f"'{s}", p, y] for s, p, y in ROWS)], "\"'s00\" = 's00'"),
    "two labels": ([[*HEAD, "Label"], *([*row, "x"] for row in ROWS)], "'label' and 'Label' are called alike and"),
    "two slides": ([["Slide ID", *HEAD], *(["x", *row] for row in ROWS)], "'Slide ID' and 'slide_id' are called alike"),
    "a note below": ([HEAD, *ROWS, [], ["* seen by Dr. X", "", ""]], "row 15 has no id of a patient"),
    "a gap below titles": ([["Cohort"], [], HEAD, *ROWS[:2], ["", "P01", "x"], *ROWS[3:]], "row 6 has no id of a"),
    "twice": (REPEATED, "slides with more than one row: s00, s01"),
    "twice and more": (REPEATED, "row 15 has no id of a patient"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_named_where_it_stands(tmp_path: Path, name: str) -> None:
    rows, message = REFUSED[name]
    understood, told = of_rows(tmp_path / "t.csv", rows)
    assert not understood
    assert message in told


UNDERSTOOD: dict[str, tuple[Rows, str]] = {
    "same rows": ([HEAD, *ROWS, ROWS[0], ROWS[3]], "rows: 2 are the same as others and count once"),
    "several of a name": ([[*HEAD, "Day", "Day"], *([*row, "1", "2"] for row in ROWS)], "second is read as 'Day (2)'"),
    "a column twice": ([[*HEAD, "label"], *([*row, row[2]] for row in ROWS)], "values: label;"),
    "several slides in a cell": (
        [["Patient", "Slides", "label"], *([who, f"{one}; {other}", label] for who, one, other, label in PAIRS)],
        "6 patients with 12 slides",
    ),
    "lines in a cell": (
        [["Patient", "Slide", "label"], *([who, f"{one}\n{other}", label] for who, one, other, label in PAIRS)],
        "6 patients with 12 slides",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_can_only_mean_one_thing_is_understood_and_said(tmp_path: Path, name: str) -> None:
    rows, note = UNDERSTOOD[name]
    understood, told = of_rows(tmp_path / "t.csv", rows)
    assert note in understood, told
    assert "classes normal (6), tumour (6)" in understood


def test_bars_separate_cells_too(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text([HEAD, *ROWS], separator="|"))
    assert "classes normal (6), tumour (6)" in checked(tmp_path / "t.csv")[0]


@pytest.mark.parametrize(
    ("cells", "found"),
    [
        (lambda n: f"{n},5", "numbers from 0.5 to 11.5"),
        (lambda n: f"1.00{n % 10},5", "numbers from 1000.5 to 1009.5"),
        (lambda n: f"1,00{n % 10}.5", "numbers from 1000.5 to 1009.5"),
        (lambda n: f"\N{MINUS SIGN}{n}", "numbers from -11 to"),
        (lambda n: f"1,00{n % 10}", "can be read in two ways"),
        (lambda n: "<1" if n == 3 else "> 90" if n == 5 else str(n), "'<1', '> 90' in column 'label' are not numbers"),
        (lambda n: f"{n} %", "in column 'label' are not numbers"),
    ],
)
def test_numbers_are_read_as_they_are_written_or_all_that_are_not_are_named(
    tmp_path: Path, cells: Callable[[int], str], found: str
) -> None:
    rows = [[slide, patient, cells(number)] for number, (slide, patient, _) in enumerate(ROWS)]
    assert found in " ".join(of_rows(tmp_path / "t.csv", [HEAD, *rows], task="regression"))


@pytest.mark.parametrize(
    ("column", "seen", "censored"),
    [("zgon", "tak", "nie"), ("ölüm", "evet", "hayır"), ("死亡", "是", "否"), ("Status", "умер", "жив"),
     ("状态", "死亡", "存活"), ("Zustand", "TOT", "LEBT"), ("estado", "Fallecida", "Viva")],
)  # fmt: skip
def test_events_are_known_in_many_languages(tmp_path: Path, column: str, seen: str, censored: str) -> None:
    head = ["slide_id", "patient_id", "time", column]
    rows = [[slide, patient, f"{n + 1}", censored if n % 3 else seen] for n, (slide, patient, _) in enumerate(ROWS)]
    asked = {"task": "survival", "target": f"time,{column}"}
    assert f"with {seen} for an event, 4 of 12 have one" in of_rows(tmp_path / "t.csv", [head, *rows], **asked)[0]


@pytest.mark.parametrize("column", ["lost_to_followup", "生存状态", "wynik", "durum"])
def test_a_column_whose_name_does_not_decide_is_asked_about(tmp_path: Path, column: str) -> None:
    head = ["slide_id", "patient_id", "time", column]
    rows = [[slide, patient, f"{n + 1}", int(n % 3 == 0)] for n, (slide, patient, _) in enumerate(ROWS)]
    told = of_rows(tmp_path / "t.csv", [head, *rows], task="survival", target=f"time,{column}")[1]
    assert "if it is 1, 4 of 12 have one; if it is 0, 8 of 12 have one; say which" in told


def workbook(path: Path, *sheets: tuple[str, Rows]) -> Workbook:
    book = Workbook()
    book.remove(book.active)
    for title, rows in sheets:
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return book


def test_a_second_sheet_of_slides_is_pointed_out_whatever_comes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "t.xlsx"
    workbook(path, ("Info", [["Stand", "März"]]), ("A", [HEAD, *ROWS]), ("B", [HEAD, *ROWS[:2]]))
    assert "sheet: 'A' of 3; the others are not read, although slides are named in 'B', too" in checked(path)[0]
    workbook(path, ("A", [HEAD, *ROWS[:5]]), ("B", [HEAD, *ROWS[5:]]))
    understood, told = checked(path)
    assert not understood
    assert "t.xlsx was read so: " in told
    assert "although slides are named in 'B', too" in told


def test_hidden_rows_are_said(tmp_path: Path) -> None:
    path = tmp_path / "t.xlsx"
    book = workbook(path, ("A", [HEAD, *ROWS]))
    for number in (3, 4):
        book["A"].row_dimensions[number].hidden = True
    book.save(path)
    assert "hidden rows: 2 are read like the others" in checked(path)[0]


def test_formulas_without_values_are_refused_and_rows_counted_as_the_program_shows_them(tmp_path: Path) -> None:
    path = tmp_path / "t.xlsx"
    workbook(path, ("A", [HEAD, *([slide, patient, f'=IF(1>0,"{label}","")'] for slide, patient, label in ROWS)]))
    assert "12 cells hold formulas whose values are not in the file; open it in a spreadsheet" in checked(path)[1]
    workbook(path, ("A", [["Titel"], [None], HEAD, *ROWS[:2], [None, "P01", "x"], *ROWS[3:]]))
    assert "row 6 has no id of a slide" in checked(path)[1]
