"""The commands that the README shows exist, with the options that it gives them, and its pictures and files too."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from eosin.cli.app import COMMANDS, app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = [
    shlex.split(line)
    for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("eosin ")
]


def test_the_readme_shows_one_command_for_all_and_one_per_step() -> None:
    assert [line[1] for line in SHOWN] == ["run", "tile", "extract", "split", "train", "predict", "heatmap"]


@pytest.mark.parametrize("line", SHOWN, ids=lambda line: line[1])
def test_a_shown_command_is_understood(line: list[str]) -> None:
    command = get_command(app).commands[line[1]]  # type: ignore[attr-defined]
    context = command.make_context(line[1], line[2:], resilient_parsing=False)
    assert context.params["verbose"] is False


def test_every_command_is_mentioned() -> None:
    assert [name for name in COMMANDS if f"eosin {name}" not in TEXT] == []


def test_linked_files_are_there() -> None:
    linked = re.findall(r"\]\(([^)#:]+)\)", TEXT) + re.findall(r"`((?:docs|eosin|configs)/[\w./]+)`", TEXT)
    assert "docs/images/heatmap.jpg" in linked
    assert [name for name in linked if not (ROOT / name).exists()] == []
