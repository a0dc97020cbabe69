"""The kernels compiled for GPUs that are not here: no spills, tensor cores, wide loads; and the committed record."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import COMPILED, compiled, python

from benchmarks.compiled import report
from benchmarks.compiled.launches import _loops


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What was compiled, as committed."""
    return json.loads(report.RECORD.read_text())


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("archs", "dtypes"), [((80, 86, 90, 100), ("bf16",)), ((90,), ("fp16", "fp32", "tf32"))])
def test_kernels_compile_to_what_the_record_says(
    archs: tuple[int, ...], dtypes: tuple[str, ...], record: dict[str, Any], tmp_path: Path
) -> None:
    """Each once. In a process of its own: here the kernels are interpreted."""
    command = ("-m", "benchmarks.compiled", "--json", tmp_path / "rows.json", "--arch", *archs, "--dtype", *dtypes)
    done = python(*command, environment=COMPILED)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [report.Row(**row) for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert {(row.arch, row.dtype) for row in rows} == set(product(archs, dtypes)) and len(rows) > 60
    assert not any(report.defects(row) for row in rows)
    if importlib.metadata.version("triton") == record["triton"]:
        known = {digest for kernel in record["kernels"] for digest in kernel["digests"]}
        assert [row for row in rows if row.digest not in known] == []


def test_no_product_of_hoppers_is_left_behind() -> None:
    """Triton lets them run into the next step of a loop, and before 3.7 overwrote the registers that they read."""
    code = """
import torch
from benchmarks.compiled.launches import Case, plan, products_in_flight
launches = plan(Case(32, 160, 64, (56, 56), torch.bfloat16), 90)
found = [products_in_flight(l, 90) for l in launches if l.kernel.__name__.startswith("bn_relu_conv")]
print(len(found), max(found))
"""
    assert compiled(code).split() == ["4", "0"]


def test_the_record_is_of_these_sources(record: dict[str, Any]) -> None:
    wanted = report.sources_digest()
    assert record["sources"] == wanted, "the kernels have changed: run python -m benchmarks.compiled --all"


def test_the_record_is_whole_and_keeps_the_rules(record: dict[str, Any]) -> None:
    kernels = record["kernels"]
    for arch in report.SM_COUNT:
        for dtype in report.precisions(arch):
            mine = [kernel for kernel in kernels if (kernel["arch"], kernel["dtype"]) == (arch, dtype)]
            assert {k for kernel in mine for k in kernel["growth_rates"]} == {12, 24, 32, 40, 48}
    assert sum(len(kernel["digests"]) for kernel in kernels) == record["rows"] > 700
    assert [kernel for kernel in kernels if kernel["stack_bytes"]] == []


def test_a_broken_rule_is_noticed(record: dict[str, Any]) -> None:
    row = next(report.Row(**row) for row in record["shown"] if row["kernel"] == "bn_relu_conv 3x3")
    assert report.defects(row) == []
    for change, message in (
        ({"stack_bytes": 8}, "8 bytes of stack"),
        ({"shared_bytes": 10**6}, "shared memory"),
        ({"tensor_core_instructions": 0, "tensor_core": ""}, "tensor cores by nothing"),
        ({"tensor_core": "HMMA"}, "tensor cores by HMMA, expected HGMMA"),
        ({"vector128_loads": 0}, "no 128-bit load"),
    ):
        found = report.defects(dataclasses.replace(row, **change))
        assert len(found) == 1 and message in found[0]


def test_loops_are_read_from_the_code() -> None:
    code = """
.L_x_0:
        /*0000*/ MOV R1, R2 ;
.L_x_1:
        /*0010*/ HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/ @P0 BRA `(.L_x_1) ;
        /*0030*/ FADD R4, R4, R5 ;
        /*0040*/ @!P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0050*/ FFMA R1, R1, R1, R1 ;
        /*0060*/ @P0 BRA `(.L_x_2) ;
"""
    assert _loops(code) == [[3, 2]]
