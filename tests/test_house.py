"""Rules that no linter holds: no circles, no names that come through a third module, methods unknown above `mil`."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "eosin"
MOST_POSITIONAL = 5
SOURCES = {
    ".".join(("eosin", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}
FACES = {module for module, path in SOURCES.items() if path.name == "__init__.py"} | {"eosin.__main__", "eosin._moved"}


def imported(module: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield module, name and new name of what a module imports from eosin, in functions and for type checkers too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "eosin":
            for alias in node.names:
                yield str(node.module), alias.name, alias.asname


def neighbours(module: str) -> set[str]:
    targets = {name if (name := f"{place}.{one}") in SOURCES else place for place, one, _ in imported(module)}
    return {target for target in targets if target in SOURCES and target not in FACES} - {module}


def circles() -> set[frozenset[str]]:
    """Return the groups of modules that reach each other, by Tarjan's algorithm."""
    graph = {module: neighbours(module) for module in SOURCES if module not in FACES}
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = set()

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.add(frozenset(group))

    for module in graph:
        if module not in order:
            visit(module)
    return found


def test_no_module_reaches_itself_by_any_import() -> None:
    assert [sorted(group) for group in circles()] == []


def test_no_module_hands_on_a_name_of_another() -> None:
    found = {
        f"{module}.{new}"
        for module in SOURCES
        if module not in FACES
        for _, name, new in imported(module)
        if new == name
    }
    assert sorted(found) == []


def test_nothing_above_mil_knows_a_method() -> None:
    found = {
        f"{module}: {place}.{name}"
        for module in SOURCES
        if not module.startswith("eosin.mil") and module != "eosin"
        for place, name, _ in imported(module)
        if f"{place}.{name}".startswith("eosin.mil.methods")
    }
    assert found == set()


def test_no_function_takes_more_than_five_positional_arguments() -> None:
    found = {
        f"{module}.{node.name}"
        for module, tree in TREES.items()
        if not module.startswith("eosin.kernels")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not (node.args.args and node.args.args[0].arg == "ctx")  # autograd calls these, with positions only
        and sum(one.arg not in ("self", "cls") for one in node.args.posonlyargs + node.args.args) > MOST_POSITIONAL
    }
    assert sorted(found) == []


def test_no_test_and_no_benchmark_uses_a_path_of_the_first_version() -> None:
    root = PACKAGE.parent
    used = {
        f"{path.relative_to(root)}: {node.module}"
        for folder in ("tests", "benchmarks", "docs")
        for path in sorted((root / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "eosin" and node.module not in SOURCES
    }
    assert used == set()
