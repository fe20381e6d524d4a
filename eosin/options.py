"""Options: text from outside (YAML, ``--set key=value``, JSON in files) becomes a frozen, checked object.

Every group of options is a subclass of `Options` beside the code that it configures; unknown keys are errors.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from eosin.errors import ConfigError, UnknownNameError

__all__ = ["Options"]

MAX_YAML_BYTES = 2**18
MAX_YAML_VALUES = 20_000
MAX_YAML_DEPTH = 50
MAX_DIGITS = 1000
LONG_NUMBER = re.compile(rf"(?<![\d._:])[\d._:]{{{MAX_DIGITS + 1}}}")


if TYPE_CHECKING:  # type checkers keep to the fields of each class
    from pydantic._internal._model_construction import ModelMetaclass as _Checked
else:

    class _Checked(type(BaseModel)):
        """Makes a wrong option the same `ConfigError` whether it is given to the class or read from text."""

        def __call__(cls, *args, **options):
            try:
                return super().__call__(*args, **options)
            except ValidationError as error:
                raise _config_error(cls, error, cls.__name__) from None


class Options(BaseModel, metaclass=_Checked):
    """Base of all option groups: immutable, unknown keys refused, JSON in and out.

    Raises
    ------
    ConfigError
        If an option is unknown, missing or has a bad value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, data: Any) -> Any:
        """Refuse ``max_blur: yes``, which pydantic would take for 1."""
        for name, value in data.items() if isinstance(data, Mapping) else ():
            field = cls.model_fields.get(name) if isinstance(value, bool) else None
            kinds = () if field is None else (field.annotation, *get_args(field.annotation))
            if bool not in kinds and (int in kinds or float in kinds):
                raise ValueError(f"{name}: {str(value).lower()} is not a number")
        return data

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, source: str = "options") -> Self:
        """Check a plain mapping and return the options.

        Parameters
        ----------
        data : mapping
            Keys and values as read from YAML or JSON.
        source : str
            Where the data came from, for the message.

        Raises
        ------
        ConfigError
            If a key is unknown, missing or has a bad value; every fault is named in one line.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise _config_error(cls, error, source) from None

    def to_json(self) -> str:
        """Return the options as JSON with sorted keys: equal options give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change when any option changes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def _config_error(cls: type[BaseModel], error: ValidationError, source: str) -> ConfigError:
    faults = error.errors()
    for fault in faults:
        *parents, leaf = fault["loc"] or ("",)
        group = _group(cls, [part for part in parents if isinstance(part, str)])
        if fault["type"] == "extra_forbidden" and group is not None:
            where, known = ".".join([source, *map(str, parents)]), group.model_fields
            if {"name", "options"} <= set(known) and not _near(str(leaf), known):  # a registered part has its own there
                return UnknownNameError(f"option in {where}", str(leaf), known, near=[f"options.{leaf}"])
            return unknown_option(where, str(leaf), known, elsewhere=option_paths(cls))
    return ConfigError(f"{source}: {'; '.join(in_words(fault) for fault in faults)}")


def unknown_option(group: str, name: str, known: Iterable[str], *, elsewhere: Iterable[str] = ()) -> UnknownNameError:
    """Return the error of an option that does not exist, with the one that was probably meant.

    Parameters
    ----------
    group : str
        Where it was given: "recipe.training".
    name : str
    known : iterable of str
        The options that the group has.
    elsewhere : iterable of str
        Options of all groups, with dots: one of the same name there is suggested, too.
    """
    meant = OTHER_TOOLS.get(name.lower().replace("-", "_"), name)
    places = [path for path in elsewhere if path.split(".")[-1] == meant and path != meant]
    near = [meant] if meant in known and meant != name else places
    return UnknownNameError(f"option in {group}", name, known, near=near)


