"""What every command shares: --config, --set, --verbose, progress bars, result paths and exit codes.

Exit codes: 0 all done; 1 finished, but some slides failed; 2 usage or configuration; 3 the environment, or a fault of
eosin's own, stopped the run; 128 + n stopped by signal n. `_ending` is the only place that decides.

An option may be given several times over: the command-line flag wins over ``--set``, ``--set`` wins over the
``--config`` file, and the file wins over the default.
"""

import functools
import inspect
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from eosin.devices import limit_threads
from eosin.errors import ConfigError, EosinError, MissingPackageError, OutputError, UnknownNameError
from eosin.processes import Stopped, stoppable

if TYPE_CHECKING:
    from rich.console import Console

    from eosin.batch import Outcome, Report
    from eosin.options import Options

OptionsT = TypeVar("OptionsT", bound="Options")
ItemT = TypeVar("ItemT")

GROUPS = (
    "tiling", "tissue", "encoder", "recipe", "task", "target", "folds", "formats",  # as `eosin.pipeline.run.Pipeline`
    "cohort", "pipeline",  # as `eosin.pipeline.demo.Demo`
    "quality",  # as `eosin.wsi.quality.QualityLimits`
    "questions",  # as `eosin.pipeline.question.Questions`
    "selection", "second",  # as `eosin.pipeline.selection.Selection`, `eosin.pipeline.two_stage.SecondStage`
)  # fmt: skip
USAGE, ENVIRONMENT = 2, 3
PIPE_WIDTH = 200

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file with groups of options (tiling: {mpp: 1.0}).")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One option (tiling.mpp=1.0); repeatable.")
]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="MODULE", help="Module or .py file with methods of your own; repeatable."),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Log more, and show the traceback of an error.")]


@dataclass(frozen=True)
class Done:
    """What a command hands back: results to name on stdout, and the batch's report when there was a batch."""

    paths: Sequence[Path] = ()
    report: "Report | None" = None


@dataclass(frozen=True)
class Settings:
    """The merged ``--config`` file and ``--set`` assignments of one command: group of options -> plain values."""

    data: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Path | None, assignments: Sequence[str], groups: Sequence[str]) -> "Settings":
        """Merge the file and the assignments.

        The file may hold groups of other commands, so that one file serves a whole project; an assignment must name
        one of `groups`, those of this command.

        Raises
        ------
        ConfigError
            If the file cannot be read, or a group is unknown.
        """
        from eosin.options import override, read_yaml

        data = read_yaml(config) if config else {}
        for group in data:
            if group not in GROUPS:
                raise UnknownNameError(f"group of options in {config}", str(group), GROUPS)
        for assignment in assignments:
            group = assignment.split("=")[0].split(".")[0].strip()
            if group not in groups:
                raise UnknownNameError(f"group of options for --set {assignment}", group, groups)
        return cls(override(data, assignments))

    def group(self, name: str, **flags: Any) -> dict[str, Any]:
        """Return the options of one group, overridden by the flags that were given (are not None)."""
        options = self.data.get(name) or {}
        if not isinstance(options, Mapping):
            raise ConfigError(f"group of options {name!r}: expected a mapping, found {options!r}")
        return dict(options) | {key: value for key, value in flags.items() if value is not None}

    def parse(self, name: str, kind: type[OptionsT], **flags: Any) -> OptionsT:
        """Return one group as the library's checked options object."""
        return kind.parse(self.group(name, **flags), source=name)

    def choose(self, name: str, flag: Any, default: Any) -> Any:
        """Return a plain option: the flag when it was given, else what file or ``--set`` say, else the default."""
        return self.data.get(name, default) if flag is None else flag


