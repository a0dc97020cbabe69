"""DDP, SyncBatchNorm and FSDP2: two processes with gloo, started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch.distributed as dist

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What both processes say of each case; all cases in one run, because starting takes longer than they do."""
    file = tmp_path_factory.mktemp("torchrun") / "said"
    names = [case.__name__ for case in distributed_worker.CASES]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "distributed_worker.py"), str(file), *names],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    found = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(2) if Path(f"{file}.{rank}").exists()]
    assert len(found) == 2, done.stderr[-4000:]
    return {name: [one.get(name, "did not run") for one in found] for name in names}


@pytest.mark.parametrize("case", [case.__name__ for case in distributed_worker.CASES])
def test_two_processes(case: str, said: dict[str, list[str]]) -> None:
    assert said[case] == ["ok", "ok"], "\n".join(said[case])
