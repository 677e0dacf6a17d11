"""What monitors share: runs, limits, records."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.backends import outside
from ..neurons import IFNode
from ..packed import PackedSpikes
from .hooks import Hook, unwant, want

__all__ = ["Monitor", "Records", "time_first"]

_Record = TypeVar("_Record", bound="PackedSpikes | Tensor")
_Self = TypeVar("_Self", bound="Monitor[Any]")


class Records(Mapping[str, Any]):
    """``{layer: record}``, put together when it is looked up."""

    def __init__(self, monitor: Monitor[Any], last: bool) -> None:
        self._monitor, self._last = monitor, last

    def __getitem__(self, layer: str) -> Any:
        runs = self._monitor._of(layer)
        if not self._last:
            return [self._monitor._join(run) for run in runs]
        if not runs:
            raise KeyError(
                f"layer {layer!r} did not call its IFNode while it was watched. (Layers of the "
                "methods parallel, ttfs, bit_serial, multi_threshold and dsr have other ways to "
                "spike: snnkernels.metrics.firing_rates counts those)"
            )
        return self._monitor._join(runs[-1])

    def __iter__(self) -> Iterator[str]:
        return (n for n, runs in self._monitor._runs.items() if runs or not self._last)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name!r}: ...' for name in self)}}}"


class Monitor(Generic[_Record]):
    """Hooks in, hooks out, runs, limits."""

    def __init__(
        self, net: nn.Module, layers: Iterable[str] | None, every: int, max_bytes: int | None
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        for name, value in (("every", every), ("max_bytes", max_bytes)):
            if name == "max_bytes" and value is None:
                continue
            if type(value) is not int:
                raise TypeError(f"{name}={value!r} must be an int")
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self._nodes = _watched(net, layers)
        self.every, self.max_bytes = every, max_bytes
        self.full = False
        self.enabled = True
        self.nbytes = 0
        self._runs: dict[str, list[list[Any]]] = {}
        self._seen: dict[str, int] = {}
        self._starts: dict[str, Any] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.clear()
        try:
            for name, node in self._nodes.items():
                self._attach(name, node)
        except BaseException:
            self.remove()
            raise

    def _flags(self, node: IFNode) -> tuple[str, ...]:
        """The attributes of the node that have to be True."""
        raise NotImplementedError

    def _taken(self, node: IFNode, args: Any, kwargs: Any, carried: bool, v: Any) -> _Record | None:
        """What a call, which began with the membrane ``v``, leaves to be kept."""
        raise NotImplementedError

    def _add(self, run: list[Any], record: _Record) -> int:
        """Adds a record to a run and returns how many bytes longer it is."""
        run.append(record)
        return record.nbytes

    def _join(self, run: list[Any]) -> _Record:
        raise NotImplementedError

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the watched layers, in the network's order."""
        return tuple(self._nodes)

    def _attach(self, layer: str, node: IFNode) -> None:
        want(node, self._flags(node))
        self._handles += [
            node.register_forward_pre_hook(Hook(self, "_before", layer), with_kwargs=True),
            node.register_forward_hook(Hook(self, "_after", layer), with_kwargs=True),
        ]

    def _before(self, layer: str, node: IFNode, args: Any, kwargs: Any) -> None:
        self._starts[layer] = (node._carried, node._v)

    def _after(self, layer: str, node: IFNode, args: Any, kwargs: Any, output: Any) -> None:
        # Not kept: the membrane holds the graph of the call before.
        goes_on, v = self._starts.pop(layer, (False, None))
        if not self.enabled or self.full:
            return
        runs = self._runs[layer]
        same_run = goes_on and self._seen[layer] > 0
        if not same_run:
            self._seen[layer] += 1
        if (self._seen[layer] - 1) % self.every:
            return
        with torch.no_grad():
            record = self._taken(node, args, kwargs, goes_on, v)
        if record is None:
            return
        if same_run and runs and runs[-1] and record.shape[1:] != runs[-1][0].shape[1:]:
            same_run = False
        size = record.nbytes
        if self.max_bytes is not None and self.nbytes + size > self.max_bytes:
            self.full = True
            warnings.warn(
                f"{type(self).__name__} holds {self.nbytes} bytes and stops at layer {layer!r}: "
                f"{size} more would pass max_bytes={self.max_bytes}. Read and clear() it more "
                "often, watch fewer layers=, or one run in every=",
                RuntimeWarning,
                stacklevel=outside(),
            )
            return
        if not same_run or not runs:
            runs.append([])
        self.nbytes += self._add(runs[-1], record)

    def _of(self, layer: str) -> list[list[Any]]:
        if layer not in self._runs:
            raise KeyError(f"layer {layer!r} is not watched; watched are {', '.join(self._nodes)}")
        return self._runs[layer]

    def enable(self) -> None:
        """Records again after :meth:`disable`."""
        if not self._handles:
            raise RuntimeError(f"this {type(self).__name__} was removed; make a new one")
        self.enabled = True

    def disable(self) -> None:
        """Stops recording; what is recorded stays, the hooks too, and cost next to nothing."""
        self.enabled = False

    def clear(self) -> None:
        """Forgets all records; the next call begins a run."""
        self._runs = {name: [] for name in self._nodes}
        self._seen = dict.fromkeys(self._nodes, 0)
        self._starts.clear()
        self.full, self.nbytes = False, 0

    def remove(self) -> None:
        """Takes the hooks out and leaves the neurons as they were; records can still be read."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._starts.clear()
        for node in self._nodes.values():
            unwant(node, self._flags(node))
        self.enabled = False

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if not self._handles else "on" if self.enabled else "off"
        return (
            f"{type(self).__name__}({len(self._nodes)} layers, {self.nbytes} bytes, {state}"
            f"{', full' if self.full else ''})"
        )


def time_first(rows: Tensor, node: IFNode, args: Any, kwargs: Any) -> Tensor:
    """What a call returned in the node's layout as ``[T, *shape]``."""
    if node.step_mode == "s":
        return rows[None]
    if node.layout == "N,T":
        return rows.transpose(0, 1)
    if "*" not in node.layout:
        return rows
    T = args[1] if len(args) > 1 else kwargs.get("T")
    T = node.T if T is None else T
    if node.layout == "T*N":
        return rows.unflatten(0, (T, -1))
    return rows.unflatten(0, (-1, T)).transpose(0, 1)


def _watched(net: nn.Module, layers: Iterable[str] | None) -> dict[str, IFNode]:
    """The neurons by name: the ANN's where a converted layer has one, else their path."""
    found: dict[str, IFNode] = {}
    for path, module in net.named_modules():
        if not isinstance(module, IFNode):
            continue
        parent = net.get_submodule(path.rpartition(".")[0])
        label = getattr(parent, "label", None)
        name = label if isinstance(label, str) and label not in found else path
        found[name or type(module).__name__] = module
    if not found:
        raise ValueError(
            f"{type(net).__name__} holds no snnkernels.IFNode or LIFNode to watch (watch a "
            "converted network itself, not the plan that lower() made of it)"
        )
    if layers is None:
        return found
    asked = [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in asked if name not in found]
    if unknown:
        raise ValueError(f"layers names {unknown[0]!r}; there are {', '.join(found)}")
    return {name: node for name, node in found.items() if name in asked}
