"""What only some users need is not installed for all, and a command that needs it says so in one line."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_layers import PACKAGE, imports

from eosin.errors import EXTRAS, MissingPackageError

PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn", "openslide": "openslide-python"}
WITH_THEIRS = {"triton": "torch", "pydantic_core": "pydantic", "tornado": "bokeh"}
MOST_CORE = 20

WITHOUT = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {set(EXTRAS)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from eosin.cli.app import app
from typer.testing import CliRunner
def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stderr.strip().splitlines()
def expect(found, *expected):
    assert found == expected, (found, expected)
"""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("-", "_") for requirement in requirements}


def test_the_core_needs_few_packages() -> None:
    assert len(PROJECT["dependencies"]) <= MOST_CORE
    assert all(re.search(r">=\d", requirement) for requirement in PROJECT["dependencies"])


@pytest.mark.parametrize("package", sorted(EXTRAS))
def test_every_hint_names_an_extra_that_installs_the_package(package: str) -> None:
    assert package in names(PROJECT["optional-dependencies"][EXTRAS[package]])
    error = MissingPackageError(ModuleNotFoundError(f"No module named '{package}.x'", name=f"{package}.x"))
    assert str(error) == f"the package {package} is not installed; pip install 'eosin[{EXTRAS[package]}]'"


def test_every_import_is_of_a_package_that_the_project_names() -> None:
    core = names(PROJECT["dependencies"])
    found = {item.foreign for item in imports(PACKAGE)} - {""}
    needed = {WITH_THEIRS.get(name, DISTRIBUTIONS.get(name, name)).replace("-", "_") for name in found}
    extras = {package for extra in PROJECT["optional-dependencies"].values() for package in names(extra)}
    assert needed - core - extras == set()
    assert core - needed == {"openslide_bin"}, "nothing is installed for all that nothing imports"


@pytest.mark.long
def test_slides_are_tiled_and_encoded_without_any_extra(tmp_path: Path) -> None:
    code = f"""{WITHOUT}
from pathlib import Path
from eosin.wsi._synthetic import Cohort, make_cohort
folder = Path({str(tmp_path)!r})
make_cohort(folder, Cohort(n_slides=2, size_um=(400.0, 500.0)))
slides, job = folder / "slides", folder / "job"
expect(run("tile", slides, "--job", job, "--patch-size", 128), 0, ["2 slides: 2 ok"])
expect(run("extract", slides, "--job", job, "--encoder", "he_texture"), 0, ["2 slides: 2 ok"])
assert run("verify", job)[0] == 0
hint = "error: the package {{}} is not installed; pip install 'eosin[{{}}]'"
expect(run("extract", slides, "--job", job, "--encoder", "resnet50?random"), 3, [hint.format("timm", "encoders")])
(folder / "labels.xlsx").write_bytes(b"PK")
expect(run("split", "--labels", folder / "labels.xlsx", "--out", folder), 3, [hint.format("openpyxl", "tables")])
model = ["--model", folder, "--features", folder, "--out", folder]
expect(run("heatmap", *model, "--slide", slides), 3, [hint.format("matplotlib", "report")])
expect(run("view", *model[:4], "--slides", slides), 3, [hint.format("bokeh", "viewer")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
