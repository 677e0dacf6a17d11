"""Convolution or linear layer of spikes with the neurons behind it, in one GPU kernel.

The currents of the neurons never reach memory: a tile of the matrix product holds all steps of its
neurons (:mod:`snnkernels.kernels.fused_conv_triton`). Spikes lie as ``[T, B, H, W, C]``, channels
innermost: the tensor cores want them contiguous, and ``[T, B, C, H, W]`` in ``channels_last`` is
the same memory, so that layers which are not fused read it where it lies.

Two arithmetics, told apart by the dtype of the weights:

* int8 weights: sums, bias, threshold and membrane are int32. Nothing is ever rounded, so spikes are
  the same bits in any order of summation and on any device.
* float16, bfloat16 and float8_e4m3fn weights: the same in float32, sums in the order of the tensor
  cores. A neuron can only differ from another order where its membrane comes within the rounding of
  those sums of its threshold. (Tensor cores of compute capability 9 keep fewer bits of float8 sums
  than float32 has.)

Triton is optional and imported by the first launch. :func:`fused_conv_reference` computes the same
in plain PyTorch, anywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .fused_conv_layer import BYTES, Call, FusedConv, NotFusible, checked
from .fused_conv_tiles import PROCESSORS, Tile, tile_for

__all__ = [
    "FusedConv",
    "FusedOutput",
    "NotFusible",
    "fused_conv",
    "fused_conv_reference",
    "why_not",
]


class FusedOutput(NamedTuple):
    """What a call gives; None where it was not asked for.

    Attributes:
        spikes: ``[T, B, OH, OW, N]`` of 0 and 1, or words ``[ceil(T / 32), B, OH, OW, N]``; without
            ``OH, OW`` for a linear layer, as everything here.
        count: int32 ``[B, OH, OW, N]``.
        v: membranes after the last step, ``[B, OH, OW, N]``.
    """

    spikes: Tensor | None
    count: Tensor | None  # type: ignore[assignment]
    v: Tensor | None


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device | str, dtype: torch.dtype = torch.int8) -> str:
    """Why :func:`fused_conv` cannot run on a device with weights of a dtype; else "".

    With ``TRITON_INTERPRET=1`` in the environment before Triton is imported it runs on CPUs,
    slowly.
    """
    device = torch.device(device)
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    if _interpreted():
        return ""
    if device.type != "cuda":
        return f"Triton has no code for {device.type} devices"
    capability = torch.cuda.get_device_capability(device)
    least = (8, 9) if dtype == torch.float8_e4m3fn else (8, 0)
    if capability < least:
        return (
            f"{dtype} needs compute capability {least[0]}.{least[1]}, "
            f"it has {capability[0]}.{capability[1]}"
        )
    return ""


def fused_conv(
    spikes: Tensor,
    layer: FusedConv,
    *,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    v: Tensor | None = None,
    output: torch.dtype | str | None = torch.uint8,
    count: bool = False,
    v_out: bool = False,
    tile: Tile | None = None,
) -> FusedOutput:
    """All steps of a layer and its neurons, in one launch on the current stream.

    ``current = conv(spikes) + bias + residual * residual_scale``, then at every step
    ``m = v + current``, a spike where ``m >= threshold``, ``v = m - threshold`` there. The product
    with the scale is rounded, nothing else is but the sums; no gradients.

    int32 sums hold as long as ``T`` times the largest current does: 127 for each weight that meets
    a spike (times 4 behind a pool) is checked, the sizes of bias and residual are the caller's.

    Args:
        spikes: ``[T, B, H, W, C]`` (``[T, B, C]`` of a linear layer), contiguous, of 0 and 1: uint8
            or bool, or the dtype of the weights; the former not beside float8 weights. T = 0 is
            legal.
        layer: of :meth:`FusedConv.of`, on the same device.
        residual: ``[T, B, OH, OW, N]``, or constant in time ``[B, OH, OW, N]``; contiguous: a
            current, or spikes that pass by the convolution. uint8, int8 or int32 beside int8
            weights, else uint8, int8, float16, bfloat16 or float32.
        residual_scale: ``[N]`` in the state dtype: what one of the residual weighs.
        v: membranes at the start, ``[B, OH, OW, N]`` in the state dtype, contiguous; in place of
            ``layer.v_init``.
        output: what spikes come as: uint8, int8, float16, bfloat16 or float8_e4m3fn, ``"packed"``
            (bit ``t % 32`` of word ``t // 32``; uint8 words up to 8 steps, int16 up to 16, int32
            beyond, as :func:`snnkernels.kernels.reference.pack`), or None.
        count, v_out: return counts, membranes.
        tile: in place of the one from the table; for measurements.

    Raises:
        ValueError: an argument is not allowed; names it.
        RuntimeError: the kernel cannot run on this device; :func:`why_not` says why.

    Source: the neuron of :func:`snnkernels.kernels.reference.if_forward`; the convolution as a
    product whose left side is never laid out, after Chetlur et al., cuDNN: Efficient Primitives for
    Deep Learning (arXiv 1410.0759), here with time in its rows.
    """
    call = checked(spikes, layer, residual, residual_scale, v, output)
    reason = why_not(spikes.device, layer.weight.dtype)
    if reason:
        raise RuntimeError(f"fused_conv cannot run on {spikes.device}: {reason}")
    out = _outputs(call, layer, output, count, v_out)
    if call.T and math.prod(call.shape):
        tile = _tile(call, layer) if tile is None else tile
        _run(_launch(call, layer, out, output, tile), spikes.device)
    elif v_out:
        assert out.v is not None
        out.v.copy_(layer.v_init if call.v is None else call.v)
    return _shaped(out, layer)


def fused_conv_reference(
    spikes: Tensor,
    layer: FusedConv,
    *,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    v: Tensor | None = None,
    output: torch.dtype | str | None = torch.uint8,
    count: bool = False,
    v_out: bool = False,
) -> FusedOutput:
    """:func:`fused_conv` in plain PyTorch, on any device: the same bits for int8 weights.

    Whole numbers have exact sums in float64, so that those are int32's.
    """
    call = checked(spikes, layer, residual, residual_scale, v, output)
    T, (B, OH, OW, N) = call.T, call.shape
    wide = torch.float64 if layer.state == torch.int32 else torch.float32
    with torch.no_grad():
        x = call.spikes.flatten(0, 1).permute(0, 3, 1, 2).to(wide)
        if layer.pool == 2:
            x = F.avg_pool2d(x, 2, divisor_override=1)
        weight = layer.weight.to(wide).permute(0, 3, 1, 2)
        current = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
        current = current.permute(0, 2, 3, 1).reshape(T, B, OH, OW, N)
        if layer.bias is not None:
            current = current + layer.bias.to(wide)
        if call.residual is not None:
            added = call.residual.to(wide)
            scale = call.residual_scale
            current = current + (added if scale is None else added * scale.to(wide))
        start = layer.v_init if call.v is None else call.v
        run = reference.if_forward(
            current, start.to(wide), layer.threshold.to(wide), current.new_ones(()),
            strict=layer.strict, spike_dtype=torch.uint8,
        )  # fmt: skip
    rows: Tensor | None = None
    if output == "packed":
        rows = reference.pack(run.spikes.bool())
    elif isinstance(output, torch.dtype):
        rows = run.spikes.to(output)
    found = FusedOutput(
        rows, run.count if count else None, run.v.to(layer.state) if v_out else None
    )
    return _shaped(found, layer)


def _shaped(out: FusedOutput, layer: FusedConv) -> FusedOutput:
    if not layer.linear:
        return out
    return FusedOutput(*(None if t is None else t.flatten(-4, -2) for t in out))


# ---- launch


def _outputs(
    call: Call, layer: FusedConv, output: torch.dtype | str | None, count: bool, v_out: bool
) -> FusedOutput:
    new, T = call.spikes.new_empty, call.T
    spikes: Tensor | None = None
    if output == "packed":
        words = -(-T // reference.WORD_STEPS)
        spikes = new((words, *call.shape), dtype=reference.word_dtype(T))
    elif isinstance(output, torch.dtype):
        spikes = new((T, *call.shape), dtype=output)
    counts = torch.zeros if T == 0 else torch.empty
    return FusedOutput(
        spikes,
        counts(call.shape, dtype=torch.int32, device=call.spikes.device) if count else None,
        new(call.shape, dtype=layer.state) if v_out else None,
    )


class _Launch(NamedTuple):
    """A launch, in the order of the kernel's arguments; constants and options by name."""

    blocks: int
    arguments: list[Tensor | int]
    constants: dict[str, int | bool]
    options: dict[str, int | bool]


