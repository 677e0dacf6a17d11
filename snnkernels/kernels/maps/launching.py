"""What every small kernel does around its launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Size, Tensor

from .. import backends, maps_params, operands

# Kept for the life of the process: its end would unregister the operators.
_LIBRARY = torch.library.Library("snnkernels", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)


def operator(
    schema: str, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as an operator; calls of the result go through it where that matters."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        # Gradients come from the autograd.Function around the operator: a call that bypasses it
        # fails loudly in backward.
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"snnkernels::{name}", fake)
        dispatched = getattr(torch.ops.snnkernels, name).default

        @wraps(run)
        def call(first: Tensor, *rest: Any) -> Any:
            if (
                torch.compiler.is_compiling()
                or type(first) not in _PLAIN
                or torch._C._len_torch_dispatch_stack()
            ):
                return dispatched(first, *rest)
            with torch.no_grad():
                return run(first, *rest)

        return call

    return register


def kernels_for(device: torch.device) -> backends.Kernels | None:
    """What runs on a device; None: the reference."""
    kernels = backends.choose(device)
    return None if kernels is None or kernels.map is None else kernels


def launch(kernels: backends.Kernels, name: str, device: torch.device, **values: Any) -> None:
    """Runs the kernel ``name`` with a struct of ``values`` (:mod:`..maps_params`)."""
    assert kernels.map is not None
    kernels.map(name, maps_params.RECORDS[name].pack(**values), device)


def dense(x: Tensor) -> Tensor:
    """``x`` contiguous and aligned to its element size."""
    x = x.contiguous()
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def pointer(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


class Shared:
    """A threshold or amplitude as kernels read it; keeps its memory alive."""

    def __init__(self, value: Tensor | None, number: float, shape: Size, dtype: torch.dtype):
        if value is None:
            self.packed: tuple[int, int, int, float] = (0, 1, 1, number)
        else:
            self.tensor, inner, count = operands.share(value.detach(), shape, dtype)
            self.packed = (self.tensor.data_ptr(), inner, count, 0.0)


def filled(x: Tensor, value: Tensor | None, number: float, dtype: torch.dtype) -> Tensor:
    """The same as a tensor, for the reference; rounded before filling, which refuses overflow."""
    if value is not None:
        return value.detach().to(dtype)
    return x.new_full((), operands.rounded(number, dtype), dtype=dtype)
