"""Monitors: what the neurons of any network fire, and where their membranes are, call by call.

A monitor hooks into every :class:`snnkernels.IFNode` and :class:`snnkernels.LIFNode` of a network
(converted ones included) and changes none of its numbers, whatever the neurons return. What it
keeps is detached from gradients. Calls inside a ``torch.compile`` graph are not seen, nor layers of
methods that spike in other ways (``parallel``, ``ttfs``, ``bit_serial``, ``multi_threshold``,
``dsr``), whose spikes :mod:`snnkernels.metrics` counts. A plan whose network is watched runs it.

Calls between two resets are one run in time: T calls of a single step each, or one call of T steps,
give the same record. A reset, a membrane set by hand or another neuron shape begins the next run.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .neurons import IFNode
from .packed import PackedSpikes

__all__ = ["SpikeMonitor", "VoltageMonitor"]

_Record = TypeVar("_Record", bound="PackedSpikes | Tensor")
_Self = TypeVar("_Self", bound="_Monitor[Any]")
_WORD = 32

# {node: {attribute: (monitors that want it True, what it was)}}
_WANTED: WeakKeyDictionary[IFNode, dict[str, tuple[int, bool]]] = WeakKeyDictionary()


def flags_before(node: IFNode) -> dict[str, bool]:
    """What a node is to store when nobody watches it, of what monitors made it store."""
    return {flag: before for flag, (_, before) in _WANTED.get(node, {}).items()}


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
                for key in [key for key, hook in held.items() if isinstance(hook, _Hook)]:
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


class _Hook:
    """A method of a monitor as a hook; in copies of the network, which store nothing, none."""

    def __init__(
        self,
        monitor: _Monitor[Any] | None,
        method: str,
        layer: str,
        before: dict[str, bool] | None = None,
    ) -> None:
        self.monitor, self.method, self.layer, self.before = monitor, method, layer, before

    def __call__(self, node: IFNode, *call: Any) -> None:
        if self.monitor is not None:
            getattr(self.monitor, self.method)(self.layer, node, *call)
        elif self.before:
            _store(node, self.before)
            self.before = None

    def __reduce__(self) -> tuple[Any, ...]:
        before = self.before
        if self.monitor is not None and self.method == "_before":
            before = flags_before(self.monitor._nodes[self.layer])
        return _Hook, (None, self.method, self.layer, before)


def _store(node: IFNode, flags: dict[str, bool]) -> None:
    for flag, value in flags.items():
        setattr(node, flag, value)
        if not value:
            setattr(node, flag.removeprefix("store_"), None)


class _Records(Mapping[str, Any]):
    """``{layer: record}``, put together when it is looked up."""

    def __init__(self, monitor: _Monitor[Any], last: bool) -> None:
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


class _Monitor(Generic[_Record]):
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
        return _nbytes(record)

    def _join(self, run: list[Any]) -> _Record:
        raise NotImplementedError

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the watched layers, in the network's order."""
        return tuple(self._nodes)

    def _attach(self, layer: str, node: IFNode) -> None:
        wanted = _WANTED.setdefault(node, {})
        for flag in self._flags(node):
            users, before = wanted.get(flag, (0, getattr(node, flag)))
            wanted[flag] = (users + 1, before)
            setattr(node, flag, True)
        self._handles += [
            node.register_forward_pre_hook(_Hook(self, "_before", layer), with_kwargs=True),
            node.register_forward_hook(_Hook(self, "_after", layer), with_kwargs=True),
        ]

    def _detach(self, node: IFNode) -> None:
        wanted = _WANTED.get(node, {})
        for flag in self._flags(node):
            users, before = wanted.pop(flag, (1, False))
            if users > 1:
                wanted[flag] = (users - 1, before)
            else:
                setattr(node, flag, before)
                if not before:  # else it is the user's
                    setattr(node, flag.removeprefix("store_"), None)

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
        size = _nbytes(record)
        if self.max_bytes is not None and self.nbytes + size > self.max_bytes:
            self.full = True
            warnings.warn(
                f"{type(self).__name__} holds {self.nbytes} bytes and stops at layer {layer!r}: "
                f"{size} more would pass max_bytes={self.max_bytes}. Read and clear() it more "
                "often, watch fewer layers=, or one run in every=",
                RuntimeWarning,
                stacklevel=2,
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
            self._detach(node)
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


class SpikeMonitor(_Monitor["PackedSpikes | Tensor"]):
    """Keeps the spikes of a network's neurons, one bit a neuron and step.

    ::

        with SpikeMonitor(net) as monitor:
            net(x)
        monitor.spikes["layer1"].unpack()  # [T, *shape]

    The neurons' kernel writes the bits beside whatever the network asks of it (spikes, counts,
    rates), so answers stay as they are. Neurons that fire more than once a step or with a sign
    (``max_spikes``, ``signed``) run a second time and leave uint8 or int8, 8 times as much.

    Args:
        net: a module that holds :class:`snnkernels.IFNode`; of a converted network layers are
            called as in the ANN, elsewhere by their path.
        layers: names of the layers to watch; all of them by default.
        every: keep one run in so many (the first, then every ``every``-th).
        max_bytes: where to stop, with a RuntimeWarning; None never stops.

    Attributes:
        nbytes: bytes held.
        full: whether ``max_bytes`` has stopped it.
        enabled: whether it records.

    Raises:
        TypeError: ``net`` is no module; ``every`` or ``max_bytes`` is no int.
        ValueError: no neurons in ``net``; ``layers`` names one that is not there; a limit below 1.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Iterable[str] | None = None,
        *,
        every: int = 1,
        max_bytes: int | None = 2**30,
    ) -> None:
        super().__init__(net, layers, every, max_bytes)

    @property
    def spikes(self) -> Mapping[str, PackedSpikes | Tensor]:
        """``{layer: spikes of its last run}``, ``[T, *shape]``, T counted since the reset.

        :class:`snnkernels.PackedSpikes`, whose :meth:`~snnkernels.PackedSpikes.unpack` gives the
        tensor (with the amplitude of the run's first call); uint8 or int8 tensors of whole numbers
        from neurons that are not binary.
        """
        return _Records(self, last=True)

    @property
    def runs(self) -> Mapping[str, list[PackedSpikes | Tensor]]:
        """``{layer: [spikes of each run kept]}``, the oldest first."""
        return _Records(self, last=False)

    def counts(self) -> dict[str, Tensor]:
        """``{layer: net spikes of each neuron in the last run}``, int32 ``[*shape]``."""
        return {
            name: s.count() if isinstance(s, PackedSpikes) else s.sum(0, dtype=torch.int32)
            for name, s in self.spikes.items()
        }

    def rates(self) -> dict[str, float]:
        """``{layer: spikes per neuron and step}`` over all runs kept.

        Spikes of -1 count as much as those of 1: it is how busy a layer is.
        """
        found = {}
        for name, runs in self._runs.items():
            fired = size = 0
            for record in (r for run in runs for r in run):
                if isinstance(record, PackedSpikes):
                    fired += int(record.count().sum())
                else:
                    fired += int(record.int().abs().sum())
                size += record.numel()
            if size:
                found[name] = fired / size
        return found

    def _flags(self, node: IFNode) -> tuple[str, ...]:
        return ("store_packed",) if _binary(node) else ()

    def _taken(
        self, node: IFNode, args: Any, kwargs: Any, carried: bool, v: Any
    ) -> PackedSpikes | Tensor | None:
        if _binary(node):
            return node.packed
        twin = copy.copy(node)  # shares everything but what is set here
        whole = torch.uint8 if node.signed is None else torch.int8
        twin.__dict__.update(
            output="spikes", spike_dtype=whole, amplitude=None, _v=v, _carried=carried,
            store_v_seq=False, store_count=False, store_charge_seq=False,
        )  # fmt: skip
        twin._buffers = {k: t for k, t in node._buffers.items() if k != "amplitude"}
        spikes = twin.forward(*args, **kwargs)
        return _time_first(spikes, node, args, kwargs)

    def _add(self, run: list[Any], record: PackedSpikes | Tensor) -> int:
        if not run or not isinstance(record, PackedSpikes) or run[-1].T + record.T > _WORD:
            return super()._add(run, record)
        # Single steps share words, or each would take a byte for its bit.
        before = run[-1]
        run[-1] = PackedSpikes.cat([before, record])
        return _nbytes(run[-1]) - _nbytes(before)

    def _join(self, run: list[Any]) -> PackedSpikes | Tensor:
        if len(run) == 1:
            record: PackedSpikes | Tensor = run[0]
            return record
        return PackedSpikes.cat(run) if isinstance(run[0], PackedSpikes) else torch.cat(run)


def _neurons_kept(neurons: Any) -> Any:
    if neurons is None or isinstance(neurons, slice):
        return neurons
    try:
        return [operator.index(i) for i in neurons]
    except TypeError:
        raise TypeError(f"neurons={neurons!r} must be a slice, indices (ints) or None") from None


class VoltageMonitor(_Monitor[Tensor]):
    """Keeps the membranes of a network's neurons after each step.

    Args:
        net: a module that holds :class:`snnkernels.IFNode`; layers are called as by
            :class:`SpikeMonitor`.
        layers: names of the layers to watch; all of them by default.
        at: ``"reset"``: as a step leaves them (``store_v_seq``); ``"charge"``: before it fires.
        neurons: what to keep of ``[*shape]`` flattened: a slice, or indices. All by default: 4
            bytes (float64: 8) a neuron and step, 32 times what :class:`SpikeMonitor` keeps.
        every: keep one run in so many (the first, then every ``every``-th).
        max_bytes: where to stop, with a RuntimeWarning; None never stops.

    Attributes:
        nbytes: bytes held.
        full: whether ``max_bytes`` has stopped it.
        enabled: whether it records.

    In training the neurons' ``save`` must be ``"recompute"``, which is the default.

    Raises:
        TypeError: ``net`` is no module; ``every`` or ``max_bytes`` is no int.
        ValueError: as :class:`SpikeMonitor`; ``at`` is neither.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Iterable[str] | None = None,
        *,
        at: str = "reset",
        neurons: slice | Iterable[int] | None = None,
        every: int = 1,
        max_bytes: int | None = 2**30,
    ) -> None:
        if at not in ("reset", "charge"):
            raise ValueError(f"at={at!r} is unknown; allowed are 'reset' and 'charge'")
        self.at = at
        self._keeps = _neurons_kept(neurons)
        super().__init__(net, layers, every, max_bytes)

    @property
    def v(self) -> Mapping[str, Tensor]:
        """``{layer: membranes of its last run}``, ``[T, *shape]`` or ``[T, neurons]``.

        float32, float64 from inputs of float64; T counted since the reset.
        """
        return _Records(self, last=True)

    @property
    def runs(self) -> Mapping[str, list[Tensor]]:
        """``{layer: [membranes of each run kept]}``, the oldest first."""
        return _Records(self, last=False)

    def _flags(self, node: IFNode) -> tuple[str, ...]:
        return ("store_v_seq",) if self.at == "reset" else ("store_charge_seq",)

    def _taken(self, node: IFNode, args: Any, kwargs: Any, carried: bool, v: Any) -> Tensor | None:
        trace = node.v_seq if self.at == "reset" else node.charge_seq
        if trace is None:
            return None
        trace = trace.detach()
        if node.step_mode == "m":
            trace = _time_first(trace, node, args, kwargs)
        if self._keeps is None:
            return trace
        # A copy, or the few neurons would keep all in memory.
        return trace.flatten(1)[:, self._keeps].clone()

    def _join(self, run: list[Any]) -> Tensor:
        return run[0] if len(run) == 1 else torch.cat(run)


def _binary(node: IFNode) -> bool:
    return node.max_spikes is None and node.signed is None


def _nbytes(record: Any) -> int:
    return int(record.nbytes)


def _time_first(rows: Tensor, node: IFNode, args: Any, kwargs: Any) -> Tensor:
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
