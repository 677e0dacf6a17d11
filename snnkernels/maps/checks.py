"""What the arguments of the small kernels must be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor

from ..kernels import operands

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Number = float | int


def names(*dtypes: torch.dtype) -> str:
    """As errors spell them."""
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises TypeError unless ``value`` is a tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are {names(*dtypes)}")


def whole(name: str, value: Any, low: int, high: int) -> None:
    """Raises unless ``value`` is an integer from ``low`` to ``high``."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an int")
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is out of range; allowed are {low} to {high}")


def shared(
    name: str,
    value: Any,
    shape: Size,
    channel_dim: int | None,
    device: torch.device,
    held: torch.dtype | None,
) -> tuple[Tensor | None, float]:
    """``value`` as (tensor that broadcasts to ``shape``, 0.0) or (None, number).

    It must be positive and finite when rounded to ``held``; None: any value will do.
    """
    if channel_dim is not None and type(channel_dim) is not int:
        raise TypeError(f"channel_dim={channel_dim!r} must be an int or None")
    if not isinstance(value, Tensor):
        number = operands.number(name, value)
        if held is not None:
            positive(name, number, held)
        return None, number
    operands.check_real(name, value)
    if not value.dtype.is_floating_point:
        value = value.to(torch.float32)
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the input is on {device}")
    if held is not None:
        positive(name, value, held)
    return operands.for_broadcast(name, value, shape, channel_dim), 0.0


def readable(tensor: Tensor) -> bool:
    """Whether looking at the values waits for nobody."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def positive(name: str, value: Tensor | float, held: torch.dtype) -> None:
    """Raises ValueError unless all of it is positive and finite, also when rounded to ``held``."""
    if not isinstance(value, Tensor):
        rounded = operands.rounded(value, held)
        if not 0.0 < rounded < math.inf:
            what = "" if rounded == value else f"; in {names(held)} it is {rounded}"
            raise ValueError(f"{name}={value!r} must be positive and finite{what}")
        return
    if not readable(value) or not value.numel():
        return
    operands.check_threshold(value, name, held)
    if held.itemsize == 2:
        # The state holds all of them; the least and the largest tell for the narrower dtype.
        ends = torch.stack(value.detach().aminmax())
        for given, rounded in zip(ends.tolist(), ends.to(held).tolist(), strict=True):
            if not 0.0 < rounded < math.inf:
                raise ValueError(
                    f"{name} must be positive and finite; {given} is {rounded} in {names(held)}"
                )


def finite(name: str, value: Any, held: torch.dtype) -> float:
    """A number rounded to ``held``, in which it must be finite."""
    number = operands.number(name, value)
    rounded = operands.rounded(number, held)
    if math.isinf(rounded):
        what = "" if math.isinf(number) else f"; in {names(held)} it is {rounded}"
        raise ValueError(f"{name}={number!r} must be finite{what}")
    return rounded
