"""The record behind docs/gradient-flow.md: whole, redrawn from itself, and as the page's formula says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from benchmarks import flow, runner, schema

RECORDS = sorted((runner.RESULTS / "cpu").glob("flow*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_formula_says_what_was_measured(path: Path) -> None:
    record = json.loads(path.read_text())
    assert len(record["results"]["prediction"]) == 3
    for row in record["results"]["prediction"].values():
        assert row["measured"] / 2 < row["predicted"] < 2 * row["measured"] < row["chain"]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    torch.set_num_threads(1)
    return flow.measure(22, 0)


def test_a_record_holds_what_its_pictures_show(record: dict[str, Any], tmp_path: Path) -> None:
    assert not schema.complaints(record)
    flow.draw(record, tmp_path / "flow.json")
    assert [path.name for path in tmp_path.iterdir()] == ["flow-init.png"]
    assert imread(tmp_path / "flow-init.png").std() > 0.05
    subjects = flow.untrained(22)
    for label, blocks in flow.flows(subjects).items():
        for block in blocks:
            stored = flow._flow(block.name, record["results"]["initialisation"][label][block.name])
            assert torch.allclose(stored.total, block.total, rtol=1e-5)
            assert torch.allclose(stored.contributions, block.contributions, rtol=1e-5)


def test_the_table_has_the_record_in_words(record: dict[str, Any]) -> None:
    table = flow.flow_table(record, "cpu/flow.json")
    row = record["results"]["prediction"]["features.denseblock2"]
    assert f"| denseblock2 | {row['growth']:.2f} | " in table and f"| {row['measured']:.1f} |" in table
    assert "Test accuracy" not in table
