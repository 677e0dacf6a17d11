"""Modules that SpikingJelly takes for its own, where it is loaded.

Its helpers look at classes: ``ann2snn`` converts only what is a ``StepModule``, ``reset_net`` and
``set_step_mode`` complain about what is no ``MemoryModule``. A compat node that is made while
SpikingJelly is loaded is therefore of a class that derives from that one too. It behaves as it
always does; nothing is imported; pickles name the plain class and load anywhere. Only modules that
are there for SpikingJelly's users do this: the classes of all others are what they are, whatever
else is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["Between", "join"]

_BASE = "spikingjelly.activation_based.base"
_made: dict[tuple[type, type], type] = {}


class Between:
    """Stands before SpikingJelly's class in the order of methods."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Theirs does not know recurse.
        return nn.Module._apply(self, fn, recurse)  # type: ignore[arg-type]


def join(node: nn.Module) -> None:
    """Makes a module that is being made an instance of SpikingJelly's ``MemoryModule`` too.

    Only where SpikingJelly is loaded. To be called first of all in ``__init__``.
    """
    theirs = getattr(sys.modules.get(_BASE), "MemoryModule", None)
    cls = type(node)
    if theirs is None or issubclass(cls, theirs):
        return
    if (cls, theirs) not in _made:

        def __reduce_ex__(self: Any, protocol: Any) -> Any:
            state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
            return _new, (cls,), state

        names = ("__module__", "__qualname__", "__doc__")
        body = {name: getattr(cls, name) for name in names}
        body["__reduce_ex__"] = __reduce_ex__
        # Another thread may have made it meanwhile.
        _made.setdefault((cls, theirs), type(cls.__name__, (cls, Between, theirs), body))
    object.__setattr__(node, "__class__", _made[cls, theirs])


def _new(cls: Any) -> Any:
    node = cls.__new__(cls)
    join(node)
    return node
