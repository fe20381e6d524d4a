"""Where the values of a command come from: flags, ``--set``, a study file, defaults.

A study file is YAML. Its keys are groups of options (``tiling: {mpp: 1.0}``) and the long names of options
(``slides``, ``labels``, ``job`` ...). One file serves every command: each takes what it knows and leaves the rest to
the others, but a key that no command knows is an error. Paths in the file are relative to the file.

The flag wins over ``--set``, ``--set`` wins over the file, the file wins over what follows from its ``job``, and that
wins over the default.
"""

import difflib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from typer.models import ArgumentInfo

from eosin.errors import MOST_LISTED, ConfigError, EosinError, SeveralErrors, UnknownNameError

if TYPE_CHECKING:
    from eosin.options import Options

OptionsT = TypeVar("OptionsT", bound="Options")

GROUPS = (
    "tiling", "tissue", "encoder", "recipe", "task", "target", "folds", "formats",  # as `eosin.pipeline._run.Pipeline`
    "cohort", "pipeline",  # as `eosin.pipeline._demo.Demo`
    "quality",  # as `eosin.wsi._quality.QualityLimits`
    "questions",  # as `eosin.pipeline._question.Questions`
    "selection", "second",  # as `eosin.pipeline._selection.Selection`, `eosin.pipeline._two_stage.SecondStage`
)  # fmt: skip
PLUGINS = "plugins"
LISTS = ("formats", "maps")
"""Options that may be text with commas."""

USUAL = (
    "slides", "labels", "job", "target", "task", "encoder", "tiling", "tissue", "quality", "slide_mpp", "splits",
    "folds", "recipe", "formats", "maps", "missing", "ids", "workers", "device", "cluster", "plugins",
)  # fmt: skip
"""What most study files hold, in the order of `eosin init`."""

CLOSE = 0.75
PATHS_OR_NUMBERS = ("slide_mpp",)
"""Options whose text may be the path of a table."""

option_names: set[str] = set()
"""Options of all commands, as a study file spells them; each command adds its own when it is declared."""


@dataclass(frozen=True)
class Settings:
    """The merged study file and ``--set`` assignments of one command.

    Attributes
    ----------
    data : mapping
        Groups of options and single options, as plain values.
    folder : Path
        Of the study file.
    of_file : frozenset of str
        Keys whose value is the file's, so that its paths are relative to `folder`.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()
    of_file: frozenset[str] = frozenset()

    @classmethod
    def read(cls, file: Path | None, assignments: Sequence[str], known: Collection[str]) -> "Settings":
        """Merge the file and the assignments.

        The file may hold what other commands read; an assignment must be one of `known`, the groups and options of this
        command.

        Raises
        ------
        ConfigError
            If the file cannot be read, or a group or option is unknown.
        """
        from eosin.options import override

        data = _read_file(file) if file else {}
        roots = [assignment.split("=")[0].split(".")[0].strip().replace("-", "_") for assignment in assignments]
        for root, assignment in zip(roots, assignments, strict=True):
            if root not in known:
                raise _unknown(f"--set {assignment}", root, known)
        fixed = [f"{root}{text.strip()[len(root) :]}" for root, text in zip(roots, assignments, strict=True)]
        folder = Path() if file is None else file.parent
        merged = override(data, fixed)
        for key in LISTS:
            if isinstance(merged.get(key), str):
                merged[key] = merged[key].split(",")
        return cls(merged, folder, frozenset(data) - set(roots))

    @property
    def plugins(self) -> list[str]:
        """Plug-ins that the file names."""
        wanted = self.data.get(PLUGINS) or []
        names = [wanted] if isinstance(wanted, str) else wanted
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{PLUGINS}: {wanted!r} is not a list of Python modules or .py files")
        return [str(self.folder / name) if str(name).endswith(".py") else str(name) for name in names]

    def named(self, name: str) -> tuple[str | None, dict[str, Any]]:
        """Return a group that may be a name, ``recipe: acmil``, or have one: the name, if any, and the options."""
        stated = self.data.get(name)
        options = {} if isinstance(stated, str) else self.group(name)
        wanted = stated if isinstance(stated, str) else options.pop("name", None)
        if wanted is None:
            return None, options
        path = self.folder / str(wanted)
        return (str(path) if name in self.of_file and path.is_file() else str(wanted)), options

    def group(self, name: str, **flags: Any) -> dict[str, Any]:
        """Return the options of one group, overridden by the flags that were given (are not None)."""
        options = self.data.get(name) or {}
        if not isinstance(options, Mapping):
            raise ConfigError(f"{name}: {options!r} is not a group of options, like {{key: value}}")
        return dict(options) | {key: value for key, value in flags.items() if value is not None}

    def parse(self, name: str, kind: type[OptionsT], **flags: Any) -> OptionsT:
        """Return one group as the library's checked options object."""
        return kind.parse(self.group(name, **flags), source=name)

    def choose(self, name: str, flag: Any, default: Any) -> Any:
        """Return a plain option: the flag when it was given, else what file or ``--set`` say, else the default."""
        return self.data.get(name, default) if flag is None else flag

    def value(self, key: str, annotation: Any) -> Any:
        """Return a single option as the type that its flag has."""
        from pydantic import TypeAdapter, ValidationError

        from eosin.options import in_words

        value = self.data[key]
        if isinstance(value, str) and not value.strip():
            raise ConfigError(f"{key}: the value is empty; write one, or remove the line")
        if _holds(annotation, list) and not isinstance(value, list):
            value = [value]
        if not _holds(annotation, list) and _holds(annotation, str) and isinstance(value, list):
            value = ",".join(map(str, value))
        if _holds(annotation, str) and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        try:
            found = TypeAdapter(annotation).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{key}: {in_words({**error.errors()[0], 'loc': ()})}") from None
        return self._placed(key, found) if key in self.of_file else found

    def _placed(self, key: str, value: Any) -> Any:
        """Return paths of the file as they are seen from the working directory."""
        from eosin._names import as_url

        if isinstance(value, list):
            return [self._placed(key, one) for one in value]
        if isinstance(value, Path):
            return value if as_url(value) else self.folder / value
        if key in PATHS_OR_NUMBERS and (self.folder / str(value)).is_file():
            return str(self.folder / value)
        return value


