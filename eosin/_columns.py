"""What columns of ids are called in tables of clinics, of other tools and in other languages.

A name is compared without capitals, accents and signs, so that ``Slide-ID``, ``slideID`` and ``slide_id`` are one, and
``Numéro patient`` is ``numero_patient``.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from eosin._names import SLIDE_SUFFIXES, matches, plain_word
from eosin.errors import TableError


def normalised(column: str) -> str:
    """Return a column's name as it is compared: lower case, no accents, an underscore for every other sign."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column.strip())
    return re.sub(r"\W+|_+", "_", plain_word(words)).strip("_") or column.strip().lower()


def _names(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(normalised(name) for line in names for name in line.split()))


SLIDE_COLUMNS = _names(
    "slide_id slide filename image_id tissue_sample_id wsi image slide_name slide_file slide_filename",
    "slide_file_name slide_path slide_no slide_number slide_nr slide_barcode slides slide_ids file_name filenames",
    "file_path filepath wsi_id wsi_name wsi_file wsi_filename wsi_file_name wsi_path wsis image_name image_file",
    "image_filename image_file_name image_path img svs svs_file ndpi ndpi_file scan scan_id scan_name scan_file",
    "file path schnitt schnitt_id schnittnummer schnitt_nr objektträger objekttraeger präparat praeparat",
    "dateiname datei bilddatei bildname bild bild_id lame id_lame lame_id numero_lame n_lame nom_de_fichier",
    "nom_du_fichier nom_fichier fichier lamina laminilla portaobjetos nombre_de_archivo nombre_del_archivo",
    "nombre_archivo archivo fichero imagen vetrino vetrini nome_file immagine nome_do_arquivo arquivo imagem",
    "preparat szkiełko nazwa_pliku plik skan obraz lam lam_no dosya_adı dosya görüntü coupe glaasje bestandsnaam",
    "bestand препарат стекло слайд имя_файла файл изображение скан 切片 切片号 切片编号 切片id 切片名 切片名称",
    "玻片 玻片号 玻片编号 文件名 文件名称 文件 图像 图像名 图像名称 檔名 檔案 スライド スライドid スライド名",
    "スライド番号 標本 ファイル名 ファイル 画像 画像名 슬라이드 파일명 파일 id",
)
"""Columns of slides; of several in one table the first of these, unless another one names more of the slides."""

PATIENT_COLUMNS = _names(
    "patient_id case_id patient subject_id case submitter_id patients patient_no patient_number patient_nr",
    "patient_name patient_code pat_id pat_no pat_nr pat pid case_no case_number case_nr case_name subject",
    "subject_no participant participant_id donor_id mrn patienten_id patientenid patientennummer patienten_nr",
    "patientennr fall fall_id fallnummer fall_nr pat_nummer id_patient numero_patient numero_de_patient n_patient",
    "no_patient cas id_cas numero_dossier paciente id_paciente id_del_paciente id_do_paciente numero_paciente",
    "n_paciente caso id_caso paziente id_paziente numero_paziente pacjent id_pacjenta nr_pacjenta numer_pacjenta",
    "hasta hasta_no hasta_id hasta_numarası patiënt patientnummer patiëntnummer пациент id_пациента",
    "номер_пациента 患者 患者id 患者编号 患者号 患者番号 病人 病人id 病人编号 病人号 病例 病例号 病例编号 症例",
    "症例番号 症例id 환자 환자번호 id",
)
"""Columns of patients."""

ID_COLUMNS = frozenset(SLIDE_COLUMNS + PATIENT_COLUMNS)
"""A row that names one of these columns is the header, whatever titles stand above it."""


def detect_column(table: Mapping[str, Sequence[str]], names: Sequence[str]) -> str | None:
    """Return the column that has the first of these normalised names that is there, or None."""
    by_name = {normalised(column): column for column in reversed(list(table))}
    return next((by_name[name] for name in map(normalised, names) if name in by_name), None)


def slide_column(table: Mapping[str, Sequence[str]], slides: Collection[str] = ()) -> str | None:
    """Return the column that names slides, or None.

    Parameters
    ----------
    table : mapping of str to sequence of str
    slides : collection of str
        Where they are known, the column that names most of them is taken, whatever it is called.
    """
    called = [column for column in table if normalised(column) in SLIDE_COLUMNS]
    first = detect_column(table, SLIDE_COLUMNS)
    if slides:
        named = {column: matches(table[column], slides) for column in table if column in called or not called}
        best = max(named, key=lambda column: (named[column], column == first), default=None)
        if best is not None and named[best]:
            return best
    return first or _column_of_files(table)


def _column_of_files(table: Mapping[str, Sequence[str]]) -> str | None:
    """Return the only column that holds names of slide files."""
    found = [
        name
        for name, cells in table.items()
        if (filled := [cell for cell in cells if cell])
        and all(cell.lower().endswith(SLIDE_SUFFIXES) for cell in filled)
    ]
    return found[0] if len(found) == 1 else None


def require_unlike_columns(path: object, columns: Mapping[str, Sequence[object]], names: Collection[str]) -> None:
    """Refuse two columns that are called alike, hold different values and would both be read.

    Raises
    ------
    TableError
    """
    known: dict[str, str] = {}
    for column in columns:
        other = known.setdefault(normalised(column), column)
        if other != column and normalised(column) in names and list(columns[other]) != list(columns[column]):
            raise TableError(f"{path}: columns {other!r} and {column!r} are called alike and differ; rename one")
