"""Where the values of a command come from: flags, ``--set``, a study file, defaults.

A study file is YAML. Its keys are groups of options (``tiling: {mpp: 1.0}``) and the long names of options
(``slides``, ``labels``, ``job`` ...). One file serves every command: each takes what it knows and leaves the rest to
the others, but a key that no command knows is an error. Paths in the file are relative to the file.

The flag wins over ``--set``, ``--set`` wins over the file, the file wins over what follows from its ``job``, and that
wins over the default.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from typer.models import ArgumentInfo

from eosin.errors import ConfigError, UnknownNameError

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
        from eosin.options import override, read_yaml

        data = {str(key).replace("-", "_"): value for key, value in (read_yaml(file) if file else {}).items()}
        for key in data:
            if key not in {*GROUPS, *option_names, PLUGINS}:
                raise _unknown(str(file), key, {*GROUPS, *option_names, PLUGINS})
        roots = [assignment.split("=")[0].split(".")[0].strip().replace("-", "_") for assignment in assignments]
        for root, assignment in zip(roots, assignments, strict=True):
            if root not in known:
                raise _unknown(f"--set {assignment}", root, known)
        fixed = [f"{root}{text.strip()[len(root) :]}" for root, text in zip(roots, assignments, strict=True)]
        folder = Path() if file is None else file.parent
        return cls(override(data, fixed), folder, frozenset(data) - set(roots))

    @property
    def plugins(self) -> list[str]:
        """Plug-ins that the file names."""
        wanted = self.data.get(PLUGINS) or []
        names = [wanted] if isinstance(wanted, str) else list(wanted)
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
            raise ConfigError(f"group of options {name!r}: expected a list of name: value, found {options!r}")
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
        if _holds(annotation, list) and not isinstance(value, list):
            value = [value]
        if _holds(annotation, str) and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        try:
            found = TypeAdapter(annotation).validate_python(value)
        except ValidationError as error:
            faults = "; ".join(in_words(fault) for fault in error.errors()[:1])
            raise ConfigError(f"{key}: {faults.split(': ', 1)[-1]}") from None
        return self._placed(key, found) if key in self.of_file else found

    def _placed(self, key: str, value: Any) -> Any:
        """Return paths of the file as they are seen from the working directory."""
        if isinstance(value, list):
            return [self._placed(key, one) for one in value]
        if isinstance(value, Path):
            return self.folder / value
        if key in PATHS_OR_NUMBERS and (self.folder / str(value)).is_file():
            return str(self.folder / value)
        return value


def _unknown(where: str, name: str, known: Collection[str]) -> UnknownNameError:
    from eosin.options import option_paths, unknown_option
    from eosin.pipeline._run import Pipeline

    return unknown_option(where, name, known, elsewhere=option_paths(Pipeline))


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
    """

    parameter: str
    key: str
    annotation: Any
    required: bool

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
        found.append(Option(name, key, annotation, parameter.default is parameter.empty))
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
    filled = dict(arguments)
    for option in options:
        if option.parameter in given or option.key in groups:
            continue
        if option.key in settings.data:
            filled[option.parameter] = settings.value(option.key, option.annotation)
        elif "job" not in settings.data:
            continue
        elif option.key == "features" and (option.required or option.key in of_job):
            filled[option.parameter] = _as_asked(_features(settings), option.annotation)
        elif option.key in of_job:
            filled[option.parameter] = _as_asked(_study_folder(settings) / of_job[option.key], option.annotation)
    missing = [option.flag for option in options if option.required and filled[option.parameter] in (None, [])]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: missing; pass it as an option, or in a study file (--config FILE)")
    return filled


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
