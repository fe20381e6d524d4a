"""Merging of options, and the exit code of every way a command can end."""

import copy
import errno
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from eosin._records import Record, Report
from eosin.cli._common import Done, command
from eosin.cli._progress import progress
from eosin.cli._settings import Settings
from eosin.errors import ConfigError, LabelError, OutputError, SlideOpenError, UnknownNameError
from eosin.options import Options, merge


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def run(function: Callable[..., Done], *arguments: str, groups: tuple[str, ...] = ()) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command(*groups)(function))
    return CliRunner().invoke(app, list(arguments))


def raising(error: BaseException) -> Callable[[], Done]:
    def fail() -> Done:
        raise error

    return fail


NO_MEMORY = "error: out of memory; use a smaller --batch-size, fewer --workers or another --device"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("bad\n  option"), 2, "error: bad option"),
        (LabelError("no column 'label'"), 2, "error: no column 'label'"),
        (SlideOpenError("a.svs", "is missing"), 2, "error: a.svs: is missing"),
        (OutputError("out", "disk full"), 3, "error: out: disk full"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a.h5"), 3, "error: out/a.h5: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), 3, "error: Permission denied"),
        (MemoryError(), 3, NO_MEMORY),
        (OutOfMemoryError(), 3, NO_MEMORY),
        (KeyboardInterrupt(), 130, "error: stopped by SIGINT; finished results are kept"),
        (
            ZeroDivisionError("division by zero"),
            3,
            "error: unexpected ZeroDivisionError: division by zero; run with --verbose for the traceback",
        ),
    ],
)
def test_every_error_ends_in_one_line_and_its_exit_code(error: BaseException, code: int, line: str) -> None:
    result = run(raising(error))
    assert (result.exit_code, result.stderr.strip(), result.stdout) == (code, line, "")


def test_verbose_shows_the_traceback_before_the_line() -> None:
    result = run(raising(ConfigError("bad option")), "--verbose")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.strip().endswith("error: bad option")


def test_result_paths_are_printed_one_per_line_on_stdout() -> None:
    result = run(lambda: Done([Path("a/b"), Path("c")]))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "a/b\nc\n", "")


def test_a_report_with_failures_lists_them_and_ends_with_1() -> None:
    records = (Record("a", "tile", "ok"), Record("b", "tile", "failed", "no-mpp", "has no mpp; pass --slide-mpp"))
    result = run(lambda: Done([Path("job")], Report(records)))
    assert result.exit_code == 1
    assert result.stdout == "job\n"
    assert result.stderr.splitlines() == [
        "failed: b: has no mpp; pass --slide-mpp [no-mpp]",
        "2 slides: 1 ok, 1 failed",
    ]


def test_a_report_without_failures_ends_with_0() -> None:
    result = run(lambda: Done([], Report((Record("a", "tile", "empty"), Record("b", "tile", "skipped", "done")))))
    assert (result.exit_code, result.stderr.strip()) == (0, "2 slides: 1 empty, 1 skipped")


class Tiles(Options):
    """A small group."""

    mpp: float = 0.5
    overlap: int = 0
    size: int = 256


def parsed(*arguments: str) -> Tiles | Result:
    seen: list[Tiles] = []

    def tile(mpp: float | None = None, *, settings: Settings) -> Done:
        seen.append(settings.parse("tiling", Tiles, mpp=mpp))
        return Done()

    result = run(tile, *arguments, groups=("tiling",))
    return seen[0] if seen else result


