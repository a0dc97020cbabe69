"""The house: imports go one way, every module has its room, and no page of code is too long to read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.processes import ROOT

FOLDERS = {"fastdense": "fastdense", "fastdense.kernels": "kernels", "fastdense.benchmarks": "benchmarks"}
# From the bottom to the top; rooms on one floor do not know each other.
FLOORS = (
    ("fastdense.core", "fastdense.kernels", "fastdense.data", "fastdense.memory"),
    ("fastdense.reference",),
    ("fastdense.backends",),
    ("fastdense.ops",),
    ("fastdense.recompute",),
    ("fastdense.functional",),
    ("fastdense.nn",),
    ("fastdense.conversion",),
    ("fastdense.analysis",),
    ("fastdense",),  # the public names
    ("fastdense.environment",),
    ("fastdense.training",),
    ("fastdense.cli",),
    ("fastdense.benchmarks",),
    ("fastdense.__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _imports(name: str, path: Path, text: str) -> Iterator[str]:
    """Our modules that ``name`` imports, wherever in it and by whatever form, but for type checkers alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                if (found := whole if whole in MODULES else base) in MODULES:
                    yield found
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and a.value in MODULES)


GRAPH = {name: set(_imports(name, path, path.read_text())) - {name} for name, path in MODULES.items()}


def _room(name: str) -> str:
    """The room of a module: its sub-package, or itself where it stands beside those."""
    first_two = ".".join(name.split(".")[:2])
    return first_two if first_two in FLOOR else "?"


def test_every_module_has_a_room() -> None:
    assert len(MODULES) > 50
    assert [name for name in MODULES if _room(name) == "?"] == []


def test_imports_go_down() -> None:
    up = [
        f"{name} imports {other}"
        for name in MODULES
        for other in GRAPH[name]
        if _room(other) != _room(name) and FLOOR[_room(other)] >= FLOOR[_room(name)]
    ]
    assert up == []


def test_no_circles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in GRAPH[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_contributings_table_is_the_tree() -> None:
    rows = [row for row in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if row.startswith("| `")]
    tables = {row.split("`")[1].rstrip("/"): set(re.findall(r"`(\w+)`", row)) for row in rows}
    for folder in sorted({path.parent for path in MODULES.values()}):
        if (room := str(folder.relative_to(ROOT))) in ("fastdense", *tables) and not room.startswith("benchmarks"):
            there = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
            if room == "fastdense":
                there = {f"fastdense/{name}.py" for name in there - {"memory", "environment"}} - set(tables)
            assert there <= tables.get(room, set()), f"CONTRIBUTING.md does not say what lives in {room}"


def test_files_and_functions_are_short() -> None:
    long = []
    for name, path in MODULES.items():
        text = path.read_text()
        long += [name] if text.count("\n") > 450 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{name}.{node.name}")
    assert long == []


def test_the_reading_of_imports_finds_every_form() -> None:
    text = "def f():\n    from ..core import warn\n    import fastdense.nn\n    from . import select as s\n"
    text += 'importlib.import_module("fastdense.memory")\nfrom ..core.warn import say_once'
    path = ROOT / "fastdense" / "backends" / "torch_backend.py"
    found = list(_imports("fastdense.backends.torch_backend", path, text))
    assert sorted(found) == sorted(
        ["fastdense.core.warn", "fastdense.nn", "fastdense.backends.select", "fastdense.memory", "fastdense.core.warn"]
    )
