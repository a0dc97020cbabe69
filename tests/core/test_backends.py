"""Which backend serves a tensor: capability, dtype, a missing or broken Triton, the interpreter."""

import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers.blocks import NAN, block_pair, random_input
from helpers.processes import python

from fastdense.backends import select
from fastdense.backends.triton_backend import TritonBackend
from fastdense.core import warn
from fastdense.core.features import Features

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_runs_triton_on_a_gpu_whose_capability_and_dtype_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch elsewhere, without a word."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for impl in ("auto", "triton"):
            assert select.resolve(impl, CUDA, dtype) == "triton"
    assert "9.0" in select.explain(CUDA)[1]
    assert select.resolve("torch", CUDA, torch.float16) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select.resolve("auto", CUDA, torch.float64) == "torch"
    for device in (CUDA, CPU):
        with pytest.raises(RuntimeError, match=r"float32, not torch.float64.*impl='torch'"):
            select.resolve("triton", device, torch.float64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert select.resolve("auto", CUDA, torch.float16) == "torch"
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run.*7\.5.*8\.0.*impl='torch'"):
        select.resolve("triton", CUDA, torch.float16)


@pytest.fixture
def kernels_by_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """``impl="auto"`` takes the kernels, here in the interpreter."""
    monkeypatch.setattr(select, "explain", lambda device, dtype=None: ("triton", "so that it can be tested"))
    monkeypatch.setattr(warn, "_said", set())
    select.self_test_failure.cache_clear()
    yield monkeypatch
    select.self_test_failure.cache_clear()


def _ran() -> list[list[str]]:
    """The backends that each of two calls of a block creates; the first one tries the kernels before."""
    _, block = block_pair(1, 6, 4, 4, dtype=torch.float32)
    create, calls = select.create, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "create", lambda name, x: calls[-1].append(name) or create(name, x))
        for _ in range(2):
            calls.append([])
            block(random_input((2, 6, 5, 4), dtype=torch.float32))
    return calls


def test_auto_runs_kernels_that_pass_their_self_test(kernels_by_default: pytest.MonkeyPatch) -> None:
    """Once; running out of memory says nothing of them, and is not remembered."""
    with kernels_by_default.context() as patch:
        patch.setattr(TritonBackend, "bn_relu_conv", Mock(side_effect=torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            _ran()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first, second = _ran()
    assert first[-1] == "triton" and second == ["triton"]


def _off_by(factor: float) -> Any:
    right = TritonBackend.bn_relu_conv

    def wrong(self: TritonBackend, *arguments: Any, out: Features, **keywords: Any) -> None:
        right(self, *arguments, out=out, **keywords)
        out.rows[::2] *= factor

    return wrong


@pytest.mark.parametrize(
    ("primitive", "message"),
    [
        (_off_by(1.1), "off by"), (_off_by(NAN), "off by nan"),
        (Mock(side_effect=NotImplementedError("no such instruction")), "NotImplementedError: no such"),
    ],
    ids=["wrong", "NaN", "raises"],
)  # fmt: skip
def test_auto_leaves_kernels_that_do_not(primitive: Any, message: str, kernels_by_default: Any) -> None:
    kernels_by_default.setattr(TritonBackend, "bn_relu_conv", primitive)
    with pytest.warns(UserWarning, match=message) as caught:
        assert [names[-1] for names in _ran()] == ["torch", "torch"]
    assert len([w for w in caught if "plain PyTorch" in str(w.message)]) == 1


IN_A_FRESH_PROCESS = """
import os, sys, types, warnings
os.environ["TRITON_INTERPRET"] = "1"
import torch

for broken in (None, types.ModuleType("triton")):  # not installed, and installed but empty
    if os.fork():
        os.wait()
        continue
    sys.modules["triton"] = broken
    from fastdense.backends import select

    print(select.explain("cpu", torch.float32)[0])
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        print({select.resolve("auto", torch.device("cuda"), torch.float32) for _ in range(3)}, len(caught))
    assert "pip install 'triton>=3.6'" in str(caught[0].message)
    try:
        select.resolve("triton", torch.device("cpu"), torch.float32)
    except RuntimeError as error:
        print("pip install" in str(error) and "impl='torch'" in str(error), flush=True)
    os._exit(0)

from fastdense.backends.triton_launcher import _fp32_precision
print(_fp32_precision())
torch.backends.cudnn.allow_tf32 = False
print(_fp32_precision())
if hasattr(torch.backends.cudnn, "conv"):  # makes the old attribute unreadable
    torch.backends.cudnn.conv.fp32_precision = "tf32"
print(_fp32_precision())
"""


def test_whatever_is_broken_about_triton_and_how_fp32_products_follow_pytorchs_setting() -> None:
    done = python("-c", IN_A_FRESH_PROCESS)
    broken, precision = ["torch", "{'torch'}", "1", "True"], ["tf32", "ieee"]
    last = "tf32" if hasattr(torch.backends.cudnn, "conv") else "ieee"
    assert done.stdout.split() == [*broken, *broken, *precision, last], done.stdout + done.stderr


def test_the_interpreter_runs_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select.triton_unsupported_reason(CPU, torch.float32) is None
    assert select.resolve("triton", CPU, torch.float32) == "triton"
    name, reason = select.explain(CPU)
    assert name == select.resolve("auto", CPU, torch.float32) == "torch" and "impl='triton'" in reason
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"capability 8\.0.*TRITON_INTERPRET=1"):
        select.resolve("triton", CPU, torch.float32)
    with pytest.raises(RuntimeError, match="CUDA GPU"):
        select.resolve("triton", torch.device("meta"), torch.float32)
