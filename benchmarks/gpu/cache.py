"""A cache of Triton's as one small file, for another machine: packed here, taken there.

Kept are machine code, its metadata, and the compiled launchers. Nothing in the names depends on where the cache, Triton
or this project lies: they are hashes of the kernels' sources, of what they were compiled for, and of Triton itself.
Only the lists of each kernel's files hold absolute paths, and are written again when unpacked.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..runner import ROOT

ARCHIVE = "triton-cache.tar.xz"
KEPT = (".cubin", ".json", ".so")
STAMP = "stamp.json"


def stamp() -> dict[str, str]:
    """What a cache is good for: with another Triton or other kernels nothing in it is found."""
    import triton

    sources = hashlib.sha256()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        sources.update(path.read_bytes())
    launchers = sysconfig.get_config_var("EXT_SUFFIX")  # of what is compiled for one version of Python
    return {"triton": triton.__version__, "kernels": sources.hexdigest()[:16], "launchers": launchers}


def kernels_in(cache: Path) -> dict[str, str]:
    """The cache's compiled kernels: name by entry."""
    return {path.parent.name: path.stem for path in sorted(cache.glob("*/*.cubin"))}


def pack(cache: Path, archive: Path) -> None:
    """Write what another machine needs of ``cache`` to ``archive``, a ``.tar.xz``."""
    (cache / STAMP).write_text(json.dumps(stamp()))
    with tarfile.open(archive, "w:xz") as opened:
        for path in sorted([cache / STAMP, *cache.glob("*/*")]):
            if path.suffix in KEPT:
                opened.add(path, path.relative_to(cache))


def unpack(archive: Path, cache: Path) -> dict[str, str]:
    """Add what ``archive`` holds to the folder ``cache``; returns why Triton will not find it, empty if it will."""
    with tarfile.open(archive) as opened:
        opened.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):
        files = (group.parent / name for name in json.loads(group.read_text())["child_paths"])
        group.write_text(json.dumps({"child_paths": {file.name: str(file) for file in files if file.exists()}}))
    there = json.loads((cache / STAMP).read_text())
    return {key: f"{there.get(key)} there, {value} here" for key, value in stamp().items() if there.get(key) != value}


@dataclass(frozen=True)
class Taken:
    """A cache in use."""

    folder: Path
    had: dict[str, str]  # the kernels that were in it, name by entry
    stale: dict[str, str]  # why Triton will not find them; empty if it will

    def compiled(self) -> list[str]:
        """Names of the kernels that any process has had to compile since, torch.compile's among them."""
        return [name for entry, name in kernels_in(self.folder).items() if entry not in self.had]

    def report(self) -> str:
        """What was there, and what had to be compiled after all."""
        counts = Counter("of torch.compile's" if name.startswith("triton_") else name for name in self.compiled())
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        lines = [f"cache: {len(self.had)} kernels brought along, {counts.total()} compiled after all"]
        lines[0] += f": {listed}" if listed else ""
        lines += [f"cache: of no use, other {key}: {difference}" for key, difference in self.stale.items()]
        return "\n".join(lines)


def take(folder: Path) -> Taken:
    """Unpack ``folder``'s archive and let Triton use it, in this process and in those that it starts.

    Raises:
        FileNotFoundError: there is no archive.
    """
    cache = Path(tempfile.mkdtemp(prefix="fastdense-triton-")).resolve()
    stale = unpack(folder / ARCHIVE, cache)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    return Taken(cache, kernels_in(cache), stale)
