"""What :func:`snnkernels.patch` is told about a library: an adapter, found by the library's name.

An adapter says what becomes of a neuron in one of two ways. A *class*: the module stays the very
same object and changes its class to a subclass that overrides the arithmetic, so that references,
hooks, state, device and training flag stay by construction (``torch.nn.utils.parametrize`` does
the same). Or a *module* that takes its place in every parent.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

__all__ = ["Adapter", "Change", "Refused", "adapter_of", "known", "register"]


class Refused(Exception):
    """Raised by an adapter: the module stays as it is, for the reason given."""


@dataclass
class Change:
    """What is to become of a module.

    Attributes:
        now: a subclass of the module's class (the module stays and changes its class), or a module
            to take its place.
        note: a remark for the report.
        attributes: for a class: what the module gets beside it until it is unpatched, not as
            submodules, parameters or buffers.
        helper: belongs to a neuron beside it: no line in the report, and not counted.
    """

    now: nn.Module | type[nn.Module]
    note: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    helper: bool = False


class Adapter:
    """What :func:`patch` knows about one library. See :func:`register`.

    Attributes:
        library: its name, also the top-level package of its classes.
        pip: what ``pip install`` is told.
    """

    library: str = ""
    pip: str = ""

    def recognises(self, module: nn.Module) -> bool:
        """Whether ``module`` is a neuron of the library, or of a class that derives from one.

        What is recognised gets a line in the report; nothing below it is looked at.
        """
        raise NotImplementedError

    def replace(self, module: nn.Module, path: str) -> Change | nn.Module | type[nn.Module]:
        """What becomes of a neuron. It must not change the neuron.

        Args:
            module: a module that ``recognises`` accepts.
            path: where it is in the model.

        Raises:
            Refused: with the reason, where the numbers would not be the same.
        """
        raise NotImplementedError

    def groups(self, model: nn.Module) -> Iterable[dict[nn.Module, Change]]:
        """Modules of ``model`` patched together, as classes, before ``replace`` sees any of them.

        Such a module need not be one that ``recognises`` accepts.
        """
        return ()

    def restore(self, module: nn.Module, ours: nn.Module) -> None:
        """Gives the original ``module``, for which ``ours`` stood, what changed: state, device.

        Not called where only the class was changed: there is nothing to carry.
        """
        module.train(ours.training)

    def hook(self) -> AbstractContextManager[Any]:
        """A context in which functions of the library are ours, for :func:`patched`."""
        raise NotImplementedError

    def in_tests(self) -> AbstractContextManager[Any]:
        """As :meth:`hook`, with classes swapped too, for the library's own tests."""
        return self.hook()


# Library -> the module here that has an ADAPTER; imported when a model or the user names it.
_BUILT_IN: dict[str, str] = {
    "spikingjelly": "spikingjelly", "sinabs": "sinabs", "norse": "norse",
}  # fmt: skip
_ADAPTERS: dict[str, Adapter] = {}


def register(adapter: Adapter) -> None:
    """Adds an adapter, or replaces the one for the same library.

    Args:
        adapter: an :class:`Adapter` with a ``library``.

    Raises:
        TypeError: not an adapter.
        ValueError: it names no library.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter={adapter!r} is not a snnkernels.interop.Adapter")
    if not adapter.library:
        raise ValueError(f"{type(adapter).__name__}.library names no library")
    _ADAPTERS[adapter.library] = adapter


def adapter_of(library: str) -> Adapter:
    """The adapter of a library.

    Raises:
        ValueError: there is none.
    """
    if library not in _ADAPTERS:
        if library not in _BUILT_IN:
            names = ", ".join(map(repr, sorted(known())))
            raise ValueError(f"library={library!r} is unknown; known are {names}")
        register(import_module(f"{__package__}.{_BUILT_IN[library]}").ADAPTER)
    return _ADAPTERS[library]


def known() -> set[str]:
    """The libraries there are adapters for."""
    return {*_BUILT_IN, *_ADAPTERS}
