"""What documents and docstrings say: every back-quoted reference resolves; the worst patterns of prose are refused."""

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import typer.main

from eosin.cli.app import app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "eosin"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
SOURCES = sorted(PACKAGE.rglob("*.py"))
FILE_ENDINGS = (".py", ".md", ".yaml", ".toml", ".sh", ".jinja")

COMPARED = "longer|more|less|such|worse|better|slower|faster|later"  # "is no longer" is good English

REFUSED = {  # pattern -> what to write instead
    rf"(?<![Tt]here )\b(?:is|are|was|were) no (?!{COMPARED})\w+": "'is not a'",
    r"\b(?:is|are|was) told\b": "'is reported', 'is printed'",
    r"\bit is said that\b": "say who says what: 'the command warns that ...'",
    r"\bis warned of\b": "'triggers a warning'",
    r"\bhas not the\b|\bhave not the\b": "'does not have the ...'",
    r"\bwhat is to be \w+ed\?": "state the missing option: 'nothing to predict: pass ...'",
    r"\bnobody to \w+ on\b": "'there are no slides to train on'",
    r"\blead back\b": "'form a loop'",
    r"\bwho has the \w+ has the\b": "one clause, one subject",
    r"\bsays nothing of\b": "'does not state'",
    r"\bis that of the\b.*\bthat of the\b": "repeat the noun once",
    r"\bwants for\b|\bis wanting\b": "'is missing'",
    r"\banew\b": "'again'",
    r"\b(?:is|are|was|were|be) taken for\b": "'is treated as', 'is read as'",
    r"\bby heart\b": "'overfits'",
    r"\b(?:go|goes|went|going) the (?:whole|same) way\b": "'run every step'",
    r"\bstumbles?\b|\bstumbled\b": "'fails'",
    r"\bwithout places\b": "'without tile coordinates'",
    r"\btold apart\b|\btells? apart\b": "'are separated', 'separates'",
    r"\bspeaks? (?:for|against)\b": "'is evidence for', 'counts against'",
    r"\bknows (?:no|nothing)\b": "'has no', 'is the same for all'",
    r"\bfor want of\b": "'because ... is missing'",
    r"\bat hand\b": "'available'",
    r"\bstands? in (?:every|all)\b": "'is printed in every'",
    r"\bwere both given\b": "'exclude each other; pass one of them'",
    r"\bthe whole of an?\b": "'all of the'",
    r" — ": "two sentences; no dash between clauses",
}
REFUSED_IN_MESSAGES = {  # what a comment may say, and a message must not
    r"\?$": "state what is wrong instead of asking",
    r"\b[Nn]obody\b": "'there are no ...'",
    r"\b[Ww]hoever\b": "'anyone who', or address the user",
    r"\b(?:is|are|was|were) asked for\b": "'was requested'",
    r"\bleave (?:it|them|--[a-z-]+) out\b|\bleave out --": "'remove --option'",
    r"\bgive (?:one|some|another|both)\b": "'pass one of them'",
    r"\bno reader\b": "'eosin cannot read'",
    r"; refused\b": "state the limit and what to do",
    r"\bthere is no such (?:file|folder)\b": "'no such file; check the path'",
}


def references(text: str) -> Iterator[str]:
    """Return what stands between single or double back-quotes on one line, without fenced code."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    yield from (match[1] or match[2] for match in re.finditer(r"``([^`\n]+)``|`([^`\n]+)`", text))


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Return the prose of a source file, comments and texts, with the lines where it stands."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield token.start[0], " ".join(token.string.split())


@cache
def options() -> frozenset[str]:
    """Return every option of every command, hidden ones included."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    found = {"--version", "--help", "-h", "--install-completion"}
    for command in group.commands.values():  # type: ignore[attr-defined]
        for parameter in command.params:
            found.update(parameter.opts, parameter.secondary_opts)
    return frozenset(found)


