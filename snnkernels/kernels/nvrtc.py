"""The GPU kernels compiled at run time by NVRTC through CuPy, where there is no compiled extension.

CuPy's own ``RawModule`` is not used: it appends ``-ftz=true`` to the caller's options, which
flushes subnormals and would make spikes differ from the other back ends, and it needs CUDA headers.
Driving ``cupy.cuda.nvrtc`` and loading the cubin takes the few lines below. Nothing is cached on
disk: a kernel compiles in a fraction of a second, once per process and device.
"""

from __future__ import annotations

import importlib
import re
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import backends, maps_params, params

_HEADERS = (
    *("numeric.h", "params.h", "neuron.h"),
    *("gpu.cuh", "forward.cuh", "general.cuh", "backward.cuh"),
    *("maps.h", "maps.cuh"),
)
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


# What a plain forward kernel writes (enum Output).
SPIKES, BYTE, WORDS, SPIKES_COUNT, TRAINING = range(5)
# Numbers of steps with kernels of their own: for wide threads, and for threads of one neuron.
STEPS, STEPS_OF_ONE = (1, 2, 4, 8, 16, 32), (8, 16, 32)


def is_plain_forward(p: np.void) -> bool:
    """Whether a plain kernel writes what ``p`` (an ``IF_FORWARD`` record) asks for."""
    native = not p["spikes"] or p["spike_bytes"] == _TYPES[int(p["dtype"])][1]
    if p["T"] > 2**31 - 1:
        return False
    if p["window"]:
        return bool(native)
    return not p["spikes"] or (not p["words"] and bool(native or p["spike_bytes"] == 1))


def forward_name(p: np.void) -> str:
    """The instance for a plain ``p``; the same choice as in csrc/launch.cu."""
    name, size, _ = _TYPES[int(p["dtype"])]
    vec, T = int(p["vec"]), int(p["T"])
    if p["window"]:
        out = TRAINING
    elif not p["spikes"]:
        out = WORDS
    elif p["spike_bytes"] == 1:
        out = BYTE
    else:
        out = SPIKES_COUNT if p["count"] else SPIKES

    def shared(operand: np.void) -> bool:
        return bool(operand["count"] == 1 or operand["inner"] % vec == 0)

    each = vec > 1 and not (shared(p["threshold"]) and (out == WORDS or shared(p["amplitude"])))
    own_steps = size < 8 and out in (SPIKES, WORDS) and not each
    if own_steps and T in (STEPS if vec > 1 else STEPS_OF_ONE):
        return f"snn::if_forward_steps<{name}, {out}, {vec}, {T}>"
    return f"snn::if_forward<{name}, {out}, {vec}, {_bool(each or out == TRAINING)}>"


def general_name(p: np.void) -> str:
    """The instance for ``p``, an ``IF_GENERAL`` record."""
    smooth = bool(p["options"] & params.SMOOTH)
    return f"snn::if_general<{_TYPES[int(p['base']['dtype'])][0]}, {_bool(smooth)}>"


def is_plain_backward(p: np.void) -> bool:
    """Whether a plain kernel serves ``p``, an ``IF_BACKWARD`` record: no sum over the steps."""
    return not p["grad_x"] or p["grad_x_rows"]["step"] != 0


def backward_name(p: np.void) -> str:
    """The instance for a plain ``p``; the same choice as in csrc/launch.cu."""
    name, vec = _TYPES[int(p["dtype"])][0], int(p["vec"])
    if p["window"]:
        return f"snn::if_backward_bits<{name}, {vec}>"
    return f"snn::if_backward<{name}, {int(p['surrogate'])}, {vec}>"


def backward_general_name(p: np.void) -> str:
    """The instance for ``p``, an ``IF_BACKWARD_GENERAL`` record."""
    smooth = bool(p["base"]["options"] & params.SMOOTH)
    return f"snn::if_backward_general<{_TYPES[int(p['base']['dtype'])][0]}, {_bool(smooth)}>"


def plain_instances() -> list[str]:
    """The kernels of the plain neuron: a closed list of at most 150."""
    names = []
    for name, size, state in _TYPES.values():
        wide = 16 // size
        for out in (SPIKES, BYTE, WORDS, SPIKES_COUNT):
            forms = ((1, False), (wide, False), (wide, True))
            names += [f"snn::if_forward<{name}, {out}, {vec}, {_bool(e)}>" for vec, e in forms]
        names += [f"snn::if_forward<{name}, {TRAINING}, {vec}, true>" for vec in (1, wide)]
        for out in (SPIKES, WORDS) if size < 8 else ():
            counts = [(wide, T) for T in STEPS] + [(1, T) for T in STEPS_OF_ONE]
            names += [f"snn::if_forward_steps<{name}, {out}, {vec}, {T}>" for vec, T in counts]
        for vec in (1, 16 // state):
            names += [f"snn::if_backward<{name}, {kind}, {vec}>" for kind in range(4)]
            names.append(f"snn::if_backward_bits<{name}, {vec}>")
    return names


def general_instances() -> list[str]:
    """The kernels that know every option."""
    types = [(name, False) for name, _, _ in _TYPES.values()] + [("double", True)]
    kernels = ("if_general", "if_backward_general")
    return [f"snn::{k}<{name}, {_bool(smooth)}>" for k in kernels for name, smooth in types]


def instances() -> list[str]:
    """Every instance there is, compiled by the tests for every architecture."""
    return [*plain_instances(), *general_instances()]


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


def _launch(name: str, record: np.ndarray, N: int, vec: int, device: torch.device) -> None:
    threads = -(-N // vec)
    blocks = -(-threads // THREADS)
    if blocks > 2**31 - 1:
        raise RuntimeError(f"{name}: more neurons than one launch can cover")
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
    p = record[0]
    if is_plain_forward(p):
        _launch(forward_name(p), record, int(p["N"]), int(p["vec"]), device)
    else:
        if_general(packed + bytes(params.IF_GENERAL.itemsize - len(packed)), device)


def if_general(packed: bytes, device: torch.device) -> None:
    """Launches the forward pass described by ``packed`` (:data:`params.IF_GENERAL`)."""
    record = np.frombuffer(packed, params.IF_GENERAL)
    _launch(general_name(record[0]), record, int(record[0]["base"]["N"]), 1, device)


def if_backward(packed: bytes, device: torch.device) -> None:
    """Launches the backward pass described by ``packed`` (:data:`params.IF_BACKWARD`)."""
    record = np.frombuffer(packed, params.IF_BACKWARD)
    p = record[0]
    if is_plain_backward(p):
        _launch(backward_name(p), record, int(p["N"]), int(p["vec"]), device)
    else:
        rest = bytes(params.IF_BACKWARD_GENERAL.itemsize - len(packed))
        general = np.frombuffer(packed + rest, params.IF_BACKWARD_GENERAL).copy()
        general["surrogate_scale"] = 1.0
        if_backward_general(general.tobytes(), device)


def if_backward_general(packed: bytes, device: torch.device) -> None:
    """Launches the backward pass described by ``packed`` (:data:`params.IF_BACKWARD_GENERAL`)."""
    record = np.frombuffer(packed, params.IF_BACKWARD_GENERAL)
    _launch(backward_general_name(record[0]), record, int(record[0]["base"]["N"]), 1, device)


def map_(name: str, packed: bytes, device: torch.device) -> None:
    """Launches the small kernel ``name`` (:data:`maps_params.RECORDS`)."""
    record = np.frombuffer(packed, maps_params.RECORDS[name].dtype)
    p = record[0]
    _launch(maps_params.instance(name, p), record, int(p["N"]), 1, device)
