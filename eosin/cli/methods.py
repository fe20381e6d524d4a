"""`eosin methods`: the registered recipes, aggregators, loss terms and strategies."""

import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eosin.cli._common import Done, command, console

if TYPE_CHECKING:
    from eosin.mil._recipe import Recipe
    from eosin.mil._registry import ModuleRegistry


@command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Method to explain: equations, source and options.")] = None,
) -> Done:
    """List recipes, aggregators, loss terms and strategies for training, or explain one of them."""
    if name is None:
        _list()
    else:
        _explain(name)
    return Done()


def _registries() -> "tuple[ModuleRegistry[Any], ...]":
    import eosin.mil.methods  # noqa: F401 - registers the methods
    from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES

    return AGGREGATORS, LOSS_TERMS, STRATEGIES


def _list() -> None:
    from rich.table import Table

    from eosin.mil._recipe import RECIPES

    table = Table("slot", "name", "what it is")
    for registry in _registries():
        for name in registry:
            table.add_row(registry.kind, name, _first_line(registry[name]))
        table.add_section()
    for name in RECIPES:
        table.add_row(RECIPES.kind, name, _ingredients(RECIPES[name]))
    console().print(table)


def _ingredients(recipe: "Recipe") -> str:
    parts = [recipe.aggregator, *recipe.terms, recipe.strategy]
    return " + ".join(part.name for part in parts)


def _explain(name: str) -> None:
    from eosin.errors import UnknownNameError
    from eosin.mil._recipe import RECIPES

    places = [registry for registry in _registries() if name in registry]
    if not places and name not in RECIPES:
        known = {*RECIPES, *(known for registry in _registries() for known in registry)}
        raise UnknownNameError("method", name, known)
    parts = [registry[name] for registry in places]
    papers = dict.fromkeys(filter(None, map(_paper, parts)))
    for paper in papers if places else _papers(RECIPES[name]):
        typer.echo(f"{paper}\n")
    for registry in places:
        _explain_part(registry, name)
    if recipe := _recipe_to_show(name, parts):
        typer.echo(f"recipe {recipe}\n")
        typer.echo(_yaml({"recipe": RECIPES[recipe].model_dump(mode="json")}))


def _recipe_to_show(name: str, parts: list[Any]) -> str | None:
    """Return the recipe of this name; for a part of a paper that has none, the first recipe that it belongs to."""
    from eosin.mil._recipe import RECIPES

    if name in RECIPES:
        return name
    having = (recipe for recipe in RECIPES if name in _ingredients(RECIPES[recipe]).split(" + "))
    return next(having, None) if any(map(_paper, parts)) else None


def _papers(recipe: "Recipe") -> list[str]:
    """Return what the files of a recipe's parts say of their papers, each once."""
    chosen = zip(_registries(), ([recipe.aggregator], recipe.terms, [recipe.strategy]), strict=True)
    parts = [registry[component.name] for registry, components in chosen for component in components]
    return list(dict.fromkeys(filter(None, map(_paper, parts))))


def _paper(part: Any) -> str:
    """Return the docstring of the file of a method, which is about the paper; nothing for other parts."""
    is_method = part.__module__.startswith("eosin.mil.methods.")
    return (inspect.getdoc(sys.modules[part.__module__]) or "") if is_method else ""


def _explain_part(registry: "ModuleRegistry[Any]", name: str) -> None:
    typer.echo(f"{registry.kind} {name}\n")
    typer.echo(f"{inspect.getdoc(registry[name])}\n")
    typer.echo(_yaml({"options": registry.defaults(name)}))


def _yaml(data: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _first_line(part: object) -> str:
    return (inspect.getdoc(part) or "").partition("\n")[0]
