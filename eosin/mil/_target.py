"""Which column of a table is the label where nobody says it: one that can pose the task, and is alone in that.

A table of a clinic has columns that no model is trained for: dates, comments, ages. What they hold shows that
they are not the label. Where two columns are left, a person decides, and is shown both with their values.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from eosin._columns import detect_column, normalised
from eosin._names import MISSING, clean, plain_word
from eosin._tables import decimal_point
from eosin.errors import LabelError

SURVIVAL_COLUMNS = (
    ("survival_months", "censorship"), ("time", "event"), ("time", "censorship"), ("Event", "Status"),
    ("time", "status"), ("OS.time", "OS"), ("OS_time", "OS_event"), ("OS_MONTHS", "OS_STATUS"),
    ("survival_time", "event"), ("survival_months", "event"), ("months", "event"), ("days", "event"),
)  # fmt: skip
SURVIVAL_KINDS = ("survival", "cox")
NUMBER_KINDS = ("regression",)
SITE_COLUMNS = ("site", "centre", "center", "institution", "hospital")
OTHER_COLUMNS = (*SITE_COLUMNS, "split", "fold")
LABEL_NAMES = frozenset({
    "label", "labels", "class", "target", "outcome", "ground_truth", "gt", "diagnosis", "diagnose", "diagnostic",
    "diagnostico", "diagnosi", "diagnoza", "dx", "klasse", "classe", "clase", "etikett", "befund", "rozpoznanie",
    "tani", "etiqueta", "etichetta", "etykieta", "klasa", "etiket", "sinif", "диагноз", "класс", "метка", "诊断",
    "标签", "类别", "診断", "診断名", "ラベル",
})  # fmt: skip
"""What a column is called whose only purpose is to be the label; without accents and capitals."""

SAID_AS_VALUES = frozenset({
    "-", "none", "nil", "nd", "nk", "nr", "ka", "fehlt", "fehlend", "brak", "yok", "无", "無"
})  # fmt: skip
NO_VALUE = MISSING - SAID_AS_VALUES
"""Words for "not known" in a label: a minus may be the other one of a plus, ``none`` that of ``metastasis``, and ``NR``
that of a responder."""

DATE = re.compile(r"\d{4}-\d\d-\d\d.*|\d{1,2}[./-]\d{1,2}[./-]\d{2,4}")
MOST_VALUES_SHOWN = 4


def has_value(text: str) -> bool:
    """Return whether a cell says anything."""
    return plain_word(clean(text)) not in NO_VALUE


def same_class(text: str) -> str:
    """Return what the spellings of one class have in common: a number, or words without capitals, accents and dashes.

    ``HER2-neg`` and ``her2 NEG`` are one, and ``0``, ``0.0`` and ``0,0``; ``ER+`` and ``ER-`` are two.
    """
    words = re.sub(r"(?<=\w)\s*[-_\u2010-\u2015]\s*(?=[^\W\d])", " ", plain_word(clean(text)))
    words = " ".join(words.rstrip(" .,;:").split()) or clean(text)
    return f"{float(decimal_point(words)):g}" if is_number(words) else words


def target_column(values: Mapping[str, Sequence[str]], kind: str = "") -> str:
    """Return the column that holds the label: ``label``, the only one called like one, or the only one that can be it.

    A pair of survival columns is found as ``time,event`` when the task is one of survival, or when there is no
    ``label`` and the task is not given.

    Parameters
    ----------
    values : mapping of str to sequence of str
        The columns besides those of ids.
    kind : str
        Of the task; empty where it is not given.

    Raises
    ------
    LabelError
        If there is none, or several could be meant: with the values of each.
    """
    spelled = {normalised(column): column for column in values}
    pairs = (tuple(spelled.get(normalised(name), "") for name in pair) for pair in SURVIVAL_COLUMNS)
    pair = next((found for found in pairs if all(found)), None)
    label = detect_column(values, ("label",))
    # a column called label wins unless survival was asked for
    if pair is not None and (kind in SURVIVAL_KINDS or (not kind and label is None)):
        return ",".join(pair)
    if kind in SURVIVAL_KINDS:
        raise LabelError(
            f"survival needs two columns, time and event; the table has {', '.join(values) or 'none'}; say which "
            "(--target TIME,EVENT)"
        )
    if label is not None:
        return label
    # sites, splits and the like are never the label by themselves
    others = [column for column in values if normalised(column) not in OTHER_COLUMNS]
    able = [column for column in others if can_be_label(values[column], kind)]
    named = [column for column in able if plain_word(normalised(column)) in LABEL_NAMES]
    found = named if len(named) == 1 else able
    if len(found) == 1 or len(others) == 1:
        return (found or others)[0]
    raise LabelError(_several(found or others, values))


def can_be_label(column: Sequence[str], kind: str = "") -> bool:
    """Tell whether a column could be what a model is trained for: filled, and numbers or a few values that repeat."""
    filled = [value for value in column if has_value(value)]
    distinct = {plain_word(value) for value in filled}
    if len(distinct) < 2 or 2 * len(filled) < len(column) or all(DATE.fullmatch(value) for value in filled):
        return False
    if kind in NUMBER_KINDS:
        return all(is_number(value) for value in filled)
    return 2 * len(distinct) <= len(filled)


def is_number(text: str) -> bool:
    """Return whether a cell is a number, with a decimal point or comma."""
    try:
        float(decimal_point(text))
    except ValueError:
        return False
    return True


def _several(columns: Sequence[str], values: Mapping[str, Sequence[str]]) -> str:
    if not columns:
        return "the table has no column 'label', and no other that could be it; add one, or pass another --labels"
    told = "; ".join(f"{column} ({values_in_words(values[column])})" for column in columns)
    return (
        f"the table has no column 'label', and {len(columns)} columns could be it: {told}; say which, for example "
        f"--target {quoted(columns[0])}"
    )


def values_in_words(column: Sequence[str]) -> str:
    """Return the most frequent values of a column with their counts."""
    counts = Counter(value for value in column if has_value(value)).most_common()
    told = [f"{value[:30]}: {count}" for value, count in counts[:MOST_VALUES_SHOWN]]
    more = len(counts) - len(told)
    return ", ".join(told) + (f" and {more} more" if more else "")


def quoted(column: str) -> str:
    """Return a column's name as a shell takes it."""
    return column if re.fullmatch(r"[\w.,:/+=-]+", column) else "'" + column.replace("'", "'\\''") + "'"
