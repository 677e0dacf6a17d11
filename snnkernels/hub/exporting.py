"""Converted networks as programs of ``torch.export``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..conversion.errors import ConversionError
from ..conversion.inputs import Inputs, as_given
from ..conversion.methods.ptl import PTLActivation
from ..conversion.network import ConvertedNetwork, _steps
from ..kernels import backends, maps, ops
from ..monitors import unwatched

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["export"]

_OPERATORS = ("snnkernels", "torch")


class _AtT(nn.Module):
    """A converted network at one T, its inputs by position."""

    def __init__(self, snn: ConvertedNetwork, T: int) -> None:
        super().__init__()
        self.snn, self.T = snn, T

    def forward(self, *inputs: Any) -> Any:
        """The network's answer."""
        return self.snn(**dict(zip(self.snn.inputs, inputs, strict=True)), T=self.T)


def _run_of(operator: Any) -> Callable[..., Any]:
    """What an operator of ours computes, traceable with the reference back end."""
    name = operator._schema.name.partition("::")[2]
    if name == "if_forward":
        return ops._if_forward
    return getattr(maps, name).__wrapped__


@torch.no_grad()
def export(
    snn: ConvertedNetwork,
    example: Any,
    *,
    T: int | None = None,
    dynamic_batch: bool = True,
    operators: str = "snnkernels",
    strict: bool = False,
) -> ExportedProgram:
    """``torch.export.export`` of a converted network at one T, for inference.

    The program answers as ``snn(x, T=T)`` does, for any batch. ``torch.export.save`` and ``load``
    keep it; ``torch._inductor.aoti_compile_and_package`` compiles it.

    Args:
        snn: of :func:`snnkernels.convert`.
        example: inputs, ``[B, *]`` with B of at least 2 for a dynamic batch; of several a tuple by
            position or a dict by name.
        T: number of steps; None: that of the conversion.
        dynamic_batch: the program takes any batch of at least 1, else that of ``example``.
        operators: ``"snnkernels"``: neurons are our operators, one launch each: a process that
            runs the program must have imported snnkernels. ``"torch"``: operators of torch alone,
            the T steps written out: it runs where snnkernels is not, slower; equal bits.
        strict: as for ``torch.export.export``.

    Returns:
        The program; ``program.module()(x)``.

    Raises:
        ConversionError: torch cannot export the network; says what it met.
        TypeError, ValueError: an argument is not allowed.
    """
    if not isinstance(snn, ConvertedNetwork):
        raise TypeError(f"snn must be a ConvertedNetwork, got {type(snn).__name__}")
    if operators not in _OPERATORS:
        raise ValueError(f"operators={operators!r} is unknown; allowed: {', '.join(_OPERATORS)}")
    steps = snn.T if T is None else _steps(T)
    given = snn._ports.bind(as_given(example))
    inputs = tuple(given.named.values()) if isinstance(given, Inputs) else (given,)
    tensors = (t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, Tensor))
    batch = next(tensors).shape[0]
    if dynamic_batch and batch < 2:
        raise ValueError(
            f"example has a batch of {batch}: torch.export takes 0 and 1 for constants. Give at "
            "least 2 samples, or pass dynamic_batch=False"
        )
    shapes: Any = None
    if dynamic_batch:
        batch_dim = torch.export.Dim.DYNAMIC
        dims = torch.utils._pytree.tree_map_only(Tensor, lambda t: {0: batch_dim}, inputs)
        shapes = (dims,)
    try:
        with quiet_torch(), unwatched(snn):
            program = torch.export.export(
                _AtT(snn, steps), inputs, dynamic_shapes=shapes, strict=strict
            )
            if operators == "torch":
                found = {n.target for n in program.graph.nodes if "snnkernels" in str(n.target)}
                with backends.use_backend("reference"):
                    program = program.run_decompositions({op: _run_of(op) for op in found})
    except Exception as error:
        raise ConversionError(
            f"torch.export cannot export this network: {type(error).__name__}: {error}. "
            + ("Try dynamic_batch=False. " if dynamic_batch else "")
            + "snn.save_pretrained keeps any network"
        ) from error
    finally:
        for _, layer in snn.neurons():
            if isinstance(layer, PTLActivation):
                layer.silent = None  # a fake tensor's
    return program


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Without what torch's exporters say to each other of functions that torch gives up."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|onnx|copyreg)")
        # Of one run (PTLActivation): written before it is read, every time.
        warnings.filterwarnings("ignore", message=r"The tensor attribute \S+\.silent was assigned")
        log = logging.getLogger("torch.onnx._internal.exporter._registration")
        level = log.level
        log.setLevel(logging.ERROR)  # that torchvision is not installed
        try:
            yield
        finally:
            log.setLevel(level)
