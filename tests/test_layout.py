"""The house's rule: a module imports only from rows above its own, and there are no circles.

All imports count, those inside functions and for annotations included.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "hf_causal_context"
ROOT = Path(__file__).parents[1]
ROWS = (
    ("errors", "messages", "_files", "_markdown", "_random"),
    ("contexts", "functional", "media"),
    ("layers", "context_module", "collating"),
    ("adapter", "bases", "data", "models"),
    ("inference",),
    ("hub", "evaluation", "demo"),
    ("training",),
    ("quickstart",),
    ("commands",),
    ("cli",),
)
# Part of the package -> what it must not import, although the rows allow it.
NEVER = {
    "adapter.conditioning": ("adapter.layer", "adapter.config"),
    "adapter.storage": ("adapter.layer", "adapter.config"),
}
MOST_LINES, MOST_LINES_OF_A_FAMILY = 400, 80


def sources(root: Path) -> dict[str, str]:
    """Name of a module without the package's -> its source; packages by their own name, the top as ""."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def imports(module: str, source: str, modules: dict[str, str], is_package: bool) -> set[str]:
    """The modules of the package that a module imports anywhere in its source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                parts = [PACKAGE, *filter(None, module.split("."))]
                parts = parts[: len(parts) - node.level + is_package]
                parent = ".".join([*parts, *filter(None, [node.module])])
            names = [f"{parent}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == PACKAGE:
                inner = name.removeprefix(PACKAGE).removeprefix(".")
                found.add(inner if inner in modules else inner.rpartition(".")[0])
    return found - {module}


def edges(modules: dict[str, str]) -> dict[str, set[str]]:
    """Module -> what it imports; a package is what its __init__.py imports."""
    packages = {name.rpartition(".")[0] for name in modules}
    return {name: imports(name, source, modules, name in packages) for name, source in modules.items()}


def part(module: str) -> tuple[int, str]:
    """The row of a module, and which file or folder of the row it belongs to."""
    for number, row in enumerate(ROWS):
        for name in row:
            if module == name or module.startswith(f"{name}."):
                return number, name
    raise AssertionError(f"{module} stands in no row")


def upward(graph: dict[str, set[str]]) -> Iterator[str]:
    """Imports from rows that are not above a module's own. The package itself may import what it hands on."""
    for module, imported in graph.items():
        if not module:
            continue
        row, own = part(module)
        for other in imported:
            its_row, its_own = part(other) if other else (len(ROWS), "")
            if its_own != own and its_row >= row:
                yield f"{module} imports {other}"
        for inside, never in NEVER.items():
            if module.startswith(inside):
                yield from (f"{module} imports {other}" for other in imported if other.startswith(never))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, if there are some."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := search(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in graph)), [])


MODULES = sources(ROOT)


def test_a_module_imports_only_from_rows_above_its_own():
    assert list(upward(edges(MODULES))) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(edges(MODULES)) == []


def test_an_import_from_a_row_below_is_found_wherever_it_stands():
    for line in ("from ..training import finetune", "def f():\n    import hf_causal_context.training.finetune"):
        changed = MODULES | {"data.folders": f"{MODULES['data.folders']}\n{line}\n"}
        assert list(upward(edges(changed))) == ["data.folders imports training.finetune"]


def test_storage_that_knows_the_config_is_found():
    changed = MODULES | {"adapter.storage.files": "from ..config import CausalContextConfig"}
    assert list(upward(edges(changed))) == ["adapter.storage.files imports adapter.config"]


def test_a_circle_is_found_also_in_functions_and_for_annotations():
    line = "if TYPE_CHECKING:\n    from .interventional import InterventionalData"
    changed = MODULES | {"data.columns": f"{MODULES['data.columns']}\n{line}\n"}
    assert {"data.columns", "data.interventional"} <= set(circle(edges(changed)))


@pytest.mark.parametrize("module", MODULES)
def test_a_file_has_at_most_400_lines_and_one_of_a_family_80(module):
    most = MOST_LINES_OF_A_FAMILY if module.startswith("bases.families") else MOST_LINES
    assert MODULES[module].count("\n") <= most