def _read_file(file: Path) -> dict[str, Any]:
    """Return what a study file states; a key without a value states nothing.

    Raises
    ------
    ConfigError
        If it cannot be read, or has keys that no command knows; all of them are named.
    """
    from eosin._tables import first_few
    from eosin.options import read_yaml

    data = {key.replace("-", "_"): value for key, value in read_yaml(file).items()}
    if not data:
        raise ConfigError(f"{file}: is empty; `eosin init` writes a study file with comments")
    known = {*GROUPS, *option_names, PLUGINS}
    unknown = [_unknown(str(file), key, known) for key in data if key not in known]
    if len(unknown) == len(data) and not any(_meant(key, known) for key in data):
        raise ConfigError(
            f"{file}: not a study file of eosin, whose keys are slides, labels, job ...; found {first_few([*data])}; "
            "`eosin init` writes a study file"
        )
    if unknown:
        raise unknown[0] if len(unknown) == 1 else SeveralErrors(unknown)
    return {key: value for key, value in data.items() if value is not None}


def _unknown(where: str, name: str, known: Collection[str]) -> UnknownNameError:
    """Return the error of a key; without a near one it lists those that most studies have."""
    from eosin.options import option_paths, unknown_option
    from eosin.pipeline._run import Pipeline

    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=CLOSE)
    if near:
        return UnknownNameError(f"option in {where}", name, known, near=near)
    usual = known if len(known) <= MOST_LISTED else USUAL
    return unknown_option(where, name, usual, elsewhere=option_paths(Pipeline))


def _meant(name: str, known: Collection[str]) -> bool:
    """Return whether a key was probably meant for us."""
    from eosin.options import OTHER_TOOLS

    return name in OTHER_TOOLS or bool(difflib.get_close_matches(name.lower(), known, n=1, cutoff=CLOSE))


def _holds(annotation: Any, kind: type) -> bool:
    """Return whether a type, or a member of its union, is `kind`; of ``list[Path]`` that is list."""
    members = [annotation, *get_args(annotation)] if get_origin(annotation) is not list else [annotation]
    return any(member is kind or get_origin(member) is kind for member in members)


