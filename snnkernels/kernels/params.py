"""Python's side of csrc/params.h: the structs a kernel receives, as packed bytes.

``struct`` packs them in a microsecond; the NumPy dtypes describe the same bytes for CuPy, which
passes a structured scalar to a kernel by value. A test compares both with the compiled layout.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

STRICT, HARD_RESET, INPUT_SCALE, DETACH_RESET, SMOOTH = 1, 2, 4, 8, 16
BETA, BIAS, FIRE_LEVEL, BURST, SIGNED, MASK = 32, 64, 128, 256, 512, 1024
PROBE_MASK, PROBE_SHIFT, PARALLEL, RESET_DELAY = 2048, 4096, 8192, 16384
CLIP = 32768

# Options that have no gradient.
INFERENCE_ONLY = SIGNED | MASK | PROBE_MASK | PROBE_SHIFT | PARALLEL

# Steps whose membranes the GPU backward holds in registers (kChunk).
CHUNK = 8
# Times at which one run can report counts (kCountTimes).
COUNT_TIMES = 16

_OPERAND = (("data", "Q"), ("inner", "q"), ("count", "q"), ("value", "d"))
_ROWS = (("step", "q"), ("outer", "q"))

_FORWARD = (
    *((name, "Q") for name in ("x", "spikes", "words", "window", "count", "v")),
    *((name, _OPERAND) for name in ("v_init", "threshold", "amplitude")),
    *((name, "q") for name in ("T", "N", "inner")),
    *((name, _ROWS) for name in ("x_rows", "out_rows")),
    ("alpha", "d"),
    ("amplitude_bits", "Q"),
    *((name, "i") for name in ("dtype", "spike_bytes", "word_bytes", "vec")),
)

_MORE_OPERANDS = tuple((name, _OPERAND) for name in ("input_scale", "beta", "bias", "fire_level"))

_GENERAL_ONLY = (
    *((name, "Q") for name in ("counts", "v_seq", "charge_seq", "mask")),
    *_MORE_OPERANDS,
    *((name, "d") for name in ("v_reset", "margin", "surrogate_scale", "v_min")),
    *((name, "i") for name in ("options", "surrogate", "max_spikes", "probe", "iterations")),
    *((name, "i") for name in ("count_low", "count_high", "count_times")),
    ("count_at", f"{COUNT_TIMES}i"),
)

_BACKWARD = (
    *((name, "Q") for name in ("x", "charges", "window", "words", "grad_spikes", "grad_v")),
    *((name, "Q") for name in ("grad_x", "grad_v_init", "grad_threshold", "grad_amplitude")),
    ("scratch", "Q"),
    *((name, _OPERAND) for name in ("v_init", "threshold", "amplitude")),
    *((name, "q") for name in ("T", "N", "inner")),
    *((name, _ROWS) for name in ("x_rows", "out_rows", "grad_rows", "grad_x_rows")),
    *((name, "d") for name in ("alpha", "grad_scale")),
    *((name, "i") for name in ("dtype", "word_bytes", "options", "surrogate", "vec", "pad")),
)

_BACKWARD_GENERAL_ONLY = (
    *((name, "Q") for name in ("grad_v_seq", "grad_charge_seq")),
    *((name, "Q") for name in ("grad_input_scale", "grad_beta", "grad_bias", "grad_fire_level")),
    *_MORE_OPERANDS,
    *((name, "d") for name in ("v_reset", "surrogate_scale", "v_min")),
    *((name, "i") for name in ("max_spikes", "pad")),
)

_NUMPY = {"Q": "u8", "q": "i8", "d": "f8", "i": "i4", f"{COUNT_TIMES}i": f"{COUNT_TIMES}i4"}


def _numpy(fields: tuple[Any, ...]) -> np.dtype:
    return np.dtype(
        [
            (name, _numpy(kind) if isinstance(kind, tuple) else _NUMPY[kind])
            for name, kind in fields
        ],
        align=True,
    )


def _format(fields: tuple[Any, ...]) -> str:
    return "".join(_format(kind) if isinstance(kind, tuple) else kind for _, kind in fields)


OPERAND = _numpy(_OPERAND)
ROWS = _numpy(_ROWS)
IF_FORWARD = _numpy(_FORWARD)
IF_GENERAL = _numpy((("base", _FORWARD), *_GENERAL_ONLY))
IF_BACKWARD = _numpy(_BACKWARD)
IF_BACKWARD_GENERAL = _numpy((("base", _BACKWARD), *_BACKWARD_GENERAL_ONLY))

# Native alignment: no field needs padding, which the layout test proves. A general struct is the
# plain one and what follows it.
pack_forward = struct.Struct("@" + _format(_FORWARD)).pack
pack_general = struct.Struct("@" + _format(_GENERAL_ONLY)).pack
pack_backward = struct.Struct("@" + _format(_BACKWARD)).pack
pack_backward_general = struct.Struct("@" + _format(_BACKWARD_GENERAL_ONLY)).pack
