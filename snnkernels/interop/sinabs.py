"""Sinabs: what :func:`snnkernels.patch` and :func:`snnkernels.patched` do with it.

A patched layer changes its class to a subclass of its own: ``v_mem``, ``reset_states``,
``state_dict`` (which holds the state) and ``isinstance`` work as before. What is the same and what
is not: :mod:`.sinabs_run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from . import sinabs_run
from .adapters import Adapter, Refused
from .checks import imported
from .swaps import Swap

__all__ = ["ADAPTER"]

_WHY = {
    "ALIF": "its threshold adapts",
    "ALIFRecurrent": "its threshold adapts, and it is recurrent",
    "IAFRecurrent": "it is recurrent: a step needs the spikes of the one before",
    "LIFRecurrent": "it is recurrent: a step needs the spikes of the one before",
    "ExpLeak": "it gives membranes, not spikes",
    "ExpLeakSqueeze": "it gives membranes, not spikes",
}


class Sinabs(Adapter):
    """Sinabs 3: IAF, IAFSqueeze, LIF and LIFSqueeze."""

    library = "sinabs"
    pip = "sinabs"

    def recognises(self, module: nn.Module) -> bool:
        """See :class:`.Adapter`."""
        return any(
            c.__module__.startswith("sinabs.layers") and c.__name__ in ("LIF", "ALIF")
            for c in type(module).__mro__
        )

    def replace(self, module: Any, path: str) -> type[nn.Module]:
        """See :class:`.Adapter`."""
        cls = type(module)
        fused = import_module(f"{__package__}.sinabs_nodes").FUSED
        if cls not in fused:
            if not cls.__module__.startswith("sinabs."):
                raise Refused(f"{cls.__name__} derives from a class of Sinabs and may differ")
            raise Refused(_WHY.get(cls.__name__, "there is no kernel for this neuron"))
        if "forward" in module.__dict__:
            raise Refused("this one has a forward of its own")
        sinabs_run.check(module)
        return fused[cls]

    def hook(self) -> AbstractContextManager[None]:
        """``sinabs.layers.functional.lif_forward``."""
        imported("sinabs.layers", self)
        return _HOOK()

    @contextmanager
    def in_tests(self) -> Iterator[None]:
        """See :class:`.Adapter`: their layers have the forward pass of ours.

        Not classes: their tests unpickle layers and look at their type.
        """
        with self.hook(), _FORWARD():
            yield


def _functions() -> Iterable[tuple[Any, str, Callable[[Any], Any]]]:
    # IAF and LIF look it up in the package at every call.
    yield import_module("sinabs.layers").functional, "lif_forward", sinabs_run.lif_forward


def _forwards() -> Iterable[tuple[Any, str, Callable[[Any], Any]]]:
    # All others inherit it.
    yield import_module("sinabs.layers").LIF, "forward", _forward


def _forward(theirs: Any) -> Any:
    nodes = import_module(f"{__package__}.sinabs_nodes")

    def forward(self: Any, input_data: Any) -> Any:
        if type(self) not in nodes.FUSED:
            return theirs(self, input_data)
        return nodes.run(self, input_data, theirs)

    return forward


_HOOK = Swap(_functions)
_FORWARD = Swap(_forwards)
ADAPTER = Sinabs()
