"""What slides, patients and sites are called: which spellings are one id, and which files are slides by their names.

An id is compared letter by letter everywhere. What may differ between two spellings of one id is decided here and
nowhere else: `clean` removes what nobody can see and is applied to every id that is read; `look_alike` also forgets
capitals, kinds of dashes and leading zeros, and is used only to find ids that a person has to decide about.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from eosin.errors import LabelError, TableError

Ids = Literal["ask", "merge", "exact"]
"""What happens to ids that look alike: stop and list them, take them for one, or take them as they are written."""

POLICIES = ("ask", "merge", "exact")

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
SLIDE_SUFFIXES = (
    ".ome.tiff", ".ome.tif", ".ome.btf", ".svs", ".tiff", ".tif", ".btf", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs",
    ".bif", ".svslide", ".qptiff", ".czi", ".avs", ".dcm", ".ome.zarr", ".zarr",
)  # fmt: skip
UNREAD_SUFFIXES = (
    ".vsi", ".kfb", ".kfbf", ".tmap", ".isyntax", ".i2syntax", ".sdpc", ".dyqx", ".zvi", ".lif", ".nd2", ".jp2", ".afi",
    ".mds", ".mdsx", ".hdx", ".eet", ".gndcl",
)  # fmt: skip
"""Of slides that no reader here takes, unless a plug-in does; a folder's are named instead of passed over."""
OTHER_READERS = {
    ".vsi": "bioformats2raw", ".kfb": "kfbslide", ".kfbf": "kfbslide", ".tmap": "tmapslide", ".isyntax": "pyisyntax",
    ".i2syntax": "pyisyntax", ".sdpc": "opensdpc", ".dyqx": "opensdpc", ".zvi": "bioformats2raw", ".lif": "liffile",
    ".nd2": "nd2",
}  # fmt: skip
"""Kept programs and packages that read what is not read here."""
RESULT_SUFFIXES = (".geojson", ".json", ".h5", ".pt", ".hdf5")  # files about a slide, named after it
MISSING = frozenset({
    "", "-", "--", "---", ".", "..", "...", "?", "??", "/", "n/a", "#n/a", "<na>", "na", "n.a.", "n.a", "nan",
    "<nan>", "null", "nil", "none", "nat", "missing", "unknown", "unk", "unspecified", "not available", "not known",
    "not applicable", "not recorded", "not reported", "not stated", "not specified", "not done", "not determined",
    "no data", "n/d", "n.d.", "n.d", "nd", "n/k", "nk", "n.r.", "nr", "tbd", "pending", "unbekannt",
    "nicht bekannt", "keine angabe", "keine angaben", "k.a.", "k.a", "k. a.", "ka", "o.a.", "fehlt", "fehlend",
    "ausstehend", "inconnu", "inconnue", "manquant", "non connu", "non renseigne", "desconocido", "desconocida",
    "sin dato", "sin datos", "s/d", "no disponible", "no consta", "sconosciuto", "non disponibile", "non noto",
    "desconhecido", "sem dados", "nao informado", "onbekend", "brak", "brak danych", "b/d", "b.d.", "nieznany",
    "nieznane", "bilinmiyor", "yok", "veri yok", "неизвестно", "нет данных", "н/д", "未知", "不明", "不详", "不詳",
    "无", "無", "缺失", "暂无", "#ref!", "#value!", "#div/0!", "#name?", "#num!", "#null!",
})  # fmt: skip
TCGA = re.compile(r"(TCGA-\w{2}-\w{4})-\d\d", re.IGNORECASE)
URL = re.compile(r"^(s3|gs|gcs|https?):/+(?=[^/])", re.IGNORECASE)
STROKES = str.maketrans(
    "\u0142\u0131\u00f8\u0111", "liod"
)  # of Polish, Turkish, Danish and Croatian: no accents to Unicode
QUOTES = "'\"`\u00b4\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"
SHOWN = 12
COMPARED = 2000

Value = TypeVar("Value")


def clean(text: str) -> str:
    """Return an id as it is compared: one Unicode form, without what cannot be seen.

    Composed and decomposed letters become one (NFC); zero-width characters, byte-order marks, direction marks, soft
    hyphens and control characters go; every run of blanks, no-break blanks included, is one blank; none is left at the
    ends.
    """
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()
    composed = unicodedata.normalize("NFC", text)
    blanks = "".join(" " if letter.isspace() else letter for letter in composed)
    seen = "".join(letter for letter in blanks if unicodedata.category(letter) not in ("Cf", "Cc"))
    return " ".join(seen.split())


def look_alike(text: str) -> str:
    """Return what all spellings of an id have in common that a person would take for the same.

    Beyond `clean`, letters of other widths or with ligatures are folded (NFKC), capitals, kinds of dashes, underscores
    and blanks are one, quotation marks around it, leading zeros and the ``.0`` that a spreadsheet adds to whole numbers
    are dropped.
    """
    folded = unicodedata.normalize("NFKC", clean(text)).casefold()
    folded = folded.strip(QUOTES) or folded
    # U+2212 is the minus sign, which is a symbol and not a dash for Unicode
    dashed = "".join("-" if unicodedata.category(one) in ("Pd", "Pc") or one in "\u2212 " else one for one in folded)
    whole = re.sub(r"^(\d+)\.0+$", r"\1", re.sub(r"-+", "-", dashed))
    return re.sub(r"(?<![\d.])0+(?=\d)", "", whole)


