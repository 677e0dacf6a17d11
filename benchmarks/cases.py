"""One size, dtype and direction to measure, its input, and what is measured on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
Call = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Case:
    """T steps of N neurons."""

    T: int
    N: int
    dtype: str = "float32"
    device: str = "cpu"
    training: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of currents and spikes."""
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of a current."""
        return self.torch_dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of a membrane."""
        return 8 if self.dtype == "float64" else 4

    @property
    def nbytes(self) -> int:
        """Bytes of all currents."""
        return self.T * self.N * self.itemsize

    def input(self, seed: int = 0) -> torch.Tensor:
        """Currents ``[T, N]``; every second neuron's are multiples of 1/256.

        Those meet the threshold exactly now and then, so that an implementation which fires only
        above it shows.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.rand(self.T, self.N, device=self.device, generator=generator) * 1.2 - 0.2
        x[:, ::2] = (x[:, ::2] * 256).round() / 256
        return x.to(self.torch_dtype).requires_grad_(self.training)

    def __str__(self) -> str:
        what = "forward+backward" if self.training else "forward"
        return f"{what}, T={self.T}, N={self.N}, {self.dtype}"


@dataclass(frozen=True)
class Entry:
    """An implementation.

    ``make(case)`` returns the call to time, on one input, returning spikes first (training:
    the gradient of the input). ``counted(case, result)``: bytes it moves per neuron-step, None
    where that was not counted. ``differs(case)``: why its spikes may differ, empty where they must
    not. ``skip(case)``: why it is left out, empty where it is not.
    """

    name: str
    make: Callable[[Case], Call]
    counted: Callable[[Case, Any], float | None] = lambda case, result: None
    differs: Callable[[Case], str] = lambda case: ""
    skip: Callable[[Case], str] = lambda case: ""
    ours: bool = False
    compiles: bool = False
    tags: frozenset[str] = field(default_factory=frozenset)


def trained(forward: Callable[[Case], Call]) -> Callable[[Case], Call]:
    """Turns a forward pass into one forward and backward pass for the input's gradient."""

    def make(case: Case) -> Call:
        call = forward(case)
        shape = (case.T, case.N)
        generator = torch.Generator(case.device).manual_seed(1)
        grad = torch.randn(shape, device=case.device, generator=generator).to(case.torch_dtype)

        def run(x: torch.Tensor) -> tuple[torch.Tensor]:
            spikes = call(x)[0]
            weight = grad if grad.dtype == spikes.dtype else grad.to(spikes.dtype)
            return torch.autograd.grad(spikes, x, weight.view_as(spikes))

        return run

    return make
