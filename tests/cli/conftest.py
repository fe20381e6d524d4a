"""A runner for the command line and the small inputs that several commands share."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from eosin.cli.app import app

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
