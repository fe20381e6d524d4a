"""What a release consists of besides the package: containers, recipes, the lock, forms; they agree with the project."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import eosin

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = ROOT / "release" / "requirements.txt"
CONDA_NAMES = {"pytorch": "torch", "openslide": "openslide-bin", "typing-extensions": "typing-extensions"}
HASHED = re.compile(r"^(\S+)==(\S+?)(?: ; (.*?))? \\$", re.M)


def locked() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version, _ in HASHED.findall(LOCK.read_text(encoding="utf-8")):
        found.setdefault(canonicalize_name(name), set()).add(version)
    return found


def wanted(extra: str = "all") -> list[Requirement]:
    """Return the requirements of the core and of an extra, and of the extras that it consists of."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    names = {extra}
    while names:
        for text in PROJECT["optional-dependencies"][names.pop()]:
            requirement = Requirement(text)
            if requirement.name == "eosin":
                names |= requirement.extras
            else:
                found.append(requirement)
    return found


def test_the_lock_has_every_requirement_in_a_version_that_fits() -> None:
    have = locked()
    for requirement in wanted():
        versions = have.get(canonicalize_name(requirement.name), set())
        assert versions, f"{requirement.name}: run make lock"
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement}: run make lock"


def test_the_lock_has_a_hash_for_each_package_and_no_address() -> None:
    text = LOCK.read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=\S)", text.strip())
    assert len(blocks) == len(HASHED.findall(text))
    assert all(re.search(r"^    --hash=sha256:[0-9a-f]{64}", block, re.M) for block in blocks)
    assert not re.search(r"://|--(?:extra-)?index|--find-links|@ file", text)


def test_the_conda_recipe_asks_for_what_the_project_asks_for() -> None:
    recipe = yaml.safe_load((ROOT / "release" / "conda" / "recipe.yaml").read_text(encoding="utf-8"))
    asked = {}
    for line in recipe["requirements"]["run"]:
        name, _, bound = line.partition(" ")
        name = canonicalize_name(name)
        asked[canonicalize_name(CONDA_NAMES.get(name, name))] = bound
    python = asked.pop("python")
    assert python == ">=${{ python_min }}"
    assert recipe["context"] == {"version": eosin.__version__, "python_min": PROJECT["requires-python"].lstrip(">=")}
    # the channel counts the fourth number of openslide-bin as a build
    expected = {
        canonicalize_name(one.name): str(one.specifier)
        for one in wanted("report")
        if one.name not in ("jinja2", "matplotlib")
    }
    assert asked == expected | {"openslide-bin": ">=4.0.0"}


def test_the_images_contain_what_their_recipes_copy() -> None:
    recipes = [(ROOT / "Dockerfile").read_text(encoding="utf-8")]
    recipes.append((ROOT / "release" / "apptainer.def").read_text(encoding="utf-8"))
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in ("pyproject.toml", "README.md", "LICENSE", "eosin", "release/requirements.txt"):
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
        assert all(name in recipe for recipe in recipes)
    assert re.findall(r"^FROM \S+ AS (\w+)$", recipes[0], re.M) == ["wheel", "base", "cpu", "cuda"]
    assert PROJECT["scripts"] == {"eosin": "eosin.cli.app:main"}, "what both images start"


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_every_form_of_an_issue_has_what_a_form_needs(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        needed = "value" if field["type"] == "markdown" else "label"
        assert isinstance(field["attributes"][needed], str)
        options = field["attributes"].get("options", ["one"])
        assert all(isinstance(option, str) for option in options), (
            "yes and no without quotes are true and false in YAML"
        )


def test_the_citation_names_the_software_and_its_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"]


def test_no_address_is_given_that_does_not_exist_yet() -> None:
    assert "urls" not in PROJECT
    assert "repository-code" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
