"""What a network takes: one tensor, or several inputs as one value that has a batch."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConversionError

__all__ = [
    "Inputs",
    "Ports",
    "as_given",
    "each",
    "joined",
    "leaves",
    "network_input",
    "parts_of",
    "tree_map",
]


def parts_of(value: Any) -> list[tuple[str, Any]] | None:
    """``(name, part)`` of a mapping, a dataclass, a tuple or a list; None: it has no parts."""
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in fields(value)]
    if isinstance(value, (tuple, list)):
        return [(str(i), part) for i, part in enumerate(value)]
    return None


def each(value: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of every part of a tuple (named ones too), list, mapping or dataclass."""
    if isinstance(value, Mapping):
        return {key: function(v) for key, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: function(getattr(value, f.name)) for f in fields(value)})
    parts = [function(v) for v in value]
    return value._make(parts) if hasattr(value, "_make") else type(value)(parts)


def tree_map(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """``function`` of every tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Inputs):
        return value.map(function)
    if parts_of(value) is None:
        return value
    return each(value, lambda v: tree_map(v, function))


def leaves(value: Any, name: str = "output") -> Iterator[tuple[str, Any]]:
    """What nested tuples, lists, mappings and dataclasses hold, tensors or not, with its name."""
    parts = parts_of(value)
    if parts is None:
        yield name, value
    else:
        for key, part in parts:
            yield from leaves(part, f"{name}.{key}")


class Inputs:
    """Several inputs of a network as one value; what batches are where there are several.

    Args:
        args: those given by position.
        named: those given by name. Values are tensors ``[B, *]``, or tuples, lists, dicts and
            dataclasses of such; before they are bound also constants (numbers, None, ...).

    ``len(inputs)`` is B, ``inputs[a:b]`` some of the samples, ``inputs.to(device)`` a copy there.
    """

    def __init__(self, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.args = args
        self.named = named

    def map(self, function: Callable[[Tensor], Any]) -> Inputs:
        """``function`` of every tensor."""
        args = tuple(tree_map(v, function) for v in self.args)
        return Inputs(args, {name: tree_map(v, function) for name, v in self.named.items()})

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        found = leaves((*self.args, *self.named.values()))
        return [value for _, value in found if isinstance(value, Tensor)]

    def to(self, device: torch.device) -> Inputs:
        """The same on ``device``."""
        return self.map(lambda t: t.to(device))

    def __len__(self) -> int:
        return next((t.shape[0] for t in self.tensors() if t.dim()), 0)

    def __getitem__(self, samples: slice | Tensor) -> Inputs:
        return self.map(lambda t: t[samples] if t.dim() else t)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of each tensor."""
        return tuple(tuple(t.shape) for t in self.tensors())

    @property
    def dtype(self) -> tuple[torch.dtype, ...]:
        """The dtype of each tensor."""
        return tuple(t.dtype for t in self.tensors())

    def __repr__(self) -> str:
        names = [*map(str, range(len(self.args))), *self.named]
        return f"Inputs({', '.join(names)}: {', '.join(map(str, self.shape))})"


def joined(batches: Sequence[Any]) -> Any:
    """Batches of the same inputs, tensors or :class:`Inputs`, as one."""
    if isinstance(batches[0], Tensor):
        return torch.cat(list(batches))
    columns = zip(*(batch.tensors() for batch in batches), strict=True)
    whole = iter([torch.cat(column) for column in columns])
    return batches[0].map(lambda t: next(whole))


def as_given(value: Any) -> Tensor | Inputs:
    """A tensor as it is; a tuple or list as inputs by position, a dict as inputs by name.

    Raises:
        TypeError: none of these.
    """
    if isinstance(value, (Tensor, Inputs)):
        return value
    if isinstance(value, Mapping):
        return Inputs((), dict(value))
    if isinstance(value, (tuple, list)):
        return Inputs(tuple(value), {})
    raise TypeError(
        "inputs must give a tensor, a tuple of the inputs by position or a dict of the inputs by "
        f"name; got {type(value).__name__}"
    )


def network_input(inputs: Inputs, name: str) -> Any:
    """The input called ``name``: a node of graphs that take several."""
    return inputs.named[name]


def _signature(net: nn.Module) -> inspect.Signature:
    """Of ``net.forward``, without ``*args``, ``**kwargs`` and annotations."""
    gone = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    kept = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in inspect.signature(net.forward).parameters.values()
        if p.kind not in gone
    ]
    return inspect.Signature(kept)


def _is_input(value: Any) -> bool:
    return any(isinstance(part, Tensor) for _, part in leaves(value))


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


