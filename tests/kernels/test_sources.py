"""The kernels' sources keep the rules that no test on small features would catch, and launches are a pure function."""

import ast
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

import fastdense.kernels
from fastdense.kernels import launch
from fastdense.kernels.launch import LaunchConfig, Shape

pytestmark = pytest.mark.quick

SOURCES = sorted(Path(path) for folder in fastdense.kernels.__path__ for path in Path(folder).glob("*.py"))
ARCHITECTURES = (0, 80, 86, 89, 90, 100, 120)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _defects(source: str) -> list[str]:
    """What breaks a rule, as ``line: rule``."""
    tree, found = ast.parse(source), []
    widened = {
        id(node.func.value)
        for name, node in _calls(tree)
        if name.endswith(".to") and isinstance(node.func, ast.Attribute) and "int64" in ast.unparse(node.args[0])
    }
    for name, call in _calls(tree):
        keywords = {keyword.arg for keyword in call.keywords}
        if name == "tl.load" and ("mask" in keywords) != ("other" in keywords):
            found.append(f"{call.lineno}: a masked load without other= reads garbage on a GPU")
        elif name == "tl.load" and "mask" not in keywords and ast.unparse(call.args[0]) != "seed_ptr":
            found.append(f"{call.lineno}: a load without mask=")
        elif name == "tl.store" and "mask" not in keywords and _function_of(tree, call) != "last_to_arrive":
            found.append(f"{call.lineno}: a store without mask=")
        elif name == "tl.program_id" and id(call) not in widened:
            found.append(f"{call.lineno}: a program id that is not widened to int64")
        elif name == "tl.maximum" and "0.0" in map(ast.unparse, call.args) and not _keeps_nan(call):
            found.append(f"{call.lineno}: a ReLU that loses NaN")
        elif name.startswith("tl.atomic") and not (name == "tl.atomic_add" and _counts_arrivals(tree, call)):
            found.append(f"{call.lineno}: an atomic on data: two runs would differ")
        elif name == "tl.dot" and "dot" not in _function_of(tree, call):
            found.append(f"{call.lineno}: tl.dot outside of dot()")
    tuners = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "autotune")
    return found + [f"{node.lineno}: an autotuner" for node in tuners]


def _keeps_nan(call: ast.Call) -> bool:
    return any(k.arg == "propagate_nan" and ast.unparse(k.value) == "tl.PropagateNan.ALL" for k in call.keywords)


def _counts_arrivals(tree: ast.AST, call: ast.Call) -> bool:
    """One more program has arrived: a counter of whole numbers, which orders memory."""
    orders = any(k.arg == "sem" and ast.unparse(k.value) == "'acq_rel'" for k in call.keywords)
    return _function_of(tree, call) == "last_to_arrive" and ast.unparse(call.args[1]) == "1" and orders


def _function_of(tree: ast.AST, call: ast.Call) -> str:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(child is call for child in ast.walk(node)):
            return node.name
    return ""


def test_every_kernel_keeps_the_rules_and_its_docstring_is_short_and_names_the_grid() -> None:
    assert {"common.py", "reductions.py", "bn_relu_conv.py", "bn_relu_conv_backward.py"} <= {p.name for p in SOURCES}
    for path in SOURCES:
        assert _defects(path.read_text()) == [], path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                text = ast.get_docstring(node) or ""
                assert "Grid:" in text and len(text.splitlines()) <= 12, node.name


BREACHES = [
    "tl.load(p, mask=m)", "tl.load(p)", "tl.store(p, x)", "i = tl.program_id(0) * stride", "tl.maximum(y, 0.0)",
    "tl.atomic_add(p, x)", "tl.dot(a, b)", "f = triton.autotune(configs)(g)",
]  # fmt: skip


def test_a_breach_of_each_rule_is_found() -> None:
    for line in BREACHES:
        assert _defects(f"def kernel():\n    {line}\n"), line
    counter = "def last_to_arrive(counter_ptr):\n    return tl.atomic_add(counter_ptr, {}, sem='{}')\n"
    assert not _defects(counter.format("1", "acq_rel"))
    assert _defects(counter.format("x", "acq_rel")) and _defects(counter.format("1", "relaxed"))


CHANNELS = ((64, 128, 1), (1888, 128, 1), (156, 48, 1), (300, 192, 1), (128, 32, 9), (48, 12, 27), (5, 1, 9))
SHAPES = [Shape(m, *channels) for m in (1, 49, 12544, 802816) for channels in CHANNELS]


@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
def test_configurations_are_a_pure_function_and_fit_every_shape(arch: int) -> None:
    for op, shape, dtype in product(launch.OPERATIONS, SHAPES, DTYPES):
        launch.choose.cache_clear()
        config = launch.choose(op, shape, dtype, arch, 108)
        launch.choose.cache_clear()
        assert config == launch.choose(op, shape, dtype, arch, 108)
        if op.startswith("bn_relu_conv"):
            assert min(config.block_m, config.block_c, config.block_k) >= 16  # what a matrix product takes
        if op == "bn_relu_conv_backward":
            assert min(config.weight_block_m, config.weight_block_c) >= 16
            assert config.group <= shape.taps * -(-shape.writes // config.block_k)


def test_an_architecture_that_is_newer_takes_the_nearest_older_table() -> None:
    for (newer, known), op in product(((87, 86), (103, 100), (121, 120)), launch.OPERATIONS):
        chosen = (launch.choose(op, SHAPES[2], torch.bfloat16, arch, 100) for arch in (newer, known))
        assert len(set(chosen)) == 1


def test_an_override_nests_and_is_undone() -> None:
    arguments = ("bn_relu_conv", SHAPES[2], torch.float16, 80, 108)
    before = launch.configuration(*arguments)
    with launch.override("bn_relu_conv", block_m=32):
        with launch.override("bn_relu_conv", num_warps=2):
            inner = launch.configuration(*arguments)
        assert launch.configuration(*arguments).num_warps == before.num_warps
    assert (inner.block_m, inner.num_warps) == (32, 2)
    assert launch.configuration(*arguments) == before
    assert launch.choose(*arguments) == before


def test_what_cannot_be_launched_is_named() -> None:
    with pytest.raises(ValueError, match="'conv'"), launch.override("conv", block_m=32):
        pass
    with pytest.raises(ValueError, match="block_m"), launch.override("bn_relu_conv", block_m=48):
        launch.configuration("bn_relu_conv", SHAPES[2], torch.float16, 80, 108)
    for name, value in (("form", "columns"), ("num_warps", 3), ("programs_per_sm", -1)):
        with pytest.raises(ValueError, match=f"{name} .*{value}"):
            LaunchConfig(64, 64, 64, **{name: value})
