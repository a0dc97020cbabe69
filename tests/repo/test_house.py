"""The house rules: imports go one way, every module and test has its room, nothing is too long, every test asserts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.processes import HELPERS, ROOT

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
ROOMS_OF_TESTS = {"core", "kernels", "networks", "conversion", "analysis", "training", "cli", "benchmarks", "repo"}
LONGEST_FILE, LONGEST_FUNCTION = 450, 60


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()
TREES = {path: ast.parse(path.read_text()) for path in MODULES.values()}
TESTS = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}


def _imports(name: str, path: Path, tree: ast.AST) -> Iterator[str]:
    """Our modules that ``name`` imports, wherever in it and by whatever form, but for type checkers alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
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


GRAPH = {name: set(_imports(name, path, TREES[path])) - {name} for name, path in MODULES.items()}


def _room(name: str) -> str:
    """The room of a module: its sub-package, or itself where it stands beside those."""
    first_two = ".".join(name.split(".")[:2])
    return first_two if first_two in FLOOR else "?"


def test_every_module_has_a_room() -> None:
    assert len(MODULES) > 50
    assert [name for name in MODULES if _room(name) == "?"] == []


def test_modules_import_only_what_is_on_lower_floors() -> None:
    up = [
        f"{name} imports {other}"
        for name in MODULES
        for other in GRAPH[name]
        if _room(other) != _room(name) and FLOOR[_room(other)] >= FLOOR[_room(name)]
    ]
    assert up == []


def test_imports_make_no_circles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in GRAPH[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_the_table_in_contributing_lists_every_file() -> None:
    rows = [row for row in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if row.startswith("| `")]
    tables = {row.split("`")[1].rstrip("/"): set(re.findall(r"`(\w+)`", row)) for row in rows}
    for folder in sorted({path.parent for path in MODULES.values()}):
        if (room := str(folder.relative_to(ROOT))) in ("fastdense", *tables) and not room.startswith("benchmarks"):
            there = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
            if room == "fastdense":
                there = {f"fastdense/{name}.py" for name in there - {"memory", "environment"}} - set(tables)
            assert there <= tables.get(room, set()), f"CONTRIBUTING.md does not say what lives in {room}"


def _too_long(path: Path, tree: ast.AST) -> Iterator[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    yield from (f"{path}:{node.name}" for node in functions if node.end_lineno - node.lineno >= LONGEST_FUNCTION)
    if path.read_text().count("\n") > LONGEST_FILE:
        yield str(path)


def test_files_and_functions_are_short(tmp_path: Path) -> None:
    assert [name for path, tree in (TREES | TESTS).items() for name in _too_long(path, tree)] == []
    (file := tmp_path / "long.py").write_text("def f():\n" + "    pass\n" * LONGEST_FILE)
    assert list(_too_long(file, ast.parse(file.read_text()))) == [f"{file}:f", str(file)]


def test_every_test_file_has_a_room() -> None:
    places = [path.relative_to(ROOT / "tests").parts for path in TESTS]
    assert {folder for folder, *_ in places} - {"conftest.py"} == ROOMS_OF_TESTS | {"helpers"}
    assert all((folder in ROOMS_OF_TESTS) == rest[-1].startswith("test_") for folder, *rest in places if rest)


# Calls that fail by what they find, beside `assert`; that a program ended well says nothing of what it found.
CLAIMS = {"raises", "warns", "fail", "assert_close", "opcheck"}
NO_CLAIMS = "processes.py"


def _functions(*trees: ast.AST) -> dict[str, ast.AST]:
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def _claims(function: ast.AST, known: dict[str, ast.AST]) -> bool:
    """Whether a function claims something, itself or by one of the ``known`` functions that it calls."""
    nodes = list(ast.walk(function))
    calls = {ast.unparse(node.func).rpartition(".")[2] for node in nodes if isinstance(node, ast.Call)}
    others = {name: body for name, body in known.items() if body is not function}
    itself = any(isinstance(node, ast.Assert) for node in nodes) or bool(calls & CLAIMS)
    return itself or any(_claims(others[name], others) for name in calls & others.keys())


def _idle_tests(tree: ast.AST, helpers: dict[str, ast.AST]) -> list[str]:
    mine = _functions(tree)
    return [name for name in mine if name.startswith("test_") and not _claims(mine[name], helpers | mine)]


def test_every_test_asserts_something() -> None:
    helpers = _functions(*(TESTS[path] for path in TESTS if path.parent == HELPERS and path.name != NO_CLAIMS))
    idle = {str(path.relative_to(ROOT)): _idle_tests(tree, helpers) for path, tree in TESTS.items()}
    assert {name: tests for name, tests in idle.items() if tests} == {}


def test_a_test_that_asserts_nothing_is_noticed() -> None:
    text = "def helper(x): assert x\ndef test_a(): helper(1)\ndef test_b(): f(1)\ndef test_c(): pytest.raises(E, f)\n"
    assert _idle_tests(ast.parse(text + "def f(x): f(x)"), {}) == ["test_b"]


FOLDER_NAME = re.compile(r"^\s*(?:from|import) kernels\b", re.MULTILINE)  # works in a checkout only


def test_nothing_imports_kernels_by_its_folder_name() -> None:
    texts = ("import kernels.common", "  from kernels import x", "import fastdense.kernels", "from .kernels import x")
    assert [bool(FOLDER_NAME.search(text)) for text in texts] == [True, True, False, False]
    assert [path for path in (*TESTS, *MODULES.values()) if FOLDER_NAME.search(path.read_text())] == []


def test_the_reading_of_imports_finds_every_form() -> None:
    text = "def f():\n    from ..core import warn\n    import fastdense.nn\n    from . import select as s\n"
    text += 'importlib.import_module("fastdense.memory")\nfrom ..core.warn import say_once'
    name = "fastdense.backends.torch_backend"
    found = [module.removeprefix("fastdense.") for module in _imports(name, MODULES[name], ast.parse(text))]
    assert sorted(found) == ["backends.select", "core.warn", "core.warn", "memory", "nn"]
