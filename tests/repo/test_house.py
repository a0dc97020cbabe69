"""The house rules: imports go one way, every module and test has its room, nothing is too long, every test asserts."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from helpers.processes import HELPERS, ROOT

FOLDERS = {"fastdense": "fastdense", "fastdense.kernels": "kernels", "fastdense.benchmarks": "benchmarks"}
# From the bottom to the top; rooms on one floor do not know each other; "" is `fastdense` itself, the public names.
FLOORS = ("core kernels data memory", "reference", "backends", "ops", "recompute", "functional", "nn", "conversion",
          "analysis", "", "environment", "training", "cli", "benchmarks", "__main__")  # fmt: skip
FLOOR = {f"fastdense.{room}".rstrip("."): number for number, rooms in enumerate(FLOORS) for room in rooms.split(" ")}
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
    return ".".join(name.split(".")[:2])


def test_modules_import_only_what_is_on_lower_floors_and_never_in_a_circle() -> None:
    assert len(MODULES) > 50 and {_room(name) for name in MODULES} <= FLOOR.keys()
    pairs = [(name, other) for name in MODULES for other in GRAPH[name] if _room(other) != _room(name)]
    assert [pair for pair in pairs if FLOOR[_room(pair[1])] >= FLOOR[_room(pair[0])]] == []
    assert set(TopologicalSorter(GRAPH).static_order()) == MODULES.keys()  # fails with a circle, if there is one


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
    places = [path.relative_to(ROOT / "tests").parts for path in TESTS if path.name != "conftest.py"]
    assert {folder for folder, *_ in places} == ROOMS_OF_TESTS | {"helpers"}
    assert all((folder in ROOMS_OF_TESTS) == rest[-1].startswith("test_") for folder, *rest in places)


# What fails by what it finds; that a program ended well says nothing of what it found.
CLAIMS = {"assert", "raises", "warns", "fail", "assert_close", "opcheck"}
NO_CLAIMS = "processes.py"


def _functions(*trees: ast.AST) -> dict[str, ast.AST]:
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@cache
def _calls(function: ast.AST) -> set[str]:
    """The names of what a function calls, and "assert" where it asserts."""
    nodes = list(ast.walk(function))
    calls = {ast.unparse(node.func).rpartition(".")[2] for node in nodes if isinstance(node, ast.Call)}
    return calls | {"assert" for node in nodes if isinstance(node, ast.Assert)}


def _idle_tests(tree: ast.AST, helpers: dict[str, ast.AST]) -> list[str]:
    """The tests that claim nothing, neither themselves nor by a function that they call."""
    mine, claims = _functions(tree), CLAIMS
    while more := {name for name, body in (helpers | mine).items() if _calls(body) & claims} - claims:
        claims = claims | more
    return [name for name in mine if name.startswith("test_") and name not in claims]


def test_every_test_asserts_something() -> None:
    text = "def helper(x): assert x\ndef test_a(): helper(1)\ndef test_b(): f(1)\ndef test_c(): pytest.raises(E, f)\n"
    assert _idle_tests(ast.parse(text + "def f(x): f(x)"), {}) == ["test_b"]
    helpers = _functions(*(TESTS[path] for path in TESTS if path.parent == HELPERS and path.name != NO_CLAIMS))
    assert [(path, idle) for path, tree in TESTS.items() for idle in _idle_tests(tree, helpers)] == []


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
