from pathlib import Path

import pytest


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps that nothing disturbed."""
    from helpers.train_runs import COMMAND, command

    out = tmp_path_factory.mktemp("finished") / "run"
    result = command(*COMMAND, "--out", out, "--keep", "2", "--ema", "0.5")
    assert result.exit_code == 0, result.output
    return out
