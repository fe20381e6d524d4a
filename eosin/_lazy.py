"""Names of a package that are imported when they are first used, so that importing the package costs nothing."""

import importlib
import sys
from collections.abc import Callable
from functools import cache


def lazy(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the module-level ``__getattr__`` and ``__dir__`` (PEP 562) of a package.

    What the package imports under ``if TYPE_CHECKING:`` for type checkers is what it offers at run time, so that each
    name is written down once.
    """

    def __getattr__(name: str) -> object:
        place = _places(package).get(name)
        if place is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(place[0]), place[1])
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *_places(package)})

    return __getattr__, __dir__


@cache
def _places(package: str) -> dict[str, tuple[str, str]]:
    """Return the module and the name there of each name that a package imports for type checkers."""
    import ast  # takes longer to import than the rest of the package

    with open(str(sys.modules[package].__file__), encoding="utf-8") as file:  # noqa: PTH123 - as does pathlib
        source = file.read()
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}