def command(*groups: str) -> Callable[[Callable[..., Done]], Callable[..., None]]:
    """Make a command of a function: add the options that all share, print the results, end with the right exit code.

    Parameters
    ----------
    *groups : str
        Groups of options that this command reads. They arrive as the argument ``settings`` when the function has one.
    """

    def decorate(function: Callable[..., Done]) -> Callable[..., None]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(
            *,
            config: Path | None,
            assignments: list[str] | None,
            plugins: list[str] | None,
            verbose: bool,
            **arguments: Any,
        ) -> None:
            from eosin.plugins import add_plugin

            with _reported(verbose=verbose):
                for name in plugins or ():
                    add_plugin(name)
                settings = Settings.read(config, assignments or [], groups)
                if "settings" in signature.parameters:
                    arguments["settings"] = settings
                _finish(function(**arguments))

        run.__signature__ = _with_shared_options(signature)  # type: ignore[attr-defined]
        return run

    return decorate


def _with_shared_options(signature: inspect.Signature) -> inspect.Signature:
    own = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter("config", keyword, default=None, annotation=ConfigFile),
        inspect.Parameter("assignments", keyword, default=None, annotation=Assignments),
        inspect.Parameter("plugins", keyword, default=None, annotation=Plugins),
        inspect.Parameter("verbose", keyword, default=False, annotation=Verbose),
    ]
    return signature.replace(parameters=[*own, *shared])


def _finish(done: Done) -> None:
    if done.report is not None:
        for record in done.report.failed:
            say(f"failed: {record.slide_id}: {record.message} [{record.reason}]")
        say(done.report.summary())
    for path in done.paths:
        typer.echo(path)
    sys.stdout.flush()
    if done.report is not None and done.report.exit_code:
        raise typer.Exit(done.report.exit_code)


def say(message: str) -> None:
    """Write one line to stderr."""
    typer.echo(" ".join(message.split()), err=True)


@contextmanager
def _reported(*, verbose: bool) -> Iterator[None]:
    limit_threads()
    with _listening(verbose=verbose), stoppable():
        try:
            yield
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt, Stopped) as error:  # noqa: BLE001 - a person must not see a traceback
            if verbose:
                traceback.print_exc(file=sys.stderr)
            line, code = _ending(error)
            if line:
                say(f"error: {line}")
            raise typer.Exit(code) from None


def _ending(error: BaseException) -> tuple[str, int]:
    """Return the line and the exit code of an error: the one place where this is decided."""
    if isinstance(error, ImportError) and not isinstance(error, EosinError):
        error = MissingPackageError(error)
    if isinstance(error, OutputError | MissingPackageError):
        return error.message, ENVIRONMENT
    if isinstance(error, EosinError):
        return error.message, USAGE
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return "", 128 + signal.SIGPIPE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}", ENVIRONMENT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the second is torch's
        return "out of memory; take a smaller batch, fewer workers or another device", ENVIRONMENT
    if isinstance(error, KeyboardInterrupt | Stopped):
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        return f"stopped by {number.name}; what was finished is kept", 128 + number
    return f"unexpected {type(error).__name__}: {error}; run with --verbose for the traceback", ENVIRONMENT


def _drop_stdout() -> None:
    """Point stdout nowhere, so that Python's last flush does not fail on the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _SayHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def _listening(*, verbose: bool) -> Iterator[None]:
    """Show the package's log records and Python's warnings as single lines while a command runs."""
    logger = logging.getLogger("eosin")
    handler, level = _SayHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_args, **_options: say(f"warning: {message}")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[object], None] | None]:
    """Show a bar on stderr while the block runs, when a person is watching.

    Yields
    ------
    callable or None
        To be called once per finished item; None when stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(what, total=total)
        yield lambda _item: bars.advance(task)


def apply_to_each(
    items: Sequence[ItemT], work: Callable[[ItemT], "Outcome"], *, key: Callable[[ItemT], str], stage: str
) -> "Report":
    """Do a command's work on its inputs: one alone raises what is wrong with it, of many each fails alone."""
    from eosin.batch import Record, Report, run_batch

    with progress(stage, len(items)) as advance:
        if len(items) == 1:
            outcome = work(items[0])
            return Report((Record(key(items[0]), stage, outcome.status, "", outcome.message),))
        return run_batch(items, work, key=key, stage=stage, progress=advance)


def console() -> "Console":
    """Return a console on stdout that does not squeeze tables when it is piped."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
