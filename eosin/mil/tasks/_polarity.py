"""Which of two classes is the positive one: what a user names, else what the words mean, else the last in order."""

import re
import unicodedata
from collections.abc import Sequence

from eosin._names import plain_word
from eosin.errors import LabelError

NEGATIVE = frozenset({
    "absence", "absent", "alive", "assente", "ausente", "baixo", "bajo", "basso", "benign", "benigna", "benigno",
    "benin", "censored", "control", "faible", "falsch", "false", "falso", "faux", "free", "gesund", "goedaardig",
    "gutartig", "healthy", "hrp", "intact", "kein", "keine", "laag", "living", "low", "mss", "nao", "nee", "neg",
    "negatief", "negatif", "negativ", "negativa", "negative", "negativo", "nein", "niedrig", "no", "non", "none",
    "normal", "normale", "not", "ohne", "pmmr", "lagodny", "lagodna", "lagodne", "nie", "prawidlowy", "prawidlowe",
    "zdrowy", "ujemny", "ujemna", "ujemne", "brak", "iyi", "hayir", "yok", "saglikli", "норма", "нормальный",
    "доброкачественный", "доброкачественная", "нет", "отрицательный", "отрицательно", "здоровый", "без", "いいえ",
    "proficient", "sain", "sana", "sano", "sans", "saudavel", "sin", "stable", "unauffallig", "unmethylated",
    "unmutated", "wild", "wildtype", "without", "wt",
})  # fmt: skip
POSITIVE = frozenset({
    "alta", "alto", "amplified", "bosartig", "cancer", "carcinoma", "case", "dead", "deceased", "decede",
    "deficient", "died", "diseased", "dmmr", "eleve", "event", "fallecido", "high", "hoch", "hoog", "hrd",
    "invasive", "involved", "ja", "krank", "kwaadaardig", "maligna", "malignant", "maligne", "maligno", "malin",
    "metastase", "metastasis", "metastatic", "methylated", "msi", "mut", "mutado", "mutant", "mutated", "mutato",
    "mute", "mutiert", "oui", "pos", "positief", "positif", "positiv", "positiva", "positive", "positivo",
    "present", "recidiva", "recidive", "recurrence", "relapse", "responder", "rezidiv", "si", "sim", "true",
    "tumeur", "tumor", "tumore", "tumour", "dodatni", "dodatnia", "dodatnie", "zlosliwy", "zlosliwa", "zlosliwe",
    "nowotwor", "rak", "tak", "zgon", "kotu", "evet", "kanser", "var", "опухоль", "злокачественный",
    "злокачественная", "рак", "да", "положительный", "положительно", "есть", "はい", "verdadero", "vero",
    "verstorben", "vrai", "wahr", "with", "yes",
})  # fmt: skip
NO, YES = (frozenset(map(plain_word, words)) for words in (NEGATIVE, POSITIVE))
# looked for inside a value, because these languages write no blanks; the first that says no decides
SAYS_NO = ("阴性", "陰性", "良性", "正常", "野生", "无", "無", "未", "否", "非", "健康")
SAYS_YES = (
    "阳性", "陽性", "恶性", "惡性", "悪性", "肿瘤", "腫瘍", "腫瘤", "癌", "突变", "变异", "変異", "有", "是", "死亡",
)  # fmt: skip
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
    text = "".join(one for one in unicodedata.normalize("NFKD", value.strip()) if not unicodedata.combining(one))
    if text[-1:] in SIGNS:
        return SIGNS[text[-1]]
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)]  # Her2Neg -> her neg
    words += re.findall(r"[^\W\d_]+", plain_word(value))  # pMMR -> pmmr
    if any(word in NO or word.startswith("non") or word.endswith("neg") for word in words):
        return -1
    if any(part in value for part in SAYS_NO):
        return -1
    return int(any(word in YES or word.endswith("pos") for word in words) or any(part in value for part in SAYS_YES))
