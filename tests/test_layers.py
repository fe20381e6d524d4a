"""The order of the packages and what each may import, read from the source with `ast`."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "eosin"

ORDER = (
    "errors",
    "names",
    "options",
    "files",
    "fingerprints",
    "seals",
    "filesets",
    "devices",
    "processes",
    "columns",
    "tables",
    "plugins",
    "spread",
    "record_store",
    "records",
    "claims",
    "batch",
    "cluster",
    "kernels",
    "wsi",
    "features",
    "mil",
    "heatmaps",
    "report",
    "pipeline",
    "viewer",
    "cli",
)

WHOLE = {"__init__.py", "__main__.py"}  # these may import everything
EVERYWHERE = {"__version__", "lazy"}  # and these may be imported everywhere

LEAST = {"pydantic", "yaml"}
MAY = {  # third-party packages, beside the standard library
    "errors": set(),
    "names": set(),
    "columns": set(),
    "options": LEAST,
    "files": set(),
    "fingerprints": set(),
    "seals": set(),
    "filesets": set(),
    "plugins": set(),
    "tables": {"openpyxl", "pyarrow"},
    "devices": {"torch"},
    "processes": set(),
    "spread": set(),
    "record_store": set(),
    "records": set(),
    "claims": set(),
    "batch": set(),
    "cluster": {"pydantic", "parsl"},
    "kernels": {"torch", "triton"},
}
MUST_NOT = {
    "wsi": {"torch", "timm", "sklearn"},
    "features": {"sklearn"},
    "mil": {"openslide", "tifffile", "PIL", "timm", "matplotlib", "bokeh"},
}
ONLY_IN = {  # third-party package -> the files that may import it
    "openslide": {"wsi/openslide_impl.py"},
    "triton": {"kernels/*/triton_impl.py"},
    "timm": {"features/encoders.py", "features/networks.py"},
    "h5py": {"wsi/coordinates.py", "features/store.py", "features/foreign_hdf5.py", "features/interop/*.py"},
    "typer": {"cli/*.py"},
    "parsl": {"cluster/*.py"},
}
ONLY_THESE = {  # (importer, imported package) -> the modules and names of it that may be imported
    ("kernels", "eosin"): {"errors", "kernels"},
    ("mil", "features"): {"bag", "store"},
    ("mil", "wsi"): {"grid"},
}
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"
ORDERED = ("wsi", "mil", "heatmaps")  # packages whose inner order that page states
CLI_TOP = {"typer", "eosin", "eosin.errors", "eosin.claims", "eosin.devices", "eosin.processes", "eosin.cli"}


@dataclass(frozen=True)
class Import:
    """One import of a source file; `top` when it runs with the module, for more than type checking."""

    file: str
    line: int
    module: str
    top: bool

    @property
    def layer(self) -> str:
        """The first part of the importer's path."""
        return self.file.split("/")[0].removesuffix(".py")

    @property
    def foreign(self) -> str:
        """The third-party package that is imported, or an empty text."""
        root = self.module.split(".")[0]
        return "" if root == "eosin" or root in sys.stdlib_module_names else root


def imports(root: Path) -> Iterator[Import]:
    for path in sorted(root.rglob("*.py")):
        file = bare(path.relative_to(root).as_posix(), "/")
        for node, top in statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                assert node.level == 0, f"{file}:{node.lineno}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
            for name in names:
                yield Import(file, node.lineno, bare(name, "."), top)


def bare(path: str, separator: str) -> str:
    """Return a path without the underscores that make its modules private."""
    return separator.join(re.sub("^_(?!_)", "", part) for part in path.split(separator))


def statements(tree: ast.AST, top: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, top
        else:
            inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            )
            yield from statements(node, top and not inner)


def faults(root: Path) -> list[str]:
    found = []
    for item in imports(root):
        for fault in (*own_faults(item), *foreign_faults(item)):
            found.append(f"{item.file}:{item.line}: {fault}")
    return found


def own_faults(item: Import) -> Iterator[str]:
    parts = item.module.split(".")
    if parts[0] != "eosin" or item.file in WHOLE or len(parts) == 1 or parts[1] in EVERYWHERE:
        return
    if item.layer not in ORDER or parts[1] not in ORDER:
        yield f"{item.layer} or {parts[1]} has no place in the order of the packages"
    elif ORDER.index(parts[1]) > ORDER.index(item.layer):
        yield f"{item.layer} imports {parts[1]}, which comes after it"
    allowed = ONLY_THESE.get((item.layer, parts[1]))
    if allowed and not allowed & {parts[2], ".".join(parts[2:])}:
        yield f"{item.layer} may import only {sorted(allowed)} of {parts[1]}, not {'.'.join(parts[2:])}"
    allowed = ONLY_THESE.get((item.layer, "eosin"))
    if allowed and parts[1] not in allowed:
        yield f"{item.layer} may import only {sorted(allowed)}, not {parts[1]}"
    if item.layer == "cli" and item.top and not is_light(item.module):
        yield f"{item.module} is imported with the command line instead of inside a function"


def is_light(module: str) -> bool:
    return module in CLI_TOP or any(module.startswith(f"{light}.") for light in CLI_TOP if "." in light)


