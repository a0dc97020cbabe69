"""The kernels compiled for GPUs that are not here: no spills, tensor cores, wide loads; and the committed record."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import COMPILED, python

from benchmarks.compiled import report

# One launch of each kernel; a case of ``minutes`` compiles every row of the record.
REPRESENTATIVES = (
    "bn_relu_conv 3x3", "bn_relu_conv_backward 3x3", "bn_relu_max_pool 3x3 arg-max", "bn_relu_mean",
    "bn_relu_pool_backward 3x3", "copy_with_moments", "resolve", "reduce",
)  # fmt: skip
COMPILE_REPRESENTATIVES = """
import functools, torch
from concurrent.futures import ThreadPoolExecutor
from benchmarks.compiled import report
from benchmarks.compiled.launches import Case, plan, products_in_flight

found = [products_in_flight(l, 90) for l in plan(Case(32, 160, 64, (56, 56), torch.bfloat16), 90)
         if l.kernel.__name__.startswith("bn_relu_conv")]
print("products in flight:", len(found), max(found))
launches = report.launches

@functools.cache
def representatives(arch, precision, *, every):
    if (arch, precision) in [(80, "fp32"), (100, "fp32")]:
        return []
    return [one for one in launches(arch, precision, every=every) if report.name_of(one[1]) in %r]

report.launches, report.ProcessPoolExecutor = representatives, lambda processes, mp_context: ThreadPoolExecutor(1)
report.main()
"""


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What was compiled, as committed."""
    return json.loads(report.RECORD.read_text())


def _compile(file: Path, *command: Any, record: dict[str, Any]) -> tuple[list[report.Row], str]:
    """Rows that keep the rules and are the record's, and what was printed. Elsewhere: here kernels are interpreted."""
    done = python(*command, "--json", file, environment=COMPILED)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [report.Row(**row) for row in json.loads(file.read_text())["rows"]]
    assert not any(report.defects(row) for row in rows)
    if importlib.metadata.version("triton") == record["triton"]:
        known = {digest for kernel in record["kernels"] for digest in kernel["digests"]}
        assert [row for row in rows if row.digest not in known] == []
    return rows, done.stdout


def test_each_kernel_compiles_to_what_the_record_says(record: dict[str, Any], tmp_path: Path) -> None:
    """Triton lets products of Hopper run on into a loop's next step, which overwrites the registers they read."""
    command = ("-c", COMPILE_REPRESENTATIVES % (REPRESENTATIVES,), "--arch", 80, 90, 100, "--dtype", "bf16", "fp32")
    rows, said = _compile(tmp_path / "rows.json", *command, record=record)
    archs = {(80, "bf16"), (90, "bf16"), (100, "bf16"), (90, "fp32")}
    kernels = {(row.kernel, row.arch, row.dtype) for row in rows}
    assert kernels == {(name, *arch) for name in REPRESENTATIVES for arch in archs}
    assert "products in flight: 4 0" in said


@pytest.mark.minutes
@pytest.mark.parametrize("arch", report.SM_COUNT)
def test_every_row_compiles_to_what_the_record_says(arch: int, record: dict[str, Any], tmp_path: Path) -> None:
    rows, _ = _compile(tmp_path / "rows.json", "-m", "benchmarks.compiled", "--all", "--arch", arch, record=record)
    assert len(rows) == sum(len(kernel["digests"]) for kernel in record["kernels"] if kernel["arch"] == arch)


def test_the_record_is_of_these_sources(record: dict[str, Any]) -> None:
    wanted = report.sources_digest()
    assert record["sources"] == wanted, "the kernels have changed: run python -m benchmarks.compiled --all"


def test_the_record_has_every_growth_rate_and_no_spills(record: dict[str, Any]) -> None:
    kernels = record["kernels"]
    for arch in report.SM_COUNT:
        for dtype in report.precisions(arch):
            mine = [kernel for kernel in kernels if (kernel["arch"], kernel["dtype"]) == (arch, dtype)]
            assert {k for kernel in mine for k in kernel["growth_rates"]} == {12, 24, 32, 40, 48}
    assert sum(len(kernel["digests"]) for kernel in kernels) == record["rows"] > 700
    assert [kernel for kernel in kernels if kernel["stack_bytes"]] == []


def test_each_broken_rule_is_one_defect(record: dict[str, Any]) -> None:
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
