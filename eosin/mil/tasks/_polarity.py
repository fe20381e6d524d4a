"""Which of two classes is the positive one: what a user names, else what the words mean, else the last in order."""

import re
from collections.abc import Sequence

from eosin.errors import LabelError

NEGATIVE = frozenset({
    "absence", "absent", "alive", "benign", "censored", "control", "false", "free", "healthy", "hrp", "intact",
    "living", "low", "mss", "negative", "neg", "no", "non", "none", "normal", "not", "pmmr", "proficient", "stable",
    "unmethylated", "unmutated", "wild", "wildtype", "without", "wt",
})  # fmt: skip
POSITIVE = frozenset({
    "amplified", "cancer", "carcinoma", "case", "dead", "deceased", "deficient", "died", "diseased", "dmmr", "event",
    "high", "hrd", "invasive", "involved", "malignant", "metastasis", "metastatic", "methylated", "msi", "mut",
    "mutant", "mutated", "pos", "positive", "present", "recurrence", "relapse", "responder", "true", "tumor", "tumour",
    "with", "yes",
})  # fmt: skip
SIGNS = {"+": 1, "-": -1, "\N{MINUS SIGN}": -1}


def split_target(target: str) -> tuple[str, str]:
    """Return the column and the value of ``column=value``; the value is empty when none is named."""
    column, _, value = target.partition("=")
    return column.strip(), value.strip()


def positive_last(classes: Sequence[str], *, positive: str, column: str) -> tuple[str, ...]:
    """Return classes with the positive one of two at the end; more than two stay as they are.

    Parameters
    ----------
    classes : sequence of str
        In order of number or text.
    positive : str
        The value that was named for the positive class; empty when none was.
    column : str
        For messages.

    Raises
    ------
    LabelError
        If the value is none of the classes, or there are not two.
    """
    if positive and (len(classes) != 2 or positive not in classes):
        raise LabelError(
            f"{column}={positive} names a positive class, which takes two classes, one of them {positive!r}; "
            f"column {column!r} has {', '.join(classes)}"
        )
    if len(classes) != 2:
        return tuple(classes)
    first, second = classes
    turned = first == positive if positive else polarity(first) > polarity(second)
    return (second, first) if turned else (first, second)


def polarity(value: str) -> int:
    """Return -1 for a value that says no (negative, normal, wild type, ER-), 1 for one that says yes, else 0."""
    text = value.strip()
    if text[-1:] in SIGNS:
        return SIGNS[text[-1]]
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)]  # Her2Neg -> her neg
    words += re.findall("[a-z]+", text.lower())  # pMMR -> pmmr
    if any(word in NEGATIVE or word.startswith("non") or word.endswith("neg") for word in words):
        return -1
    return int(any(word in POSITIVE or word.endswith("pos") for word in words))
