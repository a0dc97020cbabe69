"""``fastdense train`` in two processes with gloo, started by torchrun."""

from __future__ import annotations

import pytest
import torch.distributed as dist

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from helpers import train_worker
from helpers.processes import two_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

NAMES = [case.__name__ for case in train_worker.CASES]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return two_processes("train_worker.py", [*NAMES, "failed"], tmp_path_factory.mktemp("torchrun") / "said")


@pytest.mark.parametrize("case", NAMES)
def test_two_processes(case: str, said: dict[str, list[str]]) -> None:
    assert said[case] == ["ok", "ok"], "\n".join(said["failed"])
