"""Norse: what :func:`snnkernels.patch` and :func:`snnkernels.patched` do with it.

A patched module changes its class to a subclass of its own; state is passed in and returned as
before. What is the same and what is not: :mod:`.norse_run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

from torch import nn

from . import norse_run
from .adapters import Adapter, Refused
from .checks import imported
from .swaps import Swap

__all__ = ["ADAPTER"]

# Bases of Norse's neurons.
_BASES = ("SNN", "SNNCell", "SNNRecurrent", "SNNRecurrentCell")


class Norse(Adapter):
    """Norse 1: IAF and IAFCell."""

    library = "norse"
    pip = "norse"

    def recognises(self, module: nn.Module) -> bool:
        """See :class:`.Adapter`."""
        return any(
            c.__module__ == "norse.torch.module.snn" and c.__name__ in _BASES
            for c in type(module).__mro__
        )

    def replace(self, module: Any, path: str) -> type[nn.Module]:
        """See :class:`.Adapter`."""
        cls = type(module)
        fused = import_module(f"{__package__}.norse_nodes").FUSED
        if cls not in fused:
            if not cls.__module__.startswith("norse."):
                raise Refused(f"{cls.__name__} derives from a class of Norse and may differ")
            if "Recurrent" in cls.__name__:
                raise Refused("it is recurrent: a step needs the spikes of the one before")
            raise Refused("there is no kernel for this neuron")
        if "forward" in module.__dict__:
            raise Refused("this one has a forward of its own")
        step = import_module("norse.torch.module.iaf").iaf_feed_forward_step
        if module.activation is not step or module.activation_sparse is not None:
            raise Refused("its activation is not iaf_feed_forward_step")
        norse_run.check_parameters(module.p)
        return fused[cls]

    def hook(self) -> AbstractContextManager[None]:
        """``iaf_feed_forward_step``, and the forward passes of IAF and IAFCell."""
        imported("norse.torch", self)
        return _HOOK()


def _functions() -> Iterable[tuple[Any, str, Callable[[Any], Any]]]:
    nodes = import_module(f"{__package__}.norse_nodes")
    functional = import_module("norse.torch.functional.iaf")
    yield functional, "iaf_feed_forward_step", norse_run.feed_forward_step
    snn = import_module("norse.torch.module.snn")
    for base, theirs in ((snn.SNN, nodes.IAF), (snn.SNNCell, nodes.IAFCell)):
        yield base, "forward", _forward(theirs, nodes.FUSED[theirs])


def _forward(cls: Any, fused: Any) -> Callable[[Any], Any]:
    def make(theirs: Any) -> Any:
        def forward(self: Any, input_tensor: Any, state: Any = None) -> Any:
            if type(self) is not cls:
                return theirs(self, input_tensor, state)
            first = self.state_fallback(input_tensor) if state is None else state
            return fused.numbers(self, input_tensor, first, theirs)

        return forward

    return make


_HOOK = Swap(_functions)
ADAPTER = Norse()
