"""A GPU that computes nothing: what kernels a program launches and compiles, asked on a machine without a GPU.

    fake.install()
    model(x)  # on the CPU; its kernels are compiled for an H100 and launched, results are whatever memory held

Triton's JIT, cache and launcher are the real ones, above a driver library whose calls succeed and do nothing
(``fake_driver.c``). fastdense is told that tensors lying on the CPU lie on the GPU.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("fake_driver.c")
ARCH, SM_COUNT = 90, 132  # an H100, as in the source
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")


def unsupported_reason() -> str | None:
    """Why :func:`install` cannot work in this process; ``None`` if it can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: kernels that are interpreted are not compiled"
    if COMPILER is None:
        return "there is no C compiler to build the driver library and Triton's launchers with"
    return None


def install() -> None:
    """From now on this process has an H100 that computes nothing.

    Raises:
        RuntimeError: it cannot be had here, with the reason.
    """
    if (reason := unsupported_reason()) is not None:
        raise RuntimeError(f"no fake GPU here: {reason}")
    folder = tempfile.mkdtemp(prefix="fastdense-fake-driver-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = f"{folder}/libcuda.so.1"
    command = [str(COMPILER), "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", "-o", library, str(SOURCE)]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # whatever asks for the real one gets this
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a build of PyTorch with CUDA asks this driver, once, and wonders
        if torch.cuda.is_available():
            raise RuntimeError("no fake GPU here: a real one is in use already; install() before anything asks for it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_target = lambda: GPUTarget("cuda", ARCH, 32)  # it would ask PyTorch
    driver.get_device_capability = lambda device=0: divmod(ARCH, 10)
    driver.get_current_stream = lambda device: 0
    driver.get_current_device = lambda: 0
    driver.set_current_device = lambda device: None
    triton.runtime.driver.set_active(driver)
    _tell_fastdense()


def _tell_fastdense() -> None:
    """Replaces what would tell fastdense that there is no GPU, or that it computes nothing."""
    from fastdense.backends import select, triton_launcher

    def resolve(impl: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
        kernels = dtype is None or dtype in select.TRITON_DTYPES
        return impl if impl != "auto" else "triton" if kernels else "torch"

    triton_launcher._architecture = lambda device: (ARCH, SM_COUNT)  # type: ignore[assignment]
    select.resolve = resolve
    select.self_test_failure = lambda name, device, dtype: None  # type: ignore[assignment]