def _launch(
    call: Call,
    layer: FusedConv,
    out: FusedOutput,
    output: torch.dtype | str | None,
    tile: Tile,
) -> _Launch:
    spikes, weight, residual, T = call.spikes, layer.weight, call.residual, call.T
    if spikes.dtype in BYTES:
        spikes = spikes.view(torch.int8 if weight.dtype == torch.int8 else torch.uint8)
    (B, OH, OW, N), (H, W, C) = call.shape, spikes.shape[2:]
    KH, KW = weight.shape[1:3]
    M = B * OH * OW
    (SH, SW), (PH, PW), (DH, DW) = layer.stride, layer.padding, layer.dilation
    # What is not there is not read: any pointer will do.
    there = [
        layer.threshold if t is None else t
        for t in (
            layer.bias, layer.threshold, layer.v_init if call.v is None else call.v, residual,
            call.residual_scale, out.spikes, out.count, out.v,
        )
    ]  # fmt: skip
    step = 0 if residual is None or residual.dim() == 4 else M * N
    return _Launch(
        -(-M // tile.positions) * -(-N // tile.channels),
        [spikes, weight, *there, T, B, H, W, C, OH, OW, N, step],
        {
            "KH": KH, "KW": KW, "SH": SH, "SW": SW, "PH": PH, "PW": PW, "DH": DH, "DW": DW,
            "POOL": layer.pool, "BIAS": layer.bias is not None, "RESIDUAL": residual is not None,
            "SCALED": call.residual_scale is not None, "STRICT": layer.strict,
            "FULL_V": call.v is not None,
            "OUTPUT": 0 if output is None else 2 if output == "packed" else 1,
            "COUNT": out.count is not None, "V_OUT": out.v is not None, "QUADS": not _interpreted(),
            "ONE": tile.steps >= T, "EVEN_T": T % tile.steps == 0, "EVEN_C": C % tile.inner == 0,
            "TC": tile.steps, "BP": tile.positions, "BN": tile.channels, "BK": tile.inner,
            "GROUP": tile.group,
        },
        {
            "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False,
            **({"maxnreg": tile.registers} if tile.registers else {}),
        },
    )  # fmt: skip


def _run(launch: _Launch, device: torch.device) -> None:
    kernel = importlib.import_module(f"{__package__}.fused_conv_triton").fused_conv_kernel
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
        kernel[(launch.blocks,)](*launch.arguments, **launch.constants, **launch.options)


def _tile(call: Call, layer: FusedConv) -> Tile:
    (B, OH, OW, N), C, device = call.shape, call.spikes.shape[-1], call.spikes.device
    processors, major = PROCESSORS, 9
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        processors, major = found.multi_processor_count, found.major
    return tile_for(B * OH * OW, N, C, call.T, layer.weight.dtype, layer.pool, processors, major)