def foreign_faults(item: Import) -> Iterator[str]:
    if not item.foreign:
        return
    if item.layer in MAY and item.foreign not in MAY[item.layer]:
        yield f"{item.layer} may import only {sorted(MAY[item.layer])}, not {item.foreign}"
    if item.foreign in MUST_NOT.get(item.layer, set()):
        yield f"{item.layer} must not import {item.foreign}"
    places = ONLY_IN.get(item.foreign)
    if places and not any(Path(item.file).match(place) for place in places):
        yield f"{item.foreign} may be imported only in {sorted(places)}"
    if item.layer == "cli" and item.top and item.foreign != "typer":
        yield f"{item.foreign} is imported with the command line instead of inside a function"
    if item.foreign == "timm" and item.top:
        yield "timm is imported at the top instead of where a network is built"


def floors(package: str) -> dict[str, int]:
    """Return the line of the architecture's table on which each module of a package stands."""
    text = (
        ARCHITECTURE.read_text(encoding="utf-8").partition(f"| in `{package}`, a line that |")[2].partition("\n\n")[0]
    )
    places = [row.split("|")[2] for row in text.splitlines()[2:]]
    return {bare(name, "."): floor for floor, place in enumerate(places) for name in re.findall("`([^`]+)`", place)}


def inner_faults(root: Path, package: str, known: dict[str, int]) -> list[str]:
    found = []
    for item in imports(root):
        inside = item.module.removeprefix(f"eosin.{package}.")
        target = next((name for name in (inside, inside.rpartition(".")[0]) if name in known), None)
        own = item.file.removeprefix(f"{package}/").removesuffix(".py").replace("/", ".")
        if item.layer == package and own in known and target and known[target] > known[own]:
            found.append(f"{item.file}:{item.line}: {own} imports {target}, which comes after it")
    return found


@pytest.mark.parametrize("package", ORDERED)
def test_every_module_of_a_package_has_one_place_in_it(package: str) -> None:
    files = {path.relative_to(PACKAGE / package).with_suffix("") for path in (PACKAGE / package).rglob("*.py")}
    modules = {bare(".".join(path.parts), ".") for path in files if path.name != "__init__"}
    assert sorted(modules) == sorted(floors(package))


@pytest.mark.parametrize("package", ORDERED)
def test_a_module_imports_nothing_that_comes_after_it_in_its_package(package: str) -> None:
    assert inner_faults(PACKAGE, package, floors(package)) == []


@pytest.mark.parametrize("source", ["from eosin.wsi._job import tile", "def f():\n    import eosin.wsi._job"])
def test_the_check_sees_an_import_of_what_comes_after(tmp_path: Path, source: str) -> None:
    (tmp_path / "wsi").mkdir()
    (tmp_path / "wsi" / "_slide.py").write_text(source)
    assert len(inner_faults(tmp_path, "wsi", floors("wsi"))) == 1


def test_every_package_keeps_to_the_order_and_its_imports() -> None:
    assert faults(PACKAGE) == []


@pytest.mark.parametrize("module", sorted(bare(one.stem, ".") for one in PACKAGE.iterdir() if one.suffix != ".typed"))
def test_every_top_level_module_has_a_place_in_the_order(module: str) -> None:
    assert module in {*ORDER, "__init__", "__main__", "__pycache__", "lazy", "moved"}


@pytest.mark.parametrize(
    ("file", "source", "told"),
    [
        ("wsi/slide.py", "from eosin.features._bag import FeatureBag", "comes after it"),
        ("wsi/slide.py", "import torch.nn", "must not import torch"),
        ("wsi/grid.py", "def f():\n    import openslide", "may be imported only in"),
        ("_batch.py", "import numpy", "may import only"),
        ("kernels/_segments.py", "from eosin.options import Options", "not options"),
        ("mil/train.py", "from eosin.features._encoders import load_encoder", "not encoders"),
        ("mil/train.py", "from eosin.wsi import open_slide", "not open_slide"),
        ("mil/train.py", "from eosin.wsi._slide import open_slide", "not slide.open_slide"),
        ("mil/train.py", "import matplotlib.pyplot", "must not import matplotlib"),
        ("features/encoders.py", "import timm", "instead of where a network is built"),
        ("cli/tile.py", "import numpy", "instead of inside a function"),
        ("cli/tile.py", "from eosin.wsi._job import tile_slides", "instead of inside a function"),
        ("heatmaps/png.py", "if TYPE_CHECKING:\n    from eosin.cli import app", "comes after it"),
        ("extras/x.py", "import eosin.errors", "has no place"),
    ],
)
def test_the_check_sees_a_forbidden_import(tmp_path: Path, file: str, source: str, told: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert len(faults(tmp_path)) == 1
    assert told in faults(tmp_path)[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("wsi/openslide_impl.py", "import openslide"),
        ("features/encoders.py", "def load():\n    import timm"),
        ("kernels/x/triton_impl.py", "import triton.language as tl\nfrom eosin.errors import EosinError"),
        ("mil/data.py", "from eosin.features._store import read_bag\nfrom eosin.wsi._grid import TileGrid"),
        ("cli/tile.py", "import typer\nfrom eosin.cli._common import Done\ndef f():\n    import numpy"),
        ("wsi/job.py", "from eosin import __version__\nfrom eosin._batch import run_batch"),
    ],
)
def test_the_check_lets_a_rightful_import_pass(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert faults(tmp_path) == []
