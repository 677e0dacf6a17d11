"""What a neuron reads besides its current: numbers and tensors that neurons share."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Size, Tensor


def for_broadcast(name: str, value: Tensor, shape: Size, channel_dim: int | None) -> Tensor:
    """``value`` viewed so that it broadcasts to the neurons' ``shape``.

    A 1-D tensor with ``channel_dim`` set (counted without T) is per channel.

    Raises:
        ValueError: naming the argument, its shape and what is allowed.
    """
    # The number of dimensions first: comparing sizes would tie a dynamic batch to a channel count.
    if value.dim() == len(shape) and value.shape == shape:
        return value
    if channel_dim is not None and value.dim() == 1 and value.numel() != 1:
        dims = len(shape)
        if not -dims <= channel_dim < dims:
            raise ValueError(
                f"channel_dim={channel_dim} is out of range for neurons of shape {tuple(shape)}; it "
                f"must be within {-dims}..{dims - 1}: it counts without the time dimension"
            )
        channel_dim %= dims
        if value.shape[0] != shape[channel_dim]:
            raise ValueError(
                f"{name} has {value.shape[0]} elements but channel_dim={channel_dim} of the "
                f"neurons' shape {tuple(shape)} has {shape[channel_dim]}"
            )
        return value.reshape(-1, *(1 for _ in shape[channel_dim + 1 :]))
    if value.dim() > len(shape) or any(
        a not in (1, b) for a, b in zip(reversed(value.shape), reversed(shape), strict=False)
    ):
        if value.numel() == 1:
            return value.reshape(())
        hint = "" if channel_dim is not None else "; set channel_dim for one value per channel"
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not broadcast to the neurons' shape "
            f"{tuple(shape)}{hint}"
        )
    return value


class Shared(NamedTuple):
    """A tensor's elements as kernels read them: neuron n takes ``(n // inner) % elements``."""

    tensor: Tensor
    inner: int
    elements: int


def share(value: Tensor, shape: Size, dtype: torch.dtype) -> Shared:
    """Describes ``value`` (broadcasts to ``shape``) without expanding it where that is possible."""
    if value.dtype != dtype:
        value = value.detach().to(dtype)
    if value.shape == shape:
        return Shared(value if value.is_contiguous() else value.contiguous(), 1, value.numel())
    if value.numel() == 1:
        return Shared(value.contiguous(), 1, 1)
    sizes = [1] * (len(shape) - value.dim()) + list(value.shape)
    full = [i for i, n in enumerate(sizes) if n != 1]
    first, last = full[0], full[-1]
    if sizes[first : last + 1] == list(shape[first : last + 1]):
        return Shared(value.contiguous(), math.prod(shape[last + 1 :]), value.numel())
    # Shared along two separate runs of dimensions, for example [B, 1, H, W]: rare, so expanded.
    return Shared(value.expand(shape).contiguous(), 1, math.prod(shape))


def bits(number: float, dtype: torch.dtype) -> int:
    """The bit pattern of ``number`` rounded once to ``dtype``; integer spikes are 0 and 1."""
    if number or not dtype.is_floating_point:
        return _bits(number, dtype)
    # 0.0 and -0.0 are the same key.
    return 0 if math.copysign(1.0, number) > 0 else _bits.__wrapped__(number, dtype)


@lru_cache(maxsize=256)
def _bits(number: float, dtype: torch.dtype) -> int:
    if not dtype.is_floating_point:
        return 1
    with torch.device("cpu"):
        value = torch.tensor(rounded(number, dtype), dtype=torch.float64).to(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return int(value.view(integer)) & ((1 << 8 * dtype.itemsize) - 1)


def rounded(number: float, dtype: torch.dtype) -> float:
    """``number`` rounded once to ``dtype``; integer spikes weigh 1 inside the kernels."""
    if number == 1.0 or not dtype.is_floating_point:
        return 1.0
    if dtype == torch.float64:
        return number
    # Without tensors: torch.compile follows this.
    digits, smallest = {
        torch.float32: (24, -149),
        torch.float16: (11, -24),
        torch.bfloat16: (8, -133),
    }[dtype]
    if number == 0 or not math.isfinite(number):
        return number
    exponent = max(math.frexp(number)[1] - digits, smallest)
    value = math.ldexp(round(math.ldexp(number, -exponent)), exponent)
    return value if abs(value) <= torch.finfo(dtype).max else math.copysign(math.inf, number)


def number(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        TypeError: unless it is a number (Python's or NumPy's; not bool, not a string).
        ValueError: if it is NaN.
    """
    if isinstance(value, (bool, str, bytes, np.bool_)) or not hasattr(value, "__float__"):
        allowed = "a number" if name == "v_reset" else "a number and a tensor"
        raise TypeError(
            f"{name}={value!r} is of type {type(value).__name__}; allowed are {allowed}"
        )
    value = float(value)
    if math.isnan(value):
        raise ValueError(f"{name} is NaN; it must be a number")
    return value


def check_local(name: str, value: Tensor) -> None:
    """Raises TypeError for a DTensor: kernels would read the shard of this rank as the whole."""
    if torch.compiler.is_compiling() or type(value).__name__ != "DTensor":
        return
    raise TypeError(
        f"{name} is a DTensor, of which this rank may hold only a part. In a network that "
        "fully_shard took apart call the module that it was applied to, not one inside it; "
        f"elsewhere pass {name}.full_tensor(), on every rank"
    )


def check_real(name: str, value: Tensor) -> None:
    """Raises TypeError for complex and bool tensors, and for a DTensor."""
    if type(value) is not Tensor:
        check_local(name, value)
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are real numbers")


def check_threshold(
    value: Any, name: str = "v_threshold", dtype: torch.dtype = torch.float32
) -> None:
    """Raises ValueError unless every threshold, rounded to the state of ``dtype``, is positive.

    It must be finite as well. CUDA tensors are not looked at: that would wait for the device at
    every call.
    """
    state = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.numel() == 0:
            return
        held = value.detach()
        held = held.to(state) if held.dtype == torch.float64 != state else held
        bad = ~((held > 0) & torch.isfinite(held)).reshape(-1)
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            given = value.detach().reshape(-1)[i].item()
            raise ValueError(
                f"{name} must be positive and finite; element {i} of {value.numel()} is "
                f"{given}{_becomes(given, state)}"
            )
    elif not 0.0 < rounded(value, state) < math.inf:
        raise ValueError(f"{name}={value!r} must be positive and finite{_becomes(value, state)}")


def _becomes(value: float, state: torch.dtype) -> str:
    """What rounding made of a value that was fine before."""
    if not 0.0 < value < math.inf:
        return ""
    return f"; in {str(state).removeprefix('torch.')} it is {rounded(value, state)}"
