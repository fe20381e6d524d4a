"""Registries: what a recipe, a task or a checkpoint names, by name, open to packages of others."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import nn

from eosin.errors import ConfigError, UnknownNameError
from eosin.options import in_words, unknown_option
from eosin.plugins import load_plugins

METHODS = "eosin.mil.methods"

T = TypeVar("T")


class Registry(Generic[T]):
    """Things by name, to which a user's own package adds as eosin's own modules do.

    A name that is asked for may come from a module of eosin's own or from a plug-in; both are imported then.

    Parameters
    ----------
    kind : str
        What the things are called in messages: "aggregator".
    home : str
        The package whose import registers eosin's own.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind = kind
        self.home = home
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Register `item`; a definition that is run again in a notebook replaces itself.

        Raises
        ------
        ConfigError
            If the name belongs to something else.
        """
        old = self._items.get(name)
        if old is not None and getattr(old, "__qualname__", old) != getattr(item, "__qualname__", item):
            raise ConfigError(f"the {self.kind} name {name!r} is taken by {old!r}; choose another name")
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers under `name` and leaves the thing as it is."""
        return lambda item: self.add(name, item)

    def _known(self) -> dict[str, T]:
        importlib.import_module(self.home)  # by name, since what registers here imports this module
        load_plugins()
        return self._items

    def __getitem__(self, name: str) -> T:
        known = self._known()
        if name not in known:
            raise UnknownNameError(self.kind, name, known)
        return known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._known()))

    def __len__(self) -> int:
        return len(self._known())

    def __repr__(self) -> str:
        return f"<{len(self)} {self.kind}s: {', '.join(self)}>"


C = TypeVar("C", bound=nn.Module)


class ModuleRegistry(Registry[type[C]]):
    """A registry of modules; the options of each are the keyword-only arguments of its constructor."""

    def defaults(self, name: str) -> dict[str, Any]:
        """Return every option of `name` with its default."""
        return self.resolve(name, {})

    def resolve(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options of `name`, checked against its constructor's signature and with defaults filled in.

        Raises
        ------
        UnknownNameError
            If the name or an option does not exist; the message lists those that do.
        ConfigError
            If a value does not fit the constructor's annotation, whose range is `eosin.mil.options`.
        """
        schema = _schema(cast(type, self[name]))
        unknown = [key for key in options if key not in schema.model_fields]
        if unknown:
            raise unknown_option(f"{self.kind} {name}", unknown[0], schema.model_fields)
        return _checked(schema, options, f"{self.kind} {name}")

    def build(self, name: str, *args: Any, options: Mapping[str, Any] | None = None) -> C:
        """Construct `name` from positional arguments and its options; see `resolve` for the errors."""
        return self[name](*args, **self.resolve(name, options or {}))


def _checked(schema: type[BaseModel], options: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return all options of a signature with their defaults; `ConfigError` names every one that does not fit."""
    try:
        checked = schema.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(f"{what}: {'; '.join(map(in_words, error.errors()))}") from None
    return {key: getattr(checked, key) for key in schema.model_fields}


@cache
def _schema(cls: type) -> type[BaseModel]:
    constructor = cls.__init__  # type: ignore[misc]
    hints = get_type_hints(constructor, include_extras=True)
    fields: dict[str, Any] = {
        key: (hints.get(key, Any), ... if parameter.default is parameter.empty else parameter.default)
        for key, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    # a user's option may be of any type; only its author knows what fits
    config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)
    return create_model(cls.__name__, __config__=config, **fields)


if TYPE_CHECKING:  # type checkers keep to the signature of each class
    OptionsChecked = type
else:

    class OptionsChecked(type):
        """Checks the options of a part of a recipe when its class is called, as when it is built by name."""

        def __call__(cls, *args, **options):
            """Build the part."""
            fields = _schema(cls).model_fields
            given = {key: value for key, value in options.items() if key in fields}
            checked = _checked(_schema(cls), given, cls.__name__)
            return super().__call__(*args, **options | {key: checked[key] for key in given})