def plain_word(text: str) -> str:
    """Return a word without capitals and accents, as lists of words are compared: ``Décès`` and ``DECES`` are one."""
    if text.isascii():
        return text.strip().lower()
    folded = unicodedata.normalize("NFKD", text.strip().casefold()).translate(STROKES)
    return "".join(letter for letter in folded if not unicodedata.combining(letter))


def is_missing(text: str) -> bool:
    """Tell whether a cell is empty or holds one of the words for "not known", in any capitals."""
    return plain_word(clean(text)) in MISSING


def groups_of_look_alikes(ids: Iterable[str], key: Callable[[str], str] = look_alike) -> list[tuple[str, ...]]:
    """Return the ids that look alike but are written differently, group by group, in the order in which they appear."""
    spellings: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for one in ids:
        spellings[key(one)][one] = None
    return [tuple(group) for group in spellings.values() if len(group) > 1]


def same_patient(text: str) -> str:
    """Return what spellings of a patient have in common: as `look_alike`, and a TCGA barcode ends with the patient.

    ``TCGA-A1-A0SB-01Z-00-DX1`` is a slide and ``TCGA-A1-A0SB-01A`` a sample of the patient ``TCGA-A1-A0SB``.
    """
    barcode = TCGA.match(clean(text))
    return look_alike(barcode[1] if barcode else text)


def unify(
    ids: Sequence[str], *, what: str, where: str, policy: Ids = "ask", key: Callable[[str], str] = look_alike
) -> tuple[str, ...]:
    """Return cleaned ids, those that look alike treated as a person has decided.

    Parameters
    ----------
    ids : sequence of str
    what, where : str
        For the message: "patients", and the file.
    policy : {"ask", "merge", "exact"}
        ``merge`` writes every id of a group as its most frequent spelling, the first among equals.
    key : callable
        What the spellings of one id have in common.

    Raises
    ------
    LabelError
        With all groups, if ids look alike and `policy` is ``ask``.
    """
    cleaned = tuple(clean(one) for one in ids)
    groups = [] if policy == "exact" else groups_of_look_alikes(cleaned, key)
    if not groups:
        return cleaned
    if policy == "ask":
        raise LabelError(
            f"{where}: {len(groups)} {what} are spelled in several ways: {listed(groups)}; correct the table, or pass "
            "--ids merge if they are the same, --ids exact if they are different"
        )
    counts = Counter(cleaned)
    same = {one: max(group, key=counts.__getitem__) for group in groups for one in group}
    return tuple(same.get(one, one) for one in cleaned)


def listed(groups: Sequence[Sequence[str]]) -> str:
    """Return groups of spellings for a message; spellings that look the same on a screen are shown as escapes."""
    shown = [" = ".join(map(visible, group)) for group in groups[:SHOWN]]
    more = f" and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
    return "; ".join(shown) + more


def visible(text: str) -> str:
    """Return an id in quotes, with what is not ASCII as an escape."""
    return ascii(text)


def as_url(path: Path | str) -> str:
    """Return the address that a path on the command line is; empty for a local one.

    ``Path`` takes two slashes for one, which is put right here.
    """
    text = str(path)
    found = URL.match(text)
    return f"{found[1].lower()}://{text[found.end() :]}" if found else ""


def is_picture(path: Path) -> bool:
    """Return whether a file is a plain picture, by its name."""
    return path.name.lower().endswith(PICTURE_SUFFIXES)


def is_slide(path: Path) -> bool:
    """Return whether a file may be a slide, by its name."""
    return path.name.lower().endswith(SLIDE_SUFFIXES + PICTURE_SUFFIXES)


def is_folder_slide(path: Path) -> bool:
    """Return whether a folder is a slide, by its name."""
    return path.name.lower().endswith(".zarr") and path.is_dir()


def is_unread(path: Path) -> bool:
    """Return whether a file is a slide of a format that only a plug-in may read, by its name."""
    return path.name.lower().endswith(UNREAD_SUFFIXES)


def slide_stem(path: Path) -> str:
    """Return the id of the slide in a file: the name without its slide extension; other dots stay."""
    return without_suffix(clean(path.name), SLIDE_SUFFIXES + PICTURE_SUFFIXES)


def slide_id(name: str) -> str:
    """Return the id of a slide from its id, file name or path: folders and known suffixes go, other dots stay.

    ``/data/b.tiff``, ``b.tiff.geojson`` (as QuPath names what it exports) and ``b`` are one slide.
    """
    file = clean(name).replace("\\", "/").rsplit("/", 1)[-1]
    return without_suffix(without_suffix(file, RESULT_SUFFIXES), SLIDE_SUFFIXES)