@dataclass(frozen=True)
class Option:
    """One option of a command, read from the signature of its function.

    Attributes
    ----------
    parameter : str
        Name in the function.
    key : str
        Name in a study file.
    annotation : type
    required : bool
    least : float, optional
        Smallest value that the flag takes.
    """

    parameter: str
    key: str
    annotation: Any
    required: bool
    least: float | None = None

    @property
    def is_list(self) -> bool:
        """Whether the option may be repeated."""
        return _holds(self.annotation, list)

    @property
    def flag(self) -> str:
        """As it is typed."""
        return f"--{self.key.replace('_', '-')}"


def declaration(parameter: inspect.Parameter) -> Any:
    """Return what `typer.Option` or `typer.Argument` says of a parameter, None when nothing is said."""
    return next(iter(getattr(parameter.annotation, "__metadata__", ())), None)


def options_of(signature: inspect.Signature) -> list[Option]:
    """Return the options of a command's function; arguments without a name are none of them."""
    found = []
    for name, parameter in signature.parameters.items():
        declared = declaration(parameter)
        if name == "settings" or isinstance(declared, ArgumentInfo):
            continue
        annotation = parameter.annotation if declared is None else get_args(parameter.annotation)[0]
        names = (getattr(declared, "default", None), *(getattr(declared, "param_decls", None) or ()))
        long = next((text for text in names if str(text).startswith("--")), f"--{name}").split("/")[0]
        key = long.removeprefix("--").replace("-", "_")
        least = getattr(declared, "min", None)
        found.append(Option(name, key, annotation, parameter.default is parameter.empty, least))
    return found


def fill(
    arguments: dict[str, Any],
    options: Sequence[Option],
    settings: Settings,
    *,
    given: Collection[str],
    groups: Collection[str],
    of_job: Mapping[str, str],
) -> dict[str, Any]:
    """Return the arguments of a command, with what the study file and its job say of those that were not given.

    Raises
    ------
    ConfigError
        If an option that must be there is missing; all of them are named.
    """
    filled, wrong = dict(arguments), dict[str, EosinError]()
    for option in options:
        if option.parameter in given or option.key in groups:
            continue
        if option.key in settings.data:
            try:
                filled[option.parameter] = settings.value(option.key, option.annotation)
                _require_least(option, filled[option.parameter])
            except ConfigError as error:
                wrong[option.key] = error
        elif "job" not in settings.data:
            continue
        elif option.key == "features" and (option.required or option.key in of_job):
            filled[option.parameter] = _as_asked(_features(settings), option.annotation)
        elif option.key in of_job:
            filled[option.parameter] = _as_asked(_study_folder(settings) / of_job[option.key], option.annotation)
    missing = [
        option.flag
        for option in options
        if option.required and filled[option.parameter] in (None, []) and option.key not in wrong
    ]
    if missing:
        wrong[""] = ConfigError(f"{', '.join(missing)}: missing; pass it as an option, or in a study file")
    if wrong:
        errors = list(wrong.values())
        raise errors[0] if len(errors) == 1 else SeveralErrors(errors)
    return filled


def _require_least(option: Option, value: Any) -> None:
    if option.least is not None and value is not None and value < option.least:
        raise ConfigError(f"{option.key}: {value} is out of range; it must be at least {option.least:g}")


def _as_asked(path: Path, annotation: Any) -> Any:
    return [path] if _holds(annotation, list) else path


def _features(settings: Settings) -> Path:
    """Return the folder of features that `eosin run` and `eosin extract` make from the same study file."""
    from eosin.features._encoders import find_encoder, folder_name
    from eosin.pipeline._studies import find_study
    from eosin.wsi._grid import Tiling
    from eosin.wsi._job import JobFolder

    encoder = folder_name(find_encoder(str(settings.data.get("encoder", "he_texture"))).name)
    job = JobFolder(settings.value("job", Path))
    tiles = find_study(job, settings.data.get("study")).tiles if _has_studies(job.root) else job
    return tiles.features_dir(settings.parse("tiling", Tiling).folder, encoder)


def _study_folder(settings: Settings) -> Path:
    """Return where results of the job are: of the study that is named, else of the newest."""
    from eosin.pipeline._studies import find_study
    from eosin.wsi._job import JobFolder

    job = settings.value("job", Path)
    return find_study(JobFolder(job), settings.data.get("study")).path if _has_studies(job) else job


def _has_studies(job: Path) -> bool:
    """Return whether the job has more than results of eosin 0.1, so that there is a choice."""
    return (job / "study.json").is_file() or (job / "studies").is_dir()
