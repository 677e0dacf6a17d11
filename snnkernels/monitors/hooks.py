"""Hooks of monitors, and what watched neurons are made to store meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from ..neurons import IFNode

if TYPE_CHECKING:
    from .base import Monitor

__all__ = ["Hook", "flags_before", "unwant", "unwatched", "want"]

# {node: {attribute: (monitors that want it True, what it was)}}
_WANTED: WeakKeyDictionary[IFNode, dict[str, tuple[int, bool]]] = WeakKeyDictionary()


def flags_before(node: IFNode) -> dict[str, bool]:
    """What a node is to store when nobody watches it, of what monitors made it store."""
    return {flag: before for flag, (_, before) in _WANTED.get(node, {}).items()}


def want(node: IFNode, flags: Iterable[str]) -> None:
    """Make a node store what ``flags`` say, for one monitor more."""
    wanted = _WANTED.setdefault(node, {})
    for flag in flags:
        users, before = wanted.get(flag, (0, getattr(node, flag)))
        wanted[flag] = (users + 1, before)
        setattr(node, flag, True)


def unwant(node: IFNode, flags: Iterable[str]) -> None:
    """Undo one :func:`want`; what was stored for the last of the monitors goes."""
    wanted = _WANTED.get(node, {})
    for flag in flags:
        users, before = wanted.pop(flag, (1, False))
        if users > 1:
            wanted[flag] = (users - 1, before)
        else:
            _store(node, {flag: before})


@contextmanager
def unwatched(net: nn.Module) -> Iterator[None]:
    """Inside this context no monitor sees the neurons of ``net``, and they store nothing for one.

    For calls that are not the user's: tracers run a network on tensors without numbers.
    """
    before: list[tuple[IFNode, dict[str, bool], list[tuple[Any, dict[int, Any]]]]] = []
    for node in net.modules():
        if isinstance(node, IFNode) and _WANTED.get(node):
            hooks: list[Any] = [node._forward_pre_hooks, node._forward_hooks]
            flags = {flag: bool(getattr(node, flag)) for flag in _WANTED[node]}
            before.append((node, flags, [(held, dict(held)) for held in hooks]))
            for flag, value in flags_before(node).items():
                setattr(node, flag, value)
            for held in hooks:
                for key in [key for key, hook in held.items() if isinstance(hook, Hook)]:
                    del held[key]
    try:
        yield
    finally:
        for node, flags, kept in before:
            for flag, value in flags.items():
                setattr(node, flag, value)
            for held, entries in kept:
                held.clear()
                held.update(entries)


class Hook:
    """A method of a monitor as a hook; in copies of the network, which store nothing, none."""

    def __init__(
        self,
        monitor: Monitor[Any] | None,
        method: str,
        layer: str,
        before: dict[str, bool] | None = None,
    ) -> None:
        self.monitor, self.method, self.layer, self.before = monitor, method, layer, before

    def __call__(self, node: IFNode, *call: Any) -> None:
        """Tell the monitor of a call; in a copy, make the node store what it did before."""
        if self.monitor is not None:
            getattr(self.monitor, self.method)(self.layer, node, *call)
        elif self.before:
            _store(node, self.before)
            self.before = None

    def __reduce__(self) -> tuple[Any, ...]:
        before = self.before
        if self.monitor is not None and self.method == "_before":
            before = flags_before(self.monitor._nodes[self.layer])
        return Hook, (None, self.method, self.layer, before)


def _store(node: IFNode, flags: dict[str, bool]) -> None:
    for flag, value in flags.items():
        setattr(node, flag, value)
        if not value:  # else what is stored is the user's
            setattr(node, flag.removeprefix("store_"), None)