def _near(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(OTHER_TOOLS.get(name, name), list(known), n=1, cutoff=0.6)


OTHER_TOOLS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "reg": "weight_decay",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "opt": "optimizer",
    "optim": "optimizer",
    "scheduler": "schedule",
    "batch_size": "bags_per_step",
    "early_stopping": "patience",
    "gradient_clip": "clip_norm",
    "grad_clip": "clip_norm",
    "random_seed": "seed",
    "model": "aggregator",
    "method": "aggregator",
    "architecture": "aggregator",
    "losses": "terms",
    "loss_terms": "terms",
    "kwargs": "options",
    "params": "options",
    "tile_size": "patch_size",
    "tile_px": "patch_size",
    "target_mpp": "mpp",
    "resolution": "mpp",
    "magnification": "mpp",
    "step_size": "overlap",
}
"""What other tools call an option of ours."""


def in_words(fault: Mapping[str, Any]) -> str:
    """Return a fault that pydantic found as a sentence of ours: ``epochs: 'ten' is not a whole number``."""
    where = ".".join(str(part) for part in fault["loc"])
    value, limits = _quoted(fault.get("input")), fault.get("ctx", {})
    kind = str(fault["type"])
    if kind == "missing":
        said = "is required"
    elif kind == "literal_error":
        said = f"{value} is not one of {limits['expected']}{_nearest(fault.get('input'), str(limits['expected']))}"
    elif kind in _LIMITS:
        word, limit = _LIMITS[kind]
        said = f"{value} is out of range; it must be {word} {limits[limit]:g}"
    elif kind.split("_")[0] in _KINDS:
        said = f"{value} is not {_KINDS[kind.split('_')[0]]}"
        if kind.split("_")[0] in ("string", "path") and isinstance(fault.get("input"), int | float):
            said += "; put it in quotes"
    else:
        said = str(fault["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if where else said


_LIMITS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a group of options, like {key: value}",
    "model": "a group of options, like {key: value}",
    "path": "a path",
    "too": "a list of that length",
}
LONGEST_QUOTE = 60


def _quoted(value: object) -> str:
    as_yaml = {"None": "nothing", "True": "true", "False": "false"}
    text = as_yaml.get(repr(value), repr(value))
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]} ..."


def _nearest(value: object, expected: str) -> str:
    names = [name.strip("'") for name in expected.replace(" or ", ", ").split(", ")]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _group(cls: type[BaseModel], parents: Sequence[str]) -> type[BaseModel] | None:
    """Return the option group below `cls` that the names lead to; None where they leave plain groups."""
    for name in parents:
        below = _below(cls, name)
        if below is None:
            return None
        cls = below
    return cls


def _below(cls: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = cls.model_fields.get(name)
    kind = None if field is None else field.annotation
    kinds = [kind, *get_args(kind)]  # SecondStage has a `Recipe | None`
    return next((one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)), None)


def option_paths(cls: type[BaseModel], before: str = "") -> list[str]:
    """Return the options of a group and of all groups below it, with dots."""
    paths = []
    for name in cls.model_fields:
        below = _below(cls, name)
        paths += [f"{before}{name}"] if below is None else option_paths(below, f"{before}{name}.")
    return paths


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of plain values; keys are text, whatever YAML would make of them.

    Raises
    ------
    ConfigError
        If the file is missing, larger than the limits of this module, not YAML, not a mapping, or has a key twice.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_YAML_BYTES:,} bytes, the limit of a configuration file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8; save it as UTF-8") from None
    data = _load_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        found = "a list" if isinstance(data, list) else f"the value {_quoted(data)}"
        raise ConfigError(f"{path}: expected lines like `key: value`, found {found}")
    return data


