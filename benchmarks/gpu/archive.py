"""A cache of Triton's as one small file, for another machine.

Kept are machine code, its metadata, and the compiled launchers; the stages between source and machine code are left
out. Nothing in the names depends on where the cache, Triton or this project lies: they are hashes of the kernels'
sources, of what they were compiled for, and of Triton itself. Only the lists of each kernel's files hold absolute
paths: they are packed as names, and unpacked as the paths that they have there.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

KEPT = (".cubin", ".json", ".so")
STAMP = "stamp.json"
_GROUP = "__grp__"
_KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def stamp() -> dict[str, str]:
    """What a cache is good for: with another Triton or other kernels nothing in it is found."""
    import triton

    sources = hashlib.sha256()
    for path in sorted(_KERNELS.glob("*.py")):
        sources.update(path.read_bytes())
    launchers = sysconfig.get_config_var("EXT_SUFFIX")  # of what is compiled for one version of Python
    return {"triton": triton.__version__, "kernels": sources.hexdigest()[:16], "launchers": launchers}


def kernels_in(cache: Path) -> dict[str, str]:
    """The cache's compiled kernels: name by entry."""
    return {path.parent.name: path.stem for path in sorted(cache.glob("*/*.cubin"))}


def pack(cache: Path, target: Path) -> int:
    """Write what another machine needs of ``cache`` to ``target``, an archive ``.tar.xz``; its size in bytes."""
    with tarfile.open(target, "w:xz") as archive:
        for name, content in _contents(cache):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755 if name.endswith(".so") else 0o644
            archive.addfile(entry, BytesIO(content))
    return target.stat().st_size


def _contents(cache: Path) -> Iterator[tuple[str, bytes]]:
    yield STAMP, json.dumps(stamp()).encode()
    for path in sorted(cache.glob("*/*")):
        if path.suffix not in KEPT or not path.is_file():
            continue
        content = path.read_bytes()
        if path.name.startswith(_GROUP):
            names = [name for name in json.loads(content)["child_paths"] if Path(name).suffix in KEPT]
            content = json.dumps({"child_paths": dict.fromkeys(names, "")}).encode()
        yield f"{path.parent.name}/{path.name}", content


def unpack(archive: Path, cache: Path) -> dict[str, str]:
    """Add what ``archive`` holds to the folder ``cache``.

    Returns:
        Why Triton will not find it there: what its stamp says and this machine does not, by name. Empty if it will.
    """
    there: dict[str, Any] = {}
    with tarfile.open(archive) as opened:
        for entry in opened:
            source = opened.extractfile(entry)
            parts = Path(entry.name).parts
            if source is None or len(parts) > 2 or ".." in parts:
                raise ValueError(f"{archive} is no packed cache: it holds {entry.name!r}")
            content = source.read()
            if entry.name == STAMP:
                there = json.loads(content)
                continue
            path = cache / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name.startswith(_GROUP):
                names = json.loads(content)["child_paths"]
                content = json.dumps({"child_paths": {name: str(path.parent / name) for name in names}}).encode()
            path.write_bytes(content)
            path.chmod(entry.mode)
    return {key: f"{there.get(key)} there, {value} here" for key, value in stamp().items() if there.get(key) != value}
