"""DDP, SyncBatchNorm and FSDP2: two processes with gloo, started by torchrun."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from helpers import distributed_blocks
from helpers.processes import two_processes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    names = [case.__name__ for case in distributed_blocks.CASES]
    return two_processes("distributed_blocks.py", names, tmp_path_factory.mktemp("torchrun") / "said")


@pytest.mark.parametrize("case", [case.__name__ for case in distributed_blocks.CASES])
def test_two_processes(case: str, said: dict[str, list[str]]) -> None:
    assert said[case] == ["ok", "ok"], "\n".join(said[case])
