"""The GPU kernels compiled at run time by NVRTC through CuPy, where there is no compiled extension.

CuPy's own ``RawModule`` is not used: it appends ``-ftz=true`` to the caller's options, which
flushes subnormals and would make spikes differ from the other back ends, and it needs CUDA headers.
Driving ``cupy.cuda.nvrtc`` and loading the cubin takes the few lines below. Nothing is cached on
disk: a kernel compiles in a fraction of a second, once per process and device.
"""

from __future__ import annotations

import importlib
import itertools
import re
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import backends, maps_params, params

_HEADERS = ("numeric.h", "params.h", "neuron.h", "kernels.cuh", "maps.h", "maps.cuh")
FLAGS = ("-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
THREADS = 256

_TYPES = {0: ("float", 4, 4), 1: ("double", 8, 8), 2: ("snn::f16", 2, 4), 3: ("snn::bf16", 2, 4)}
_lock = threading.Lock()
_kernels: dict[tuple[int, str], Any] = {}


@lru_cache(maxsize=1)
def source() -> str:
    """The kernel headers as one string without includes: NVRTC has no header path."""
    installed = Path(__file__).parents[1] / "_csrc"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "csrc"
    text = "\n".join((folder / name).read_text() for name in _HEADERS)
    return re.sub(r'^\s*#(pragma once|include ".*")$', "", text, flags=re.M)


def _bool(value: Any) -> str:
    return "true" if value else "false"


def _forward(dtype: int, spike_bytes: int, vec: int, constant: bool, uniform: bool) -> str:
    flags = f"{_bool(constant)}, {_bool(uniform)}"
    return f"snn::if_forward<{_TYPES[dtype][0]}, {spike_bytes}, {vec}, {flags}>"


def forward_name(p: np.void) -> str:
    """The instance for ``p`` (an ``IF_FORWARD`` record); the same choice as in csrc/launch.cu."""
    dtype = int(p["dtype"])
    if p["options"] or p["v_seq"] or p["charge_seq"]:
        smooth = bool(p["options"] & params.SMOOTH)
        return f"snn::if_forward_general<{_TYPES[dtype][0]}, {_bool(smooth)}>"
    uniform = p["threshold"]["count"] == 1 and p["amplitude"]["count"] == 1
    vec = int(p["vec"])
    return _forward(dtype, int(p["spike_bytes"]), vec, p["x_stride"] == 0, uniform)


def backward_name(p: np.void) -> str:
    """The instance for ``p`` (an ``IF_BACKWARD`` record); the same choice as in csrc/launch.cu."""
    dtype = int(p["dtype"])
    general = (
        p["options"] & ~params.DETACH_RESET
        or p["x_stride"] == 0
        or p["grad_v_seq"]
        or p["grad_charge_seq"]
        or p["grad_threshold"]
        or p["grad_amplitude"]
    )
    if general:
        smooth = bool(p["options"] & params.SMOOTH)
        return f"snn::if_backward_general<{_TYPES[dtype][0]}, {_bool(smooth)}>"
    return f"snn::if_backward<{_TYPES[dtype][0]}, {int(p['surrogate'])}, {int(p['vec'])}>"


def instances() -> list[str]:
    """Every instance there is: a closed list, compiled by the tests for every architecture."""
    names = []
    for dtype, (name, size, state) in _TYPES.items():
        widths = sorted({1, size})
        for bytes_, vec, constant, uniform in itertools.product(
            widths, (1, 16 // size), (True, False), (True, False)
        ):
            names.append(_forward(dtype, bytes_, vec, constant, uniform))
        names.append(f"snn::if_forward_general<{name}, false>")
        for kind, vec in itertools.product(range(4), (1, 16 // state)):
            names.append(f"snn::if_backward<{name}, {kind}, {vec}>")
        names.append(f"snn::if_backward_general<{name}, false>")
    names += ["snn::if_forward_general<double, true>", "snn::if_backward_general<double, true>"]
    return names


def compile_cubin(names: list[str], arch: str) -> tuple[bytes, list[str]]:
    """Compiles instances for ``arch`` (such as ``"sm_90"``); needs neither GPU nor driver.

    Returns:
        The cubin and the lowered name of each instance.

    Raises:
        RuntimeError: with NVRTC's log.
    """
    nvrtc = importlib.import_module("cupy.cuda").nvrtc
    program = nvrtc.createProgram(source(), "snnkernels.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*FLAGS, f"-arch={arch}"))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"NVRTC cannot compile for {arch}: {error}\n{log}") from None
        lowered = [nvrtc.getLoweredName(program, name) for name in names]
        return nvrtc.getCUBIN(program), lowered
    finally:
        nvrtc.destroyProgram(program)


def _arch(device: torch.device) -> str:
    """The newest architecture NVRTC knows whose cubins run on ``device``."""
    major, minor = torch.cuda.get_device_capability(device)
    known = importlib.import_module("cupy.cuda").nvrtc.getSupportedArchs()
    fits = [a for a in known if a // 10 == major and a % 10 <= minor]
    if not fits:
        raise backends.Missing(
            f"NVRTC compiles for sm {' '.join(map(str, known))}, the device is sm_{major}{minor}",
            "install the CuPy of a newer CUDA",
        )
    return f"sm_{max(fits)}"


def check(device: torch.device) -> None:
    """Raises :class:`backends.Missing` when NVRTC cannot compile for ``device``."""
    _arch(device)


def _function(name: str, device: torch.device) -> Any:
    key = (device.index, name)
    kernel = _kernels.get(key)
    if kernel is None:
        with _lock:
            if key not in _kernels:
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "a kernel cannot be compiled while a CUDA graph is captured: run once "
                        "before capture"
                    )
                cupy_cuda = importlib.import_module("cupy.cuda")
                cubin, (lowered,) = compile_cubin([name], _arch(device))
                module = cupy_cuda.Module()
                module.load(cubin)
                # The module must outlive its function.
                _kernels[key] = (module, module.get_function(lowered))
            kernel = _kernels[key]
    return kernel[1]


def _launch(name: str, record: np.ndarray, device: torch.device) -> None:
    p = record[0]
    vec = int(p["vec"]) if "vec" in (record.dtype.names or ()) else 1
    threads = -(-int(p["N"]) // vec)
    blocks = -(-threads // THREADS)
    # CuPy launches on the current device; the stream is torch's.
    with torch.cuda.device(device):
        function = _function(name, device)
        stream = _stream(device)
        function((blocks, 1, 1), (THREADS, 1, 1), (record,), stream=stream)


def _stream(device: torch.device) -> Any:
    cupy_cuda = importlib.import_module("cupy.cuda")
    current = torch.cuda.current_stream(device)
    if hasattr(cupy_cuda.Stream, "from_external") and hasattr(current, "__cuda_stream__"):
        return cupy_cuda.Stream.from_external(current)
    return cupy_cuda.ExternalStream(current.cuda_stream, device.index)


def if_forward(packed: bytes, device: torch.device) -> None:
    """Launches the forward pass described by ``packed`` (:data:`params.IF_FORWARD`)."""
    record = np.frombuffer(packed, params.IF_FORWARD)
    _launch(forward_name(record[0]), record, device)


def if_backward(packed: bytes, device: torch.device) -> None:
    """Launches the backward pass described by ``packed`` (:data:`params.IF_BACKWARD`)."""
    record = np.frombuffer(packed, params.IF_BACKWARD)
    _launch(backward_name(record[0]), record, device)


def map_(name: str, packed: bytes, device: torch.device) -> None:
    """Launches the small kernel ``name`` (:data:`maps_params.RECORDS`)."""
    record = np.frombuffer(packed, maps_params.RECORDS[name].dtype)
    _launch(maps_params.instance(name, record[0]), record, device)
