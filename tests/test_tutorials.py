"""Every tutorial of the site is a script that runs."""

import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.py"))


@pytest.mark.long
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_from_its_first_to_its_last_line(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::FutureWarning", path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    if path.stem == "own_method":
        means = [float(line.partition("'mean': ")[2].split(",")[0]) for line in done.stdout.splitlines()[1:]]
        assert means[0] > means[1], "the tutorial's method finds the few tiles that the mean does not"


def test_the_site_lists_every_page_and_every_tutorial() -> None:
    root = TUTORIALS[0].parents[2]
    listed = {
        line.split()[-1] for line in (root / "mkdocs.yml").read_text(encoding="utf-8").splitlines() if ".md" in line
    }
    pages = {path.name for path in (root / "docs").glob("*.md")} | {f"tutorials/{path.stem}.md" for path in TUTORIALS}
    assert pages == listed
