"""A layer laid out for the kernel of :mod:`snnkernels.kernels.fused_conv`, and a checked call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["BYTES", "OUTPUTS", "Call", "FusedConv", "NotFusible", "checked"]

Pair: TypeAlias = tuple[int, int]
WEIGHTS = (torch.int8, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
OUTPUTS = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
_RESIDUALS = {
    torch.int32: (torch.uint8, torch.int8, torch.int32),
    torch.float32: (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32),
}
BYTES = (torch.uint8, torch.bool)


class NotFusible(NotImplementedError):
    """A layer that the fused kernel has no form for; run it as convolution and neurons."""


@dataclass(frozen=True)
class FusedConv:
    """A layer as the kernel reads it; made by :meth:`of`.

    Attributes:
        weight: ``[N, KH, KW, C]``, contiguous: int8, float16, bfloat16 or float8_e4m3fn.
        threshold, v_init, bias: ``[N]`` in the state dtype, int32 for int8 weights, else float32;
            no bias: None.
        stride, padding, dilation: of the convolution, rows first.
        pool: 2: the convolution reads sums of 2 x 2 spikes; 1: spikes.
        strict: neurons fire above the threshold, not at it.
        linear: made of a matrix: spikes are ``[T, B, C]``.
    """

    weight: Tensor
    threshold: Tensor
    v_init: Tensor
    bias: Tensor | None = None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    pool: int = 1
    strict: bool = False
    linear: bool = False

    @classmethod
    def of(
        cls,
        weight: Tensor,
        threshold: Tensor | float,
        *,
        v_init: Tensor | float = 0,
        bias: Tensor | None = None,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        pool: int = 1,
        strict: bool = False,
    ) -> FusedConv:
        """Check a layer and lay out its weights.

        Any number of input channels works, and only a multiple of 16 works fast: loads are wide
        then. Pad the spikes before and the weights here with zeros.

        Args:
            weight: ``[N, C, KH, KW]``, or ``[N, C]`` of a linear layer.
            threshold: a number, or ``[N]``; positive and finite, whole numbers for int8 weights.
            v_init: a number, or ``[N]``: the membranes at the start.
            bias: ``[N]``, added at every step.
            groups: of the convolution; only 1 is fused.
            pool: 2 adds the spikes of every 2 x 2 window first, rows and columns left over dropped.
                For their mean, give threshold, bias and v_init times 4 (exact), or the weights
                over 4 (exact but for int8 and subnormals).

        Raises:
            NotFusible: groups, dtypes or thresholds that the kernel has no form for.
            ValueError: an argument is not allowed; names it.
        """
        if weight.dim() not in (2, 4):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; allowed are [N, C, KH, KW] and [N, C]"
            )
        if weight.dtype not in WEIGHTS:
            raise NotFusible(
                f"weight has dtype {weight.dtype}; fused are {', '.join(map(str, WEIGHTS))}"
            )
        if groups != 1:
            raise NotFusible(f"groups={groups}; only convolutions with groups=1 are fused")
        if pool not in (1, 2):
            raise NotFusible(f"pool={pool}; fused are 1 (none) and 2 (sums of 2 x 2)")
        if weight.numel() == 0:
            raise ValueError(f"weight of shape {tuple(weight.shape)} is empty")
        linear = weight.dim() == 2
        if linear and (pool, stride, padding, dilation) != (1, 1, 0, 1):
            raise ValueError("a linear layer has no stride, padding, dilation or pool")
        full = weight.detach()[..., None, None] if linear else weight.detach()
        state = torch.int32 if weight.dtype == torch.int8 else torch.float32

        def vector(name: str, value: Tensor | float) -> Tensor:
            return _vector(name, value, len(full), state, weight.device)

        theta = vector("threshold", threshold)
        if not bool(((theta > 0) & theta.double().isfinite()).all()):
            raise ValueError(f"threshold must be positive and finite in {state}, got {threshold}")
        return cls(
            full.permute(0, 2, 3, 1).contiguous(),
            theta,
            vector("v_init", v_init),
            None if bias is None else vector("bias", bias),
            _pair("stride", stride, 1),
            _pair("padding", padding, 0),
            _pair("dilation", dilation, 1),
            pool,
            strict,
            linear,
        )

    def to(self, device: torch.device | str) -> FusedConv:
        """The same on another device."""
        names = ("weight", "threshold", "v_init", "bias")
        held = {name: getattr(self, name) for name in names}
        moved = {name: value.to(device) for name, value in held.items() if value is not None}
        return replace(self, **moved)

    @property
    def state(self) -> torch.dtype:
        """Dtype of sums, thresholds and membranes."""
        return self.threshold.dtype

    def size(self, H: int, W: int) -> Pair:
        """Rows and columns of the output for an input of H x W.

        Raises:
            ValueError: the kernel does not fit into the input.
        """
        KH, KW = self.weight.shape[1:3]
        (SH, SW), (PH, PW), (DH, DW) = self.stride, self.padding, self.dilation
        OH = (H // self.pool + 2 * PH - DH * (KH - 1) - 1) // SH + 1
        OW = (W // self.pool + 2 * PW - DW * (KW - 1) - 1) // SW + 1
        if OH < 1 or OW < 1:
            raise ValueError(f"spikes of {H} x {W} are smaller than the {KH} x {KW} kernel")
        return OH, OW


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(f"{name}={value!r} must be a whole number from {least}, or two of them")
    return pair[0], pair[1]


def _vector(name: str, value: Any, N: int, state: torch.dtype, device: torch.device) -> Tensor:
    given = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    for_each = given.dim() == 1 and len(given) == N
    if for_each or (given.dim() <= 1 and given.numel() == 1):
        given = given.to(device)
        made = given.to(state)
        if state == torch.int32 and not torch.equal(made.double(), given.double()):
            raise ValueError(f"{name} must hold whole numbers of int32 beside int8 weights")
        return made.expand(N).contiguous()
    if given.dim() <= 1:
        raise ValueError(
            f"{name} has {len(given)} numbers; allowed are one, or one for each of {N} channels"
        )
    raise NotFusible(f"{name} of shape {tuple(given.shape)}; fused are numbers and [{N}]")


class Call(NamedTuple):
    """A checked call: everything with its spatial dimensions."""

    spikes: Tensor
    residual: Tensor | None
    residual_scale: Tensor | None
    v: Tensor | None
    T: int
    shape: tuple[int, int, int, int]  # B, OH, OW, N


def _must_be(name: str, value: Tensor, shapes: list[tuple[int, ...]], like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, spikes on {like.device}")
    if tuple(value.shape) not in shapes:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; allowed: {' or '.join(map(str, shapes))}"
        )
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, it has strides {value.stride()}")


def _of_dtype(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in allowed:
        raise ValueError(f"{name} has dtype {value.dtype}; allowed: {', '.join(map(str, allowed))}")


def checked(
    spikes: Tensor,
    layer: FusedConv,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    v: Tensor | None,
    output: torch.dtype | str | None,
) -> Call:
    """The call with its spatial dimensions.

    Raises:
        ValueError: an argument is not allowed; names it.
    """
    wanted = "[T, B, C]" if layer.linear else "[T, B, H, W, C]"
    N, KH, KW, C = layer.weight.shape
    if spikes.dim() != (3 if layer.linear else 5) or spikes.shape[-1] != C:
        raise ValueError(f"spikes has shape {tuple(spikes.shape)}; allowed: {wanted} with C = {C}")
    if spikes.device != layer.weight.device:
        raise ValueError(f"spikes is on {spikes.device}, the layer on {layer.weight.device}")
    if not spikes.is_contiguous():
        raise ValueError(
            f"spikes must be contiguous as {wanted}, it has strides {spikes.stride()}; "
            "permute a tensor [T, B, C, H, W] that lies in channels_last"
        )
    kind = layer.weight.dtype
    _of_dtype("spikes", spikes, (kind,) if kind == torch.float8_e4m3fn else (*BYTES, kind))
    if not (output is None or output == "packed" or output in OUTPUTS):
        raise ValueError(
            f"output={output!r}; allowed: {', '.join(map(str, OUTPUTS))}, 'packed' and None"
        )
    T, B = spikes.shape[:2]
    full = spikes.view(T, B, 1, 1, C) if layer.linear else spikes
    H, W = full.shape[2:4]
    OH, OW = layer.size(H, W)
    shape = (B, OH, OW, N)
    flat = (B, N) if layer.linear else shape
    if residual is not None:
        _must_be("residual", residual, [(T, *flat), flat], spikes)
        _of_dtype("residual", residual, _RESIDUALS[layer.state])
        residual = residual.view(*residual.shape[: -len(flat)], *shape)
    if residual_scale is not None:
        if residual is None:
            raise ValueError("residual_scale without a residual")
        _must_be("residual_scale", residual_scale, [(N,)], spikes)
        _of_dtype("residual_scale", residual_scale, (layer.state,))
    if v is not None:
        _must_be("v", v, [flat], spikes)
        _of_dtype("v", v, (layer.state,))
        v = v.view(shape)
    if T * 127 * KH * KW * C * layer.pool**2 >= 2**31 and kind == torch.int8:
        raise ValueError(
            f"T={T} steps of {KH * KW * C} int8 weights each can leave int32; run fewer steps at a "
            "time and carry v"
        )
    # What the kernel counts in 32 bits: values of an image and of a filter, positions of a batch (a
    # tile may lie beyond the last).
    if max(H * W * C, KH * KW * C, B * OH * OW + 2**10) >= 2**31:
        raise ValueError(
            f"{B} images of {H} x {W} x {C} spikes: an image must have fewer than 2**31 values, a "
            "batch fewer positions"
        )
    return Call(full, residual, residual_scale, v, T, shape)