@dataclass(frozen=True)
class Ports:
    """Which parameters of a network's forward are its inputs.

    Attributes:
        signature: of forward.
        names: the inputs, in its order.
        fixed: the other parameters and their values, which the graph holds as constants.
        packed: the graph takes one :class:`Inputs` (else the one input, a tensor).
    """

    signature: inspect.Signature
    names: tuple[str, ...]
    fixed: dict[str, Any]
    packed: bool

    @classmethod
    def single(cls) -> Ports:
        """One input."""
        one = inspect.Parameter("x", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return cls(inspect.Signature([one]), ("x",), {}, False)

    @classmethod
    def of(cls, net: nn.Module, first: Tensor | Inputs | None) -> Ports:
        """The inputs of ``net``: those in ``first``, a batch; without one, all required ones.

        Raises:
            ConversionError: ``net`` does not take them, or needs more.
        """
        signature, kind = _signature(net), type(net).__name__
        plain = list(signature.parameters)
        defaults = {n: p.default for n, p in signature.parameters.items()}
        required = [n for n in plain if defaults[n] is inspect.Parameter.empty]
        if not plain:
            raise ConversionError(
                f"{kind}.forward names no input (*args and **kwargs are not followed): wrap the "
                "network in a module whose forward names them"
            )
        given: dict[str, Any] = {}
        packed = False
        if isinstance(first, Inputs):
            try:
                given = dict(signature.bind(*first.args, **first.named).arguments)
            except TypeError as error:
                raise ConversionError(
                    f"the inputs given, {first}, do not suit {kind}.forward{signature}: {error}"
                ) from error
            names = [n for n in plain if n in given and _is_input(given[n])]
            if not names:
                raise ConversionError(f"there is no tensor in the inputs given to {kind}.forward")
            packed = len(names) > 1 or not isinstance(given[names[0]], Tensor)
        else:
            if len(required) > 1 and first is not None:
                raise ConversionError(
                    f"{kind}.forward takes {len(required)} required inputs {required}, but of a "
                    "loader's item only the first tensor is taken: pass inputs=, a function from "
                    "an item to all of them, by position or by name, such as "
                    f"inputs=lambda item: item[:{len(required)}]"
                )
            names = required or plain[:1]
            packed = len(names) > 1
        if "T" in names:
            raise ConversionError(
                f"{kind}.forward has an input called T, which is the number of steps of a "
                "converted network: rename it"
            )
        fixed = {n: given.get(n, defaults[n]) for n in plain if n not in names}
        return cls(signature, tuple(names), fixed, packed)

    def bind(self, x: Any) -> Any:
        """What the graph takes: a tensor, or :class:`Inputs` by name, in order.

        Raises:
            TypeError: inputs are missing, or the network does not have them.
            ValueError: an input that the graph holds as a constant has another value; batch sizes
                differ.
        """
        if isinstance(x, Tensor) and not self.packed:
            return x
        x = x if isinstance(x, Inputs) else Inputs((x,), {})
        try:
            given = dict(self.signature.bind_partial(*x.args, **x.named).arguments)
        except TypeError as error:
            raise TypeError(
                f"the converted network takes {', '.join(self.names)}: {error}"
            ) from None
        missing = [name for name in self.names if name not in given]
        if missing:
            raise TypeError(
                f"the converted network takes {', '.join(self.names)}; {', '.join(missing)} missing"
            )
        for name, value in given.items():
            if name not in self.names and not _equal(value, self.fixed[name]):
                raise ValueError(
                    f"the network was converted with {name}={self.fixed[name]!r} and cannot take "
                    f"another value: got {_short(value)}. Convert it with inputs that have it"
                )
        named = {name: given[name] for name in self.names}
        sizes = {}
        for name, value in leaves(named, "x"):
            if not isinstance(value, Tensor) or value.dim() == 0:
                raise ValueError(
                    f"{name[2:]} is {_short(value)}; inputs must be tensors [B, *], or tuples, "
                    "lists, dicts or dataclasses of such"
                )
            sizes[name[2:]] = value.shape[0]
        # Not by a set: sizes of an export are symbols, which have no hash.
        if any(size != next(iter(sizes.values())) for size in sizes.values()):
            raise ValueError(
                f"dimension 0 of every input is the batch, but the inputs have {sizes}. What all "
                "samples share is a buffer of the network"
            )
        return Inputs((), named) if self.packed else named[self.names[0]]

    def call(self, ann: nn.Module, x: Any) -> Any:
        """Call the ANN itself on what :meth:`bind` gave."""
        named = x.named if isinstance(x, Inputs) else {self.names[0]: x}
        args, kwargs = self.arguments(named)
        return ann(*args, **kwargs)

    def arguments(self, named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of a call of forward with the inputs ``named``."""
        bound = inspect.BoundArguments(self.signature, OrderedDict())
        values = {**self.fixed, **named}
        bound.arguments.update((n, values[n]) for n in self.signature.parameters)
        return bound.args, bound.kwargs


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r:.60}"
