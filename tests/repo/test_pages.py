"""README and docs: their Python runs, their links lead somewhere, their commands, flags and files exist."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from helpers.processes import ROOT, python

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *DOCS]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
RUNNABLE = tuple(page for page in PAGES if PYTHON.search(page.read_text()))

# All pages' Python in one process, each page in a namespace of its own; it prints what failed, by page.
# torchvision's own operators are missing beside a CPU build of PyTorch, its weights need a download, and the networks
# that a page names are larger than what a page must show.
PROGRAM = """
import json, sys, traceback
from benchmarks.harness.providers import torchvision_densenet
densenet = torchvision_densenet()
import fastdense, torchvision

def small(weights=None, **options):
    return densenet.DenseNet(8, (3, 2), 16, num_classes=10, **options)

def shallow(self, growth_rate=32, block_config=(6, 12, 24, 16), *arguments, **options):
    build(self, growth_rate, [min(layers, 2) for layers in block_config], *arguments, **options)

torchvision.models.densenet121 = small
build, fastdense.DenseNet.__init__ = fastdense.DenseNet.__init__, shallow
failed = {}
for page, code in json.loads(sys.argv[1]).items():
    try:
        exec(compile(code, page, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed[page] = traceback.format_exc()
print(json.dumps(failed))
"""


def by_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_python_of_every_page_runs_in_order() -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    pages = {by_name(page): "\n".join(PYTHON.findall(page.read_text())) for page in RUNNABLE}
    broken = {"ends early": "import sys\nsys.exit(0)\n", "takes a name from another page": "fastdense.convert\n"}
    done = python("-c", PROGRAM, json.dumps(pages | broken))
    assert done.returncode == 0, done.stderr[-3000:]
    failed = json.loads(done.stdout.splitlines()[-1])
    assert failed.keys() == broken.keys(), failed


def test_the_readme_shows_one_use_at_once_and_links_every_page_of_the_docs() -> None:
    assert ROOT / "README.md" in RUNNABLE
    text = (ROOT / "README.md").read_text()
    first = text.index("```python")
    assert text[:first].count("\n") < 8, "one sentence, then one line of use"
    assert "model = fastdense.convert(model)" in text[first : text.index("```", first + 3)]
    assert [page for page in DOCS if f"](docs/{page.name}" not in text] == []


def anchors(page: Path) -> set[str]:
    """GitHub's: lower case, punctuation away, blanks to dashes."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


each_page = pytest.mark.parametrize("page", PAGES, ids=by_name)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(found), f"{target}: no such heading"


@each_page
def test_targets_modules_files_commands_and_flags_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:`|^    |^)make ([a-z][a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}"
    for module in re.findall(r"python -m (benchmarks(?:\.\w+)*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for file in re.findall(r"`((?:tests|benchmarks|fastdense|kernels)/[\w/]+\.\w+)`", text):
        assert (ROOT / file).exists(), file

    typer = pytest.importorskip("typer")
    from fastdense.cli.app import app

    commands = typer.main.get_command(app).commands
    shell = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^fastdense .+", shell, re.MULTILINE)
    for line in (*lines, *re.findall(r"`(fastdense [a-z][^`]*)`", FENCED.sub("", text))):
        _, name, *words = line.partition("#")[0].split()
        assert name in commands, line
        known = {option for parameter in commands[name].params for option in parameter.opts}
        if not hasattr(commands[name], "commands"):  # those of a group are its commands' own
            assert {word for word in words if word.startswith("--")} <= known, line


def test_the_citation_names_this_version_and_the_papers() -> None:
    citation, project = (ROOT / "CITATION.cff").read_text(), (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version is not None and f"\nversion: {version[1]}\n" in citation
    for paper in ("1608.06993", "1707.06990"):
        assert paper in citation and paper in (ROOT / "README.md").read_text()


def test_the_page_on_kernels_lists_them_all() -> None:
    listed = set(re.findall(r"`(\w+_kernel)`", (ROOT / "docs" / "kernels.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert listed == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
