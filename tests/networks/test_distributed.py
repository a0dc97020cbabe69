"""DDP and SyncBatchNorm round whole networks: two processes with gloo, started by torchrun."""

import pytest
import torch.distributed as dist
from helpers import distributed_networks
from helpers.processes import two_processes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
NAMES = [case.__name__ for case in distributed_networks.CASES]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return two_processes("distributed_networks.py", NAMES, tmp_path_factory.mktemp("torchrun") / "said")


@pytest.mark.parametrize("case", NAMES)
def test_each_case_holds_in_two_processes(case: str, said: dict[str, list[str]]) -> None:
    assert said[case] == ["ok", "ok"], "\n".join(said[case])
