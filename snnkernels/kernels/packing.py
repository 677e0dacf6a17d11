"""Operands as the kernels' structs hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operands
from .layouts import Layout
from .spec import Neuron

# A number 0 that nobody reads.
NONE = (0, 1, 1, 0.0)


def number(value: float) -> tuple[int, int, int, float]:
    """An Operand's fields for one number."""
    return (0, 1, 1, value)


def operand(
    tensor: Tensor | None, value: float, layout: Layout, shape: torch.Size, dtype: torch.dtype
) -> tuple[tuple[int, int, int, float], Tensor | None]:
    """An Operand's fields, and the tensor that must outlive the launch."""
    if tensor is None:
        return (0, 1, 1, value), None
    if layout.order is not None:
        tensor, shape = layout.view(tensor), torch.Size(layout.neurons(shape))
    kept, inner, elements = operands.share(tensor, shape, dtype)
    return (kept.data_ptr(), inner, elements, 0.0), kept


def more_operands(
    neuron: Neuron, layout: Layout, shape: torch.Size, dtype: torch.dtype
) -> tuple[list[Any], list[Tensor | None]]:
    """The fields of the four operands that only the general kernels read."""
    fields: list[Any] = []
    kept = []
    for tensor, value in zip(neuron[3:7], neuron[10:14], strict=True):
        packed, tensor = operand(tensor, value, layout, shape, dtype)
        fields += packed
        kept.append(tensor)
    return fields, kept
