"""DDP, SyncBatchNorm and FSDP2: two processes with gloo, started by torchrun."""

from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.distributed_blocks import CASES
from helpers.processes import two_processes


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    said = two_processes("distributed_blocks.py", [case.__name__ for case in CASES], tmp_path / "said")
    for case, both in said.items():
        assert both == ["ok", "ok"], f"{case}: " + "\n".join(both)
