"""What every command shares: --config, --set, --verbose, progress bars, result paths and exit codes.

Exit codes: 0 all done; 1 finished, but some slides failed; 2 usage or configuration; 3 the environment, or a fault of
eosin's own, stopped the run; 4 a time limit ended the run, start it again; 128 + n stopped by signal n. `_ending` is
the only place that decides.

Where the value of an option comes from is decided by `eosin.cli._settings`.
"""

import copy
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer

from eosin._devices import choose_device, limit_threads, parse_devices
from eosin._processes import Stopped, require_running, stoppable
from eosin.cli._folders import Folders
from eosin.cli._progress import at_work, progress, say
from eosin.cli._settings import Option, Settings, declaration, fill, option_names, options_of
from eosin.errors import ConfigError, EosinError, MissingPackageError, MoreToDo, OutputError, SeveralErrors

if TYPE_CHECKING:
    from rich.console import Console

    from eosin._batch import Outcome
    from eosin._records import Report

ItemT = TypeVar("ItemT")

USAGE, ENVIRONMENT, MORE_TO_DO = 2, 3, 4
PIPE_WIDTH = 200

STUDY_SUFFIXES = (".yaml", ".yml")
option_names.add("cluster")  # every command may meet it in a study file

StudyFile = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[STUDY.yaml]",
        help="YAML file with the paths and options of a study; every command reads its part.",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Study file; the same as the argument STUDY.yaml.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one option, for example tiling.mpp=1.0; repeatable."),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="MODULE", help="Python module or .py file with your own methods; repeatable."),
]
ClusterFile = Annotated[
    Path | None,
    typer.Option(
        "--cluster", metavar="FILE", hidden=True, help="Let the machines of this site do the work (docs/cluster.md)."
    ),
]
DryRunFlag = Annotated[
    bool, typer.Option("--dry-run", hidden=True, help="With --cluster: say what would be submitted.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print more log lines, and the traceback of an error.")]


@dataclass(frozen=True)
class Done:
    """What a command returns: paths to print on stdout, the report of a batch if there was one, closing lines."""

    paths: Sequence[Path] = ()
    report: "Report | None" = None
    lines: Sequence[str] = ()


def command(
    *groups: str,
    rare: Sequence[str] = (),
    of_job: Mapping[str, str] | None = None,
    bare: str = "",
    checks_device: bool = True,
    cluster: str = "",
) -> Callable[[Callable[..., Done]], Callable[..., None]]:
    """Make a command of a function: add the options that all share, print the results, end with the right exit code.

    Parameters
    ----------
    *groups : str
        Groups of options that this command reads. They arrive as the argument ``settings`` when the function has one.
    rare : sequence of str
        Parameters whose options work as all others do, but are only named at the end of the help.
    of_job : mapping of str to str, optional
        Options that a study file need not state, because they are paths below its job: {"out": "model"}.
    bare : str
        Parameter that takes the paths which stand without an option, as some commands of 0.1 had them.
    checks_device : bool
        Whether a device that is not there is refused before the function is called; one that gathers all problems says
        no.
    cluster : str
        Parameter with the folder that receives the logs of a cluster; the command has ``--cluster`` then.
    """

    def decorate(function: Callable[..., Done]) -> Callable[..., None]:
        signature = inspect.signature(function)
        options = options_of(signature)
        option_names.update(option.key for option in options)
        known = {*groups, *(option.key for option in options), *(["study"] if of_job else [])}
        known |= {"cluster"} if cluster else set()

        @functools.wraps(function)
        def run(
            *,
            context: typer.Context,
            config: Path | None,
            assignments: list[str] | None,
            plugins: list[str] | None,
            verbose: bool,
            study: list[Path] | None = None,
            site: Path | None = None,
            dry_run: bool = False,
            **arguments: Any,
        ) -> None:
            from eosin.plugins import add_plugin

            with _reported(verbose=verbose) as folders:
                folders.add({"study": study, "config": config} | arguments)
                given = {name for name in arguments if _is_given(context, name)}
                file, paths = _study_file(config, study or [])
                if paths:
                    given.add(bare)
                    arguments |= _bare(bare, paths, options)
                settings = Settings.read(file, assignments or [], known)
                for name in [*settings.plugins, *(plugins or [])]:
                    add_plugin(name)
                arguments = fill(arguments, options, settings, given=given, groups=groups, of_job=of_job or {})
                folders.add(arguments)
                if checks_device:
                    _require_devices(arguments)
                _clear_leftovers(arguments)
                require_running()
                if "settings" in signature.parameters:
                    arguments["settings"] = settings
                with on_cluster(site or _stated_site(settings), arguments.get(cluster), dry_run=dry_run):
                    _finish(function(**arguments))

        run.__signature__ = _with_shared_options(signature, options, rare, has_cluster=bool(cluster))  # type: ignore[attr-defined]
        run.__doc__ = (
            f"{_unwrapped(inspect.getdoc(function) or '')}\n\n{_more(options, groups, rare, has_cluster=bool(cluster))}"
        )
        return run

    return decorate


