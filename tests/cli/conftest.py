"""A runner for the command line and the small inputs that several commands share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from eosin.cli.app import app
from eosin.wsi._synthetic import Cohort, make_cohort

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def run() -> Run:
    """Return a function that runs `eosin ARGUMENTS...` in this process."""

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture(scope="session")
def refused(run: Run) -> Run:
    """Return a function that runs a command, asserts that it is refused in one line, and returns the line."""

    def refused(*arguments: object, code: int = 2) -> str:
        result = run(*arguments)
        assert result.exit_code == code, result.output
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        assert result.stdout == ""
        return lines[0]

    return refused


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paint twelve small slides of six patients; return the folder with slides/, truth/ and labels.csv."""
    folder = tmp_path_factory.mktemp("cohort")
    report = make_cohort(folder, Cohort(n_slides=12, size_um=(400.0, 500.0)))
    assert report.count("ok") == 12
    return folder


@pytest.fixture(scope="session")
def job(cohort: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tile and encode the cohort; return the job folder."""
    job = tmp_path_factory.mktemp("work") / "job"
    assert run("tile", cohort / "slides", "--job", job, "--patch-size", 128).exit_code == 0
    assert run("extract", cohort / "slides", "--job", job, "--encoder", "he_texture", "--workers", 0).exit_code == 0
    return job


@pytest.fixture(scope="session")
def features(job: Path) -> Path:
    """Return the folder of the cohort's features."""
    return job / "0.5mpp_128px_0px_overlap/features_he_texture"
