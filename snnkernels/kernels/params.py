"""Python's side of csrc/params.h: the structs a kernel receives, as packed bytes.

``struct`` packs them in a microsecond; the NumPy dtypes describe the same bytes for CuPy, which
passes a structured scalar to a kernel by value. A test compares both with the compiled layout.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

STRICT, HARD_RESET, INPUT_SCALE, DETACH_RESET, SMOOTH = 1, 2, 4, 8, 16

# Steps whose membranes the GPU backward holds in registers (kChunk).
CHUNK = 8

_OPERAND = (("data", "Q"), ("inner", "q"), ("count", "q"), ("value", "d"))

_FORWARD = (
    *((name, "Q") for name in ("x", "spikes", "count", "v", "v_seq", "charge_seq")),
    *((name, _OPERAND) for name in ("v_init", "threshold", "amplitude", "input_scale")),
    *((name, "q") for name in ("T", "N", "x_stride")),
    *((name, "d") for name in ("v_reset", "alpha")),
    ("amplitude_bits", "Q"),
    *((name, "i") for name in ("dtype", "spike_bytes", "options", "surrogate", "vec", "pad")),
)

_BACKWARD = (
    *((n, "Q") for n in ("x", "grad_spikes", "grad_v", "grad_v_seq", "grad_charge_seq", "grad_x")),
    *((n, "Q") for n in ("grad_v_init", "grad_threshold", "grad_amplitude", "grad_input_scale")),
    ("scratch", "Q"),
    *((name, _OPERAND) for name in ("v_init", "threshold", "amplitude", "input_scale")),
    *((name, "q") for name in ("T", "N", "x_stride", "grad_stride")),
    *((name, "d") for name in ("v_reset", "alpha", "grad_scale")),
    *((name, "i") for name in ("dtype", "options", "surrogate", "vec")),
)

_NUMPY = {"Q": "u8", "q": "i8", "d": "f8", "i": "i4"}


def _numpy(fields: tuple) -> np.dtype:
    return np.dtype(
        [
            (name, _numpy(kind) if isinstance(kind, tuple) else _NUMPY[kind])
            for name, kind in fields
        ],
        align=True,
    )


def _format(fields: tuple) -> str:
    return "".join(_format(kind) if isinstance(kind, tuple) else kind for _, kind in fields)


OPERAND = _numpy(_OPERAND)
IF_FORWARD = _numpy(_FORWARD)
IF_BACKWARD = _numpy(_BACKWARD)

# Native alignment: no field needs padding, which the layout test proves.
pack_forward = struct.Struct("@" + _format(_FORWARD)).pack
pack_backward = struct.Struct("@" + _format(_BACKWARD)).pack
