"""Plug-ins: methods, encoders, slide readers and tasks that live in a user's own package or file.

A plug-in is a module that registers something when it is imported. It is found in three ways: an installed package
names it in the entry-point group ``eosin.plugins``; the environment variable ``EOSIN_PLUGINS`` lists modules or ``.py``
files, separated as in PATH; or the option ``--plugin`` of every command adds one to that list. Child processes inherit
the variable, so that they load the same plug-ins.

Nothing is imported until a registry is asked for a name.
"""

import importlib
import importlib.util
import os
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from eosin.errors import ConfigError

__all__ = ["add_plugin", "load_plugins"]

GROUP = "eosin.plugins"
VARIABLE = "EOSIN_PLUGINS"

_loaded: dict[str, ModuleType] = {}  # by module name, or the text that asked for it


def add_plugin(name: str) -> None:
    """Load a plug-in, and let this process and its children find what it registers.

    Parameters
    ----------
    name : str
        A module, ``lab.pooling``, or a file, ``pooling.py``.

    Raises
    ------
    ConfigError
        If there is no such module, or importing it fails.
    """
    name = str(Path(name).resolve()) if _is_file(name) else name
    _load(name)
    listed = _listed()
    if name not in listed:
        os.environ[VARIABLE] = os.pathsep.join([*listed, name])


def load_plugins() -> None:
    """Import every plug-in that is installed or listed and has not been imported yet; what it registers is known then.

    Raises
    ------
    ConfigError
        If one cannot be imported; the message names it and says why.
    """
    for name in _listed():
        _load(name)
    for entry in _installed():
        _load_entry(entry)


def plugin_of(module: str) -> str:
    """Return the plug-in that a module belongs to, or an empty text for a module of eosin or of a notebook."""
    for name, loaded in _loaded.items():
        own = loaded.__name__
        if module == own or module.startswith(f"{own}."):
            return Path(name).name if _is_file(name) else name
    return ""


@cache
def _installed() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))  # reads the metadata of every installed package


def has_plugin(name: str) -> bool:
    """Return whether a plug-in that `plugin_of` named is loaded, or can be loaded without being asked for."""
    load_plugins()
    return any(name == (Path(known).name if _is_file(known) else known) for known in _loaded)


def _listed() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]


def _is_file(name: str) -> bool:
    return name.endswith(".py")


def _load(name: str) -> None:
    if name in _loaded:
        return
    try:
        _loaded[name] = _module_of_file(Path(name)) if _is_file(name) else importlib.import_module(name)
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's module raises becomes one line
        raise _failed(name, error) from error


def _load_entry(entry: EntryPoint) -> None:
    if entry.module in _loaded:
        return
    try:
        _loaded[entry.module] = importlib.import_module(entry.module)
        entry.load()
    except Exception as error:
        raise _failed(f"{entry.name} ({entry.value})", error) from error


def _failed(name: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(f"the plug-in {name} cannot be imported: {type(error).__name__}: {reason}")


def _module_of_file(path: Path) -> ModuleType:
    """Import a file under its own name, as Python does with a script: the modules beside it can be imported."""
    name = path.stem
    if not path.is_file():
        raise ConfigError(f"{path}: no such plug-in file; check the path")
    known = sys.modules.get(name)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path.resolve():
        return known
    found = None if known is not None else importlib.util.find_spec(name)
    is_itself = found is not None and Path(found.origin or "").resolve() == path.resolve()  # beside the user's script
    if known is not None or (found is not None and not is_itself):
        raise ConfigError(f"{path}: there is already a module {name}; rename the file")
    if not is_itself:
        sys.path.append(str(path.parent))
    return importlib.import_module(name)
