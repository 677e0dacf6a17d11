"""Tensors and modules of a network while it is written, and while it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .values import FormatError

__all__ = ["DTYPES", "Reader", "Writer"]

# dtypes that are stored, by what safetensors calls them.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class Writer:
    """Collects tensors and modules; one that occurs twice is written once.

    Attributes:
        tensors: contiguous copies by name, for the file of weights.
        about: what the graph says of each: shape, dtype, role, order of dimensions in memory.
        modules: what the graph says of each module, in order.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.modules: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}
        self._indices: dict[int, int] = {}
        self._kept: list[Any] = []  # so that ids stay theirs

    def tensor(self, tensor: Tensor, wanted: str) -> str:
        """The name under which ``tensor`` is stored: ``wanted``, unless it was stored before."""
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES.values() or tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(
                f"{wanted} is a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}; "
                f"dense ones of {', '.join(DTYPES.values())} can be saved"
            )
        name, count = wanted, 1
        while name in self.tensors:
            count += 1
            name = f"{wanted}_{count}"
        role = "buffer"
        if isinstance(tensor, nn.Parameter):
            role = "parameter" if tensor.requires_grad else "frozen"
        about: dict[str, Any] = {"shape": list(tensor.shape), "dtype": dtype, "role": role}
        order = _order(tensor)
        if order is not None:
            about["order"] = order
        self.about[name] = about
        # A copy: views of one memory are tensors of their own in the file.
        self.tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.tensors[name].copy_(tensor.detach())
        self._names[id(tensor)] = name
        self._kept.append(tensor)
        return name

    def module(self, module: nn.Module, write: Callable[[], dict[str, Any]]) -> int:
        """The number of ``module``; ``write`` says what it is when it is met first."""
        if id(module) not in self._indices:
            entry = write()
            self._kept.append(module)
            self._indices[id(module)] = len(self.modules)
            self.modules.append(entry)
        return self._indices[id(module)]

    def index_of(self, module: nn.Module) -> int | None:
        """The number of a module that was met already."""
        return self._indices.get(id(module))


def _order(tensor: Tensor) -> list[int] | None:
    """The dimensions from the slowest in memory to the fastest; None: as they are counted.

    Libraries choose algorithms, and with them the order of sums, by how memory lies.
    """
    if tensor.is_contiguous() or tensor.dim() < 2:
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    return order if tensor.permute(order).is_contiguous() else None


class Reader:
    """Tensors by name, checked against what the graph says of them."""

    def __init__(
        self, about: Any, get: Callable[[str], Tensor], there: dict[str, Any], where: str
    ) -> None:
        self.where = where
        if not isinstance(about, dict):
            raise self.fail("tensors", about, "an object")
        missing, more = sorted(set(about) - set(there)), sorted(set(there) - set(about))
        if missing or more:
            raise FormatError(
                f"{where}: tensors: the file of weights "
                + (f"lacks {missing[:4]}" if missing else f"has {more[:4]} beside those named")
                + "; the two do not belong together"
            )
        self.about, self._get, self._there = about, get, there
        self._made: dict[str, Tensor] = {}
        self.modules: list[nn.Module] = []

    def fail(self, field: str, value: Any, allowed: str) -> FormatError:
        """The error for ``value`` in ``field``."""
        return FormatError(f"{self.where}: {field}: got {str(value)[:80]!r}; allowed: {allowed}")

    def exactly(self, given: dict[str, Any], names: Iterable[str], field: str) -> None:
        """Refuse what lacks a field, which would silently be its default, or has another."""
        names = set(names)
        if set(given) != names:
            lacks, more = sorted(names - set(given)), sorted(map(str, set(given) - names))
            got = f"no {', '.join(lacks)}" if lacks else ", ".join(more)
            raise self.fail(field, got, f"exactly {', '.join(sorted(names))}")

    def tensor(self, name: Any) -> Tensor:
        """The tensor or parameter called ``name``; the same object each time."""
        if not isinstance(name, str) or name not in self.about:
            raise self.fail("tensor", name, "the name of a tensor under 'tensors'")
        if name not in self._made:
            about = self.about[name]
            if not isinstance(about, dict):
                raise self.fail(f"tensors.{name}", about, "an object")
            shape, dtype = self._there[name]
            if about.get("shape") != shape or about.get("dtype") != dtype:
                raise self.fail(
                    f"tensors.{name}",
                    f"{about.get('dtype')}{about.get('shape')}",
                    f"{dtype}{shape}, which is what the file of weights holds",
                )
            self._made[name] = self._tensor(name, about)
        return self._made[name]

    def _tensor(self, name: str, about: dict[str, Any]) -> Tensor:
        role, order = about.get("role"), about.get("order")
        if role not in ("parameter", "frozen", "buffer"):
            raise self.fail(f"tensors.{name}.role", role, "parameter, frozen, buffer")
        # A copy in memory of its own: aligned as torch does it, and free of the file.
        tensor = self._get(name).clone(memory_format=torch.contiguous_format)
        if order is not None:
            if not isinstance(order, list) or sorted(map(str, order)) != sorted(
                map(str, range(tensor.dim()))
            ):
                raise self.fail(f"tensors.{name}.order", order, "an order of its dimensions")
            back = [order.index(d) for d in range(tensor.dim())]
            tensor = tensor.permute(order).contiguous().permute(back)
        if role == "buffer":
            return tensor
        if role == "parameter" and not tensor.is_floating_point():
            raise self.fail(f"tensors.{name}.role", role, f"buffer or frozen for {tensor.dtype}")
        return nn.Parameter(tensor, requires_grad=role == "parameter")

    def module(self, index: Any, field: str) -> nn.Module:
        """The module of that number."""
        if type(index) is not int or not 0 <= index < len(self.modules):
            raise self.fail(field, index, "the number of a module before it")
        return self.modules[index]
