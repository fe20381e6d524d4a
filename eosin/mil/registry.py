"""Registries: what a recipe, a task or a checkpoint names, by name, open to packages of others."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import nn

from eosin.errors import ConfigError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Things by name. A user's own package adds to a registry as the methods here do, by importing and calling it.

    Parameters
    ----------
    kind : str
        What the slot is called in messages: "aggregator".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
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

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise UnknownNameError(self.kind, name, self._items)
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)


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
        schema = _schema(self[name])
        unknown = [key for key in options if key not in schema.model_fields]
        if unknown:
            raise UnknownNameError(f"option of {self.kind} {name}", unknown[0], schema.model_fields)
        try:
            checked = schema.model_validate(dict(options))
        except ValidationError as error:
            faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())
            raise ConfigError(f"{self.kind} {name}: {faults}") from None
        return {key: getattr(checked, key) for key in schema.model_fields}

    def build(self, name: str, *args: Any, options: Mapping[str, Any] | None = None) -> C:
        """Construct `name` from positional arguments and its options; see `resolve` for the errors."""
        return self[name](*args, **self.resolve(name, options or {}))


def _schema(cls: type) -> type[BaseModel]:
    constructor = cls.__init__  # type: ignore[misc]
    hints = get_type_hints(constructor, include_extras=True)
    fields: dict[str, Any] = {
        key: (hints.get(key, Any), ... if parameter.default is parameter.empty else parameter.default)
        for key, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return create_model(cls.__name__, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)