def _clear_leftovers(arguments: Mapping[str, Any]) -> None:
    """Remove what killed runs left in the folders of a command."""
    from eosin._files import clear_leftovers

    for folder in (arguments.get("job"), arguments.get("out")):
        if isinstance(folder, Path) and folder.is_dir():
            clear_leftovers(folder)


def _stated_site(settings: Settings) -> Path | None:
    """Return the site that a study file names."""
    return settings.value("cluster", Path) if "cluster" in settings.data else None


def _require_devices(arguments: Mapping[str, Any]) -> None:
    """Refuse a device that is not there before any work, in every command that takes one."""
    if arguments.get("device") not in (None, "auto"):
        choose_device(arguments["device"])
    if arguments.get("devices"):
        parse_devices(arguments["devices"])


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _study_file(config: Path | None, study: Sequence[Path]) -> tuple[Path | None, list[Path]]:
    """Return the study file, and the other paths that stand without an option."""
    files = [path for path in study if path.suffix in STUDY_SUFFIXES]
    others = [path for path in study if path.suffix not in STUDY_SUFFIXES]
    if len(files) + (config is not None) > 1:
        raise ConfigError(f"{', '.join(map(str, [*files, *([config] if config else [])]))}: pass one study file only")
    return (files[0] if files else config), others


def _bare(name: str, paths: list[Path], options: Sequence[Option]) -> dict[str, Any]:
    """Return the argument that takes the paths which stand without an option."""
    option = next((option for option in options if option.parameter == name), None)
    if option is None:
        raise ConfigError(f"{paths[0]}: not a study file (.yaml); put the option's name before this path")
    if not option.is_list and len(paths) > 1:
        raise ConfigError(f"{' '.join(map(str, paths))}: {option.flag} takes one path, {len(paths)} were given")
    return {name: paths if option.is_list else paths[0]}


def _with_shared_options(
    signature: inspect.Signature, options: Sequence[Option], rare: Sequence[str], *, has_cluster: bool
) -> inspect.Signature:
    """Return the signature that typer reads: an option that must be there may be said by the study file, too."""
    own = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
    has_arguments = len(own) > len(options)
    required = {option.parameter for option in options if option.required}
    own = [one.replace(default=None) if one.name in required else one for one in own]
    own = [_hidden(one) if one.name in rare else one for one in own]
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        *([] if has_arguments else [inspect.Parameter("study", keyword, default=None, annotation=StudyFile)]),
        *([inspect.Parameter("site", keyword, default=None, annotation=ClusterFile)] if has_cluster else []),
        *([inspect.Parameter("dry_run", keyword, default=False, annotation=DryRunFlag)] if has_cluster else []),
        inspect.Parameter("config", keyword, default=None, annotation=ConfigFile),
        inspect.Parameter("assignments", keyword, default=None, annotation=Assignments),
        inspect.Parameter("plugins", keyword, default=None, annotation=Plugins),
        inspect.Parameter("verbose", keyword, default=False, annotation=Verbose),
    ]
    return signature.replace(parameters=[*own, *shared])


def _hidden(parameter: inspect.Parameter) -> inspect.Parameter:
    declared = copy.copy(declaration(parameter))
    declared.hidden = True
    return parameter.replace(annotation=Annotated[get_args(parameter.annotation)[0], declared])