def without_suffix(name: str, suffixes: Sequence[str]) -> str:
    """Return a file name without the first of the suffixes that it ends with, unless nothing would be left."""
    for suffix in suffixes:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


@dataclass(frozen=True)
class Matched(Generic[Value]):
    """What a table or folder says of some slides.

    Attributes
    ----------
    values : mapping of str to value
        By slide id.
    unknown : tuple of str
        Names that are not those of a slide.
    notes : tuple of str
        Names that were understood although they are written differently.
    """

    values: Mapping[str, Value]
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def match_slides(
    named: Iterable[tuple[str, Value]],
    slide_ids: Iterable[str],
    *,
    where: str,
    policy: Ids = "ask",
    same: Callable[[Value, Value], bool] = lambda one, other: one == other,
) -> Matched[Value]:
    """Find the slides that names mean: an id, a file name or a path, else the only slide that looks like it.

    Parameters
    ----------
    named : iterable of (str, value)
        The rows of a table, or the files of a folder.
    slide_ids : iterable of str
    where : str
        The table or folder, for messages.
    policy : {"ask", "merge", "exact"}
        ``exact`` takes no name for another one.
    same : callable
        Tells whether two values for one slide agree.

    Raises
    ------
    TableError
        With all of them, if slides are named twice with different values, or a name could mean several slides.
    """
    known = dict.fromkeys(slide_ids)
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for one in known:
        alike[look_alike(one)].append(one)
    values: dict[str, Value] = {}
    unknown, notes, faults = [], [], []
    for name, value in named:
        found = _meant(name, known, {} if policy == "exact" else alike)
        if len(found) != 1:
            (faults.append(f"{name!r} could be {' or '.join(found)}") if found else unknown.append(name))
            continue
        (slide,) = found
        if slide in values and not same(values[slide], value):
            faults.append(f"slide {slide!r} has two rows with different values")
        if slide not in (name, slide_id(name), slide_stem(Path(name))):
            notes.append(f"{visible(name)} was matched to slide {visible(slide)}")
        values[slide] = value
    if faults:
        raise TableError(f"{where}: {'; '.join(faults)}; keep one row or file per slide")
    return Matched(values, tuple(unknown), tuple(notes))


def matches(cells: Sequence[str], slides: Iterable[str]) -> int:
    """Return how many of the first cells of a column look like the name of a slide; of several in a cell one counts."""
    known = {look_alike(one) for one in slides}
    firsts = (re.split(r"[;\n]", cell.strip(), maxsplit=1)[0] for cell in cells[:COMPARED])
    return sum(look_alike(slide_id(first)) in known or look_alike(slide_stem(Path(first))) in known for first in firsts)


def spelled_as(
    names: Iterable[str], known: Iterable[str], *, what: str, where: str, than: str, policy: Ids = "ask"
) -> dict[str, str]:
    """Return for names that are none of the known ones which of these they mean; without those that mean none.

    A file name or a path means its slide. A name that only looks like another one is a question to a person.

    Parameters
    ----------
    names : iterable of str
    known : iterable of str
    what, where, than : str
        For the message: "slides", "the splits" and "the label table".
    policy : {"ask", "merge", "exact"}
        ``merge`` takes look-alikes for the known name, ``exact`` for other names.

    Raises
    ------
    LabelError
        With all of them, if names only look like known ones and `policy` is ``ask``, or one could be several.
    """
    exact = dict.fromkeys(known)
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for one in exact:
        alike[same_patient(one) if what == "patients" else look_alike(one)].append(one)
    meant: dict[str, str] = {}
    only_alike, faults = [], []
    for name in dict.fromkeys(name for name in names if name not in exact):
        plain = _meant(name, exact, {})
        key = same_patient(name) if what == "patients" else look_alike(slide_id(name))
        found = plain or ([] if policy == "exact" else alike.get(key, []))
        if len(found) > 1:
            faults.append(f"{name!r} could be {' or '.join(found)}")
        elif found:
            meant[name] = found[0]
            if not plain:
                only_alike.append((name, found[0]))
    if faults:
        raise LabelError(
            f"{where} names {what} that could be several in {than}: {'; '.join(faults[:SHOWN])}; correct it"
        )
    if only_alike and policy == "ask":
        count = f"1 {what[:-1]} is" if len(only_alike) == 1 else f"{len(only_alike)} {what} are"
        raise LabelError(
            f"{count} written in another way in {where} than in {than}: {listed(only_alike)}; "
            "correct one of them, or say whether they are the same (--ids merge) or different (--ids exact)"
        )
    return meant


def _meant(name: str, known: Mapping[str, object], alike: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """Return the slides that a name may mean."""
    # a picture keeps its suffix in its id where it lies beside a slide of the same name, so the whole name comes first
    file = clean(name).replace("\\", "/").rsplit("/", 1)[-1]
    for spelling in (name, file, slide_id(name), slide_stem(Path(slide_id(name)))):
        if spelling in known:
            return (spelling,)
    return alike.get(look_alike(slide_id(name)), ())
