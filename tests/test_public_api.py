"""What the package shows to the outside: true `__all__`s, documented names, imports without side effects."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

import eosin

MODULES = sorted(module.name for module in pkgutil.walk_packages(eosin.__path__, "eosin."))
OPTIONAL = ("triton_impl",)  # imported on first use, on machines that have triton


def load(name: str) -> ModuleType:
    if name.endswith(OPTIONAL):
        pytest.importorskip("triton")
    return importlib.import_module(name)


def public_members(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name, item in vars(module).items():
        if not name.startswith("_") and getattr(item, "__module__", None) == module.__name__:
            yield name, item


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_exists_once(name: str) -> None:
    module = load(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    assert [one for one in exported if not hasattr(module, one)] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_public_class_and_function_has_a_docstring(name: str) -> None:
    module = load(name)
    assert module.__doc__
    bare = [
        one
        for one, item in public_members(module)
        if (inspect.isclass(item) or inspect.isfunction(item)) and not (item.__doc__ or "").strip()
    ]
    assert bare == []


def test_every_registered_method_has_a_docstring() -> None:
    import eosin.mil.methods
    from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES

    assert eosin.mil.methods.__doc__
    for registry in (AGGREGATORS, LOSS_TERMS, STRATEGIES):
        assert len(registry) > 0
        assert [name for name in registry if not (vars(registry[name]).get("__doc__") or "").strip()] == []


def test_every_recipe_names_parts_and_options_that_exist() -> None:
    import eosin.mil.methods  # noqa: F401 - registers the methods
    from eosin.mil.recipe import RECIPES
    from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES

    assert "abmil" in RECIPES
    for name in RECIPES:
        recipe = RECIPES[name]
        AGGREGATORS.resolve(recipe.aggregator.name, recipe.aggregator.options)
        STRATEGIES.resolve(recipe.strategy.name, recipe.strategy.options)
        for term in recipe.terms:
            LOSS_TERMS.resolve(term.name, term.options)


def test_import_eosin_loads_nothing_but_itself() -> None:
    code = "import sys; before = set(sys.modules); import eosin; print(*sorted(set(sys.modules) - before))"
    loaded = {name for name in in_a_new_process(code).split() if name.split(".")[0] not in sys.stdlib_module_names}
    assert loaded == {"eosin", "eosin._moved"}


def test_importing_every_module_opens_no_connection_and_changes_no_random_state() -> None:
    code = f"""
import importlib, socket
def refuse(*_): raise AssertionError("a connection was opened on import")
socket.socket.connect = refuse
import numpy, torch
def state():
    return (torch.initial_seed(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(),
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
before = state()
for name in {[name for name in MODULES if not name.endswith(OPTIONAL)]!r}:
    importlib.import_module(name)
assert state() == before
assert not torch.cuda.is_initialized()
"""
    in_a_new_process(code)