@cache
def commands() -> frozenset[str]:
    return frozenset(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@cache
def file_names() -> frozenset[str]:
    folders = ("eosin", "tests", "docs", "benchmarks", "configs")
    return frozenset(path.name for folder in folders for path in (ROOT / folder).rglob("*")) | {
        path.name for path in ROOT.iterdir()
    }


def module_resolves(dotted: str) -> bool:
    """Tell whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for name in parts[cut:]:
            annotated = getattr(found, "__annotations__", {}) | getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, name) and name not in annotated:
                return False
            found = getattr(found, name, None)
        return True
    return False


def path_resolves(text: str) -> bool:
    """Tell whether a path of the repository exists; ``<paper>`` stands for any name."""
    pattern = re.sub(r"<[^>]*>|\{[^}]*\}", "*", text.rstrip("/"))
    return any(next(base.glob(pattern), None) is not None for base in (ROOT, PACKAGE, ROOT / "tests"))


def unresolved(text: str) -> Iterator[str]:
    for reference in references(text):
        if not resolves(reference):
            yield reference
        elif reference.startswith(("eosin ", "--")):
            named = re.findall(r"(?<![\w-])--[a-z][a-z-]+", reference)
            yield from (f"{reference}: {option}" for option in named if option not in options())


def resolves(reference: str) -> bool:
    """Tell whether a module, command, path or file of the repository exists; other references are not judged."""
    if re.fullmatch(r"eosin(\.\w+)+", reference) and reference not in KEYS_IN_FILES:
        return module_resolves(reference)
    if command := re.match(r"eosin ([a-z]+)\b", reference):
        return command[1] in commands()
    if re.fullmatch(r"[\w./<>*{}-]+", reference) and "/" in reference and reference.split("/")[0] in TOPS:
        return not reference.endswith((*FILE_ENDINGS, "/")) or path_resolves(reference)
    if re.fullmatch(r"[\w-]+\.(?:py|md)", reference):
        return reference in file_names() or reference in ABSENT_ON_PURPOSE
    return True


KEYS_IN_FILES = {"eosin.coords", "eosin.quality"}  # encoding types of files, not modules
QUOTES_OTHER_TOOLS = ("coming_from.md", "compare.md")
ABSENT_ON_PURPOSE = {"utils.py"}
TOPS = {
    *("eosin", "tests", "docs", "benchmarks", "configs"),
    *(path.name for path in PACKAGE.iterdir() if path.is_dir()),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_reference_of_a_page_resolves(page: Path) -> None:
    found = list(unresolved(page.read_text(encoding="utf-8")))
    assert [one for one in found if one.startswith("eosin") or page.name not in QUOTES_OTHER_TOOLS] == []


def test_every_reference_of_a_docstring_resolves() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {reference}"
        for path in SOURCES
        for text in docstrings(path)
        for reference in unresolved(text)
    ]
    assert found == []


def anchors(page: Path) -> set[str]:
    """Return what a link may name behind `#`: the headings, as the site and most viewers spell them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^(?:# )?#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_link_between_pages_leads_to_a_file_and_a_heading() -> None:
    found = []
    for page in [*PAGES, *TUTORIALS]:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            path = page.parent / target if target else page
            if path.parent.name == "tutorials":  # pages that the site makes of scripts
                path = path.with_suffix(".py")
            if not path.exists() or (anchor and anchor not in anchors(path)):
                found.append(f"{page.name}: {target}#{anchor}")
    assert found == []


JUDGED = [page for page in [*PAGES, *TUTORIALS] if page.name != "prose.md"]  # which quotes what it refuses


@pytest.mark.parametrize("path", [*JUDGED, PACKAGE], ids=lambda path: path.name)
def test_the_worst_patterns_of_prose_are_absent(path: Path) -> None:
    files = [path] if path.is_file() else [*SOURCES, *PACKAGE.rglob("*.jinja")]
    found = [
        f"{file.relative_to(ROOT)}:{line}: {match[0]!r}: write {instead}"
        for file in files
        for line, text in sentences(file)
        for pattern, instead in REFUSED.items()
        for match in re.finditer(pattern, text)
    ]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    "text",
    ["`eosin.wsi.stage.tile_slides`", "`eosin frobnicate`", "`--no-such-option`", "`mil/methods/none.py`", "`none.py`"],
)
def test_a_reference_that_leads_nowhere_is_seen(text: str) -> None:
    assert list(unresolved(text)) != []


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Return the texts that are given to an error or to a warning, with ``{}`` where a value goes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and re.search(r"(?:Error|Exit|warning|error|say)$", ast.unparse(node.func)):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                if (text := text_of(argument)).count(" "):
                    yield node.lineno, text


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "{}" for part in node.values)
    return ""


def test_the_worst_patterns_of_messages_are_absent() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}: write {instead}"
        for path in SOURCES
        for line, text in messages(path)
        for pattern, instead in REFUSED_IN_MESSAGES.items()
        for match in re.finditer(pattern, text)
    ]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        *("It is no slide.", "Unknown names are told.", "the file has not the columns", "training starts anew"),
        *("labels are taken for numbers", "it learns the bags by heart", "go the whole way", "the reader stumbles"),
        *("features without places", "patients told apart", "tiles that speak against it", "attention knows no class"),
        *("left for want of time", "no GPU was at hand", "the way stands in every output", "a and b were both given"),
        *("the whole of a slide", "a file — if there is one"),
    ],
)
def test_a_refused_pattern_is_seen(text: str) -> None:
    assert any(re.search(pattern, text) for pattern in REFUSED)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        *(("which column is it?", True), ("nobody to test", True), ("whoever has it", True), ("5 was asked for", True)),
        *(("leave it out", True), ("leave out --compile", True), ("give one", True), ("no reader knows it", True)),
        *(("64 GiB; refused", True), ("there is no such file", True)),
        ("a.svs: states no mpp; pass --slide-mpp", False),
    ],
)
def test_a_refused_pattern_of_messages_is_seen(text: str, refused: bool, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(f"raise ConfigError(f'{{path}}: {text}')", encoding="utf-8")
    seen = [pattern for _, said in messages(path) for pattern in REFUSED_IN_MESSAGES if re.search(pattern, said)]
    assert bool(seen) is refused