def test_flag_wins_over_set_wins_over_file_wins_over_default(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("tiling: {mpp: 1.0, overlap: 1}\n")
    assert parsed() == Tiles()
    assert parsed("--config", str(config)) == Tiles(mpp=1.0, overlap=1)
    assert parsed("--config", str(config), "--set", "tiling.mpp=2") == Tiles(mpp=2.0, overlap=1)
    assert parsed("--config", str(config), "--set", "tiling.mpp=2", "--mpp", "4") == Tiles(mpp=4.0, overlap=1)
    assert parsed("--set", "tiling.overlap=3", "--set", "tiling.size=64") == Tiles(overlap=3, size=64)


def test_one_file_may_hold_the_groups_of_other_commands(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("recipe: {training: {epochs: 3}}\n")
    assert parsed("--config", str(config)) == Tiles()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "tilling.mpp=1"], "did you mean tiling"),
        (["--set", "recipe.training.lr=1"], "known: mpp, tiling"),
        (["--set", "tiling.mp=1"], "did you mean mpp"),
        (["--set", "tiling.mpp"], "expected key=value"),
        (["--set", "tiling=3"], "is not a group of options"),
        (["--set", "tiling.mpp=fast"], "tiling: mpp"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(arguments: list[str], told: str) -> None:
    result = parsed(*arguments)
    assert isinstance(result, Result)
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_file_with_an_unknown_group_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("tilling: {mpp: 1.0}\n")
    result = parsed("--config", str(config))
    assert isinstance(result, Result)
    assert (result.exit_code, "did you mean tiling" in result.stderr) == (2, True)


def test_settings_refuse_by_the_known_groups() -> None:
    with pytest.raises(UnknownNameError):
        Settings.read(None, ["cohort.n_slides=3"], ("tiling",))


def test_log_records_and_warnings_become_single_lines_and_leave_nothing_behind() -> None:
    logger = logging.getLogger("eosin.test")
    before = logging.getLogger("eosin").handlers[:]

    def talk() -> Done:
        logger.info("detail")
        logger.warning("look %s", "here")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old\nfile", UserWarning, stacklevel=1)
        return Done()

    assert run(talk).stderr.splitlines() == ["warning: look here", "warning: old file"]
    assert run(talk, "--verbose").stderr.splitlines() == ["info: detail", "warning: look here", "warning: old file"]
    assert logging.getLogger("eosin").handlers == before


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("tile", 3) as advance:
        assert advance is not None
        advance("a")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("base", "changes", "result"),
    [
        ({"a": 1}, {}, {"a": 1}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"b": 1}}, {"a": 5}, {"a": 5}),
        ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"m": {"name": "x", "options": {"k": 1}}}, {"m": {"name": "y"}}, {"m": {"name": "y"}}),
        (
            {"m": {"name": "x", "options": {"k": 1}}},
            {"m": {"name": "x", "options": {"l": 2}}},
            {"m": {"name": "x", "options": {"k": 1, "l": 2}}},
        ),
        (
            {"m": {"name": "x", "options": {"k": 1}}},
            {"m": {"options": {"k": 2}}},
            {"m": {"name": "x", "options": {"k": 2}}},
        ),
    ],
)
def test_merging_keeps_what_is_not_changed_and_drops_options_of_another_part(
    base: dict[str, object], changes: dict[str, object], result: dict[str, object]
) -> None:
    before = copy.deepcopy(base)
    assert merge(base, changes) == result
    assert base == before


SLEEPER = """
import signal, sys, time, typer
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from jobs in the background
from eosin.cli._common import Done, command
from eosin._processes import require_running
def sleep() -> Done:
    try:
        print("ready", flush=True)
        for _ in range(1200):
            require_running()
            time.sleep(0.05)
    finally:
        print("cleaned up", flush=True)
    return Done()
app = typer.Typer(); app.command()(command()(sleep)); app()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cleans_up_and_ends_with_128_plus_n(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert out == "cleaned up\n"
    assert err == f"error: stopped by {number.name}; finished results are kept\n"


def test_a_closed_pipe_ends_silently() -> None:
    code = (
        "import typer\nfrom pathlib import Path\nfrom eosin.cli._common import Done, command\n"
        "def many() -> Done:\n    return Done([Path('x' * 80)] * 100_000)\n"
        "app = typer.Typer(); app.command()(command()(many)); app()"
    )
    reading, writing = os.pipe()
    with subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        os.read(reading, 10)
        os.close(reading)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (128 + signal.SIGPIPE, b"")