class _PlainLoader(yaml.SafeLoader):
    """Makes text, numbers, true and false, lists and groups; keys are the text that the file has."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        self.flatten_mapping(node)
        found: dict[Hashable, Any] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None:
                raise yaml.MarkedYAMLError(problem="a list or a group cannot be a key", problem_mark=key.start_mark)
            if name in found:
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} stands there twice", problem_mark=key.start_mark)
            found[name] = self.construct_object(value, deep=deep)
        return found


_PlainLoader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] not in ("binary", "timestamp", "set", "omap", "pairs")
}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
"""Without dates: a folder named 2024-01-01 is text."""


def _load_yaml(text: str, source: str) -> Any:
    """Load YAML whose size is known: aliases may make a few lines stand for billions of values."""
    try:
        if LONG_NUMBER.search(text):  # 9:9:9 ... takes the square of its length
            raise ValueError(f"it holds a number of more than {MAX_DIGITS:,} digits, the limit")
        _require_small(yaml.parse(text, Loader=yaml.SafeLoader), source)
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{source}: {_yaml_in_words(error)}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{source}: has the character U+{error.character:04X}, which YAML does not allow") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number that does not exist
        raise ConfigError(f"{source}: cannot be read as YAML ({' '.join(str(error).split())})") from None


def _yaml_in_words(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong with a YAML text, and where."""
    problem, marks = str(error.problem), (error.problem_mark, error.context_mark)
    said, opening = next(((said, opening) for part, said, opening in _YAML_FAULTS if part in problem), (problem, False))
    mark = next((mark for mark in (reversed(marks) if opening else marks) if mark is not None), None)
    return said if mark is None else f"line {mark.line + 1}: {said}"


_YAML_FAULTS: tuple[tuple[str, str, bool], ...] = (
    ("'\\t'", "there is a tab; indent with spaces", False),
    (
        "mapping values are not allowed",
        "there is a second `key:` where a value was expected; correct the indentation, or put the value in quotes",
        False,
    ),
    ("expected ',' or", "a bracket is opened and never closed", True),
    ("unexpected end of stream", "a quote is opened and never closed", True),
    ("expected <block end>", "this line is indented otherwise than the lines before it", False),
    ("could not find expected ':'", "`:` is missing after the key", True),
    ("determine a constructor", "values with a tag (!!) are not allowed; write text, a number, true or false", False),
    ("but found another document", "a second document begins (---); keep one only", False),
    ("cannot start any token", "the value starts with a character that YAML keeps for itself; put it in quotes", False),
)
"""What PyYAML says, what we say, and whether the place where the fault begins helps more than where it shows."""


def _require_small(events: Iterable[yaml.Event], source: str) -> None:
    """Count the values that a document stands for once every alias is replaced by what it names."""
    sizes: dict[str, int] = {}  # of finished nodes with an anchor
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor, values before it began
    total = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(f"{source}: the alias *{event.anchor} has no anchor before it, or refers to itself")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if total > MAX_YAML_VALUES or len(open_nodes) > MAX_YAML_DEPTH:
            limit = f"{MAX_YAML_VALUES:,} values in {MAX_YAML_DEPTH} levels"
            raise ConfigError(
                f"{source}: expands to more than {limit}, the limit of a configuration file", code="unsafe"
            )


def override(data: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``key=value`` texts to a nested mapping; dots descend, values are read as YAML.

    Parameters
    ----------
    data : mapping
        Left unchanged.
    assignments : sequence of str
        For example ``["training.lr=1e-4", "aggregator.gated=false"]``.

    Returns
    -------
    dict
        A copy of `data` with the assignments applied in order.

    Raises
    ------
    ConfigError
        If an assignment has no ``=``, its value is not YAML, or it descends into a value that is not a mapping.
    """
    result: dict[str, Any] = json.loads(json.dumps(dict(data)))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment!r}: expected key=value")
        *parents, leaf = key.strip().split(".")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set {assignment!r}: {parent!r} is a plain value and has no options below it")
            node = child
        node[leaf] = _scalar(text, assignment)
    return result


def _scalar(text: str, assignment: str) -> Any:
    value = _load_yaml(text, f"--set {assignment!r}: the value")
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text because it has no dot
        except ValueError:
            return value
    return value


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested options with changes applied; a part that gets another name loses the options of the old one."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and "name" in old and isinstance(value, str):
            value = {"name": value}  # as `aggregator: abmil` is read
        same = (
            isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("name", "") in ("", old.get("name"))
        )
        result[key] = merge(old, value) if same and isinstance(old, Mapping) else value
    return result
