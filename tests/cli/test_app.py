"""The command as a whole: names, speed of help, spelling of options."""

import subprocess
import sys
import time

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from eosin import __version__
from eosin.cli.app import COMMANDS, app

from .conftest import Run

HEAVY = {"torch", "numpy", "pandas", "scipy", "h5py", "openslide", "tifffile", "timm", "skimage", "sklearn", "PIL"}


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"{__version__}\n"


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys\nfrom eosin.cli.app import COMMANDS, app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as ending:\n    assert ending.code == 0\n"
        f"print('HEAVY', *sorted({HEAVY!r} & set(sys.modules)))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["HEAVY"]
    assert time.monotonic() - started < 3.0  # 0.3 s alone; the machine may be busy


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_takes_the_shared_options(run: Run, name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], terminal_width=200)
    assert result.exit_code == 0
    for option in ("--config", "--set", "--verbose"):
        assert option in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_set_of_an_unknown_group_is_refused_by_every_command(name: str) -> None:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    needed = [p for p in command.params if p.required]
    arguments = [text for p in needed for text in ([p.opts[0], "x"] if p.opts[0].startswith("-") else ["x"])]
    result = CliRunner().invoke(app, [name, *arguments, "--set", "nonsense.x=1"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no group of options")
