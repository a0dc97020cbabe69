"""What gets installed, and that it imports: from a wheel, from a checkout, and without Triton or what is optional."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.processes import LIBRARIES, ROOT, compiled
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastdense.kernels

WHERE = """
import importlib.metadata, importlib.util, json, sysconfig
import fastdense, fastdense.kernels
top_level = importlib.util.find_spec("kernels")
print(json.dumps({
    "modules": [fastdense.__file__, fastdense.kernels.__file__],
    "version": fastdense.__version__,
    "top-level kernels": top_level and top_level.origin,
    "site-packages": sysconfig.get_path("purelib"),
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, in an environment that no PYTHON variable helps."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "VIRTUAL_ENV"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"exit {done.returncode}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", pytrace=False)
    return done.stdout


class Distributions(NamedTuple):
    """What ``python -m build`` makes of a clean copy of the repository."""

    source: set[str]  # names of files
    wheel: Path
    code: set[str]
    about: dict[str, str]  # the texts of the wheel's metadata, by file


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Built as for a release: the source archive from the tree, the wheel from the source archive alone."""
    pytest.importorskip("build")
    copy, out = tmp_path_factory.mktemp("source") / "repository", tmp_path_factory.mktemp("dist")
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, copy, ignore=leftovers)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if not name.endswith("/")]
        about = {name: archive.read(name).decode() for name in files if re.match(r"fastdense-[^/]+\.dist-info/", name)}
    texts = {name.partition("/")[2]: text for name, text in about.items()}
    return Distributions(source, wheel, set(files) - set(about), texts)


@pytest.fixture
def fresh_python(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment that holds the wheel, and sees today's torch but not today's fastdense.

    A path line in a ``.pth`` file makes a folder importable without obeying the ``.pth`` files inside it, of which an
    editable install consists. The wheel goes in first: else pip would take today's fastdense for an installed one.
    """
    pytest.importorskip("pip")
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=os.name == "posix")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", distributions.wheel, cwd=home)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    Path(site, "libraries.pth").write_text("\n".join(LIBRARIES))
    return python


def test_wheel_holds_the_package_and_the_source_archive_all_that_it_is_made_of(distributions: Distributions) -> None:
    modules = [path for folder in ("fastdense", "kernels") for path in (ROOT / folder).rglob("*.py")]
    for folder in (".", "compiled", "harness", "report"):  # records stay out, and what needs a checkout: gpu, micro
        modules += (ROOT / "benchmarks" / folder).glob("*.py")
    names = {path.relative_to(ROOT).as_posix() for path in modules} | {"fastdense/py.typed"}
    assert distributions.code == {f"fastdense/{name}".replace("fastdense/fastdense/", "fastdense/") for name in names}
    assert names | {"LICENSE", "pyproject.toml"} <= distributions.source
    assert not any(name.startswith(("benchmarks/results", "benchmarks/gpu")) for name in distributions.source)


def test_metadata_names_what_is_needed_and_constraints_pin_it_within_its_range(distributions: Distributions) -> None:
    metadata = message_from_string(distributions.about["METADATA"])
    found = [metadata[name] for name in ("Name", "License-Expression", "Requires-Python")]
    assert found == ["fastdense", "Apache-2.0", ">=3.10"]
    assert "Apache License" in distributions.about["licenses/LICENSE"]
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert {r.name for r in needed if "extra" not in str(r.marker)} == {"torch", "triton"}
    capped = [str(r) for r in needed for part in r.specifier if part.operator not in {">=", "!="}]
    assert not capped, "an upper bound in a library blocks its users' upgrades"

    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = {canonicalize_name(r.name): r.specifier for r in map(Requirement, filter(None, lines))}
    for one in needed:
        versions = [part.version for part in pins[canonicalize_name(one.name)] if part.operator in {"==", "<="}]
        assert versions, f"constraints.txt leaves the newest {one.name} open"
        assert all(one.specifier.contains(version) for version in versions), one


def test_wheel_imports_and_benchmarks_from_anywhere(fresh_python: Path, tmp_path: Path) -> None:
    found = json.loads(run(fresh_python, "-c", WHERE, cwd=tmp_path))
    site = Path(found["site-packages"])
    assert fresh_python.parents[1] in site.parents
    assert found["modules"] == [str(site / "fastdense" / name) for name in ("__init__.py", "kernels/__init__.py")]
    assert site not in Path(found["top-level kernels"] or "").parents

    for package in ("typer", "matplotlib", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = fresh_python.parent / "fastdense"
    tiny = "--device cpu --depths 10 --batch 2 --providers fastdense-activations"
    run(command, "bench", "memory", *tiny.split(), cwd=tmp_path)
    (path,) = (tmp_path / "fastdense-bench").glob("*.json")
    record = json.loads(path.read_text())
    rows = record["results"]["densenet-bc-10"]
    assert rows["fastdense activations torch"]["bytes_kept"] < rows["torchvision"]["bytes_kept"]
    assert record["command"].startswith("fastdense bench memory") and str(tmp_path) not in path.read_text()
    assert record["commit"] == importlib.metadata.version("fastdense")


def test_this_checkout_is_what_is_imported_elsewhere_and_here(tmp_path: Path) -> None:
    found = json.loads(run(sys.executable, "-c", WHERE, cwd=tmp_path))
    remedy = "these tests need an editable install of this checkout: make env"
    files = [str(ROOT / folder / "__init__.py") for folder in ("fastdense", "kernels")]
    assert found["modules"] == files == [fastdense.__file__, fastdense.kernels.__file__], remedy
    assert found["version"] != "0+unknown", remedy
    assert ROOT / "kernels" not in Path(found["top-level kernels"] or "").parents


BARE = """
import sys

class Missing:
    asked = []

    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "torchvision", "timm", "rich", "typer", "sklearn", "matplotlib"}:
            Missing.asked.append(name)
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing)
import torch
Missing.asked.clear()
import fastdense, fastdense.kernels
print(Missing.asked)
sys.meta_path.remove(Missing)
sys.modules["triton"] = None
block = fastdense.DenseBlock(2, 4, 4, 4)
block(torch.randn(2, 4, 5, 5)).square().sum().backward()
print(block["denselayer1"].conv1.weight.grad is not None, fastdense.backends.explain("cpu")[0])
"""


def test_import_asks_for_nothing_optional_and_training_works_without_triton() -> None:
    assert compiled(BARE).splitlines() == ["[]", "True torch"]