def _unwrapped(text: str) -> str:
    """Join the lines of each paragraph; typer wraps them to the terminal and would keep the source's line breaks."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _more(options: Sequence[Option], groups: Sequence[str], rare: Sequence[str], *, has_cluster: bool) -> str:
    """Return what the help says of options that it does not list one by one."""
    flags = [option.flag for option in options if option.parameter in rare]
    flags += ["--cluster", "--dry-run"] if has_cluster else []
    lines = (
        [f"More options, not listed below: {', '.join(flags)}. Pass them as flags or in the study file."]
        if flags
        else []
    )
    lines += [f"Option groups for --set and the study file: {', '.join(groups)}."] if groups else []
    return "\n\n".join(lines)


@contextmanager
def on_cluster(site: Path | None, folder: Path | None, *, dry_run: bool) -> Iterator[None]:
    """Let the stages in the block run on the machines that a file describes; without a file nothing changes."""
    if site is None:
        if dry_run:
            raise ConfigError("--dry-run says what --cluster FILE would submit; pass that, too")
        yield
        return
    if folder is None:
        raise ConfigError("--cluster needs a job folder for its logs; pass --job")
    from eosin._batch import elsewhere
    from eosin.cluster._place import Cluster, DryRun
    from eosin.cluster._site import Site

    with elsewhere(Cluster(Site.read(site), folder, say, dry_run)):
        try:
            yield
        except DryRun:
            raise typer.Exit from None


def _finish(done: Done) -> None:
    if done.report is not None:
        for record in done.report.failed:
            say(f"failed: {record.slide_id}: {record.message} [{record.reason}]")
        say(done.report.summary())
    for line in done.lines:
        say(line)
    for path in done.paths:
        typer.echo(path)
    sys.stdout.flush()
    if done.report is not None and done.report.exit_code:
        raise typer.Exit(done.report.exit_code)


@contextmanager
def _discreet(*, verbose: bool) -> Iterator[Folders]:
    folders = Folders()
    at_work[:] = [] if verbose else [folders]
    try:
        yield folders
    finally:
        at_work.clear()


@contextmanager
def _reported(*, verbose: bool) -> Iterator[Folders]:
    limit_threads()
    with _discreet(verbose=verbose) as folders, _listening(verbose=verbose), stoppable():
        try:
            yield folders
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt, Stopped) as error:  # noqa: BLE001 - a person must not see a traceback
            if verbose:
                traceback.print_exc(file=sys.stderr)
            lines, code = _ending(error)
            if any(folders.left_out(line) != line for line in lines):
                lines[-1] += "; --verbose names the folders"
            for number, line in enumerate(lines):
                say(line if number else f"error: {line}")
            raise typer.Exit(code) from None


def _ending(error: BaseException) -> tuple[list[str], int]:
    """Return the lines and the exit code of an error: one of each, but for several problems one line each."""
    if isinstance(error, SeveralErrors):
        ends = [_one_ending(one) for one in error.errors]
        lines = [f"{number}. {line}" for number, (line, _) in enumerate(ends, 1)]
        return [f"{len(ends)} problems; nothing was done", *lines], min(code for _, code in ends)
    line, code = _one_ending(error)
    return [line] if line else [], code


def _one_ending(error: BaseException) -> tuple[str, int]:
    """Return the line and the exit code of an error: the one place where this is decided."""
    if isinstance(error, ImportError) and not isinstance(error, EosinError):
        error = MissingPackageError(error)
    if isinstance(error, OutputError | MissingPackageError):
        return error.message, ENVIRONMENT
    if isinstance(error, MoreToDo):
        return error.message, MORE_TO_DO
    if isinstance(error, EosinError):
        return error.message, USAGE
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return "", 128 + signal.SIGPIPE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}", ENVIRONMENT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the second is torch's
        return "out of memory; use a smaller --batch-size, fewer --workers or another --device", ENVIRONMENT
    if isinstance(error, KeyboardInterrupt | Stopped):
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        return f"stopped by {number.name}; finished results are kept", 128 + number
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


def apply_to_each(
    items: Sequence[ItemT], work: Callable[[ItemT], "Outcome"], *, key: Callable[[ItemT], str], stage: str
) -> "Report":
    """Do a command's work on its inputs: one alone raises what is wrong with it, of many each fails alone."""
    from eosin._batch import run_batch
    from eosin._records import Record, Report

    with progress(stage, len(items)) as advance:
        if len(items) == 1:
            outcome = work(items[0])
            return Report((Record(key(items[0]), stage, outcome.status, "", outcome.message),))
        return run_batch(items, work, key=key, stage=stage, progress=advance)


def console() -> "Console":
    """Return a console on stdout that does not squeeze tables when it is piped."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
