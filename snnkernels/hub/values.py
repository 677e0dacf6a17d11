"""Plain values of a graph as JSON and back: numbers, strings, tuples, slices, dtypes, nodes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["FormatError", "decode", "encode", "plain_name", "plain_path"]

_TEXT = re.compile(r"[\w ,.:;+*/()<>=|&%@#!?~^\[\]-]{0,200}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,3999}")
_PATH = re.compile(r"[A-Za-z0-9_]{1,2000}(\.[A-Za-z0-9_]{1,2000}){0,400}")
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"),
        *("uint8", "bool", "complex64", "complex128"),
    )
}
_FORMATS = {
    name: getattr(torch, name)
    for name in ("channels_last", "channels_last_3d", "contiguous_format", "preserve_format")
}
_MOST = 2**63 - 1
_DEEPEST = 50


class FormatError(ValueError):
    """A saved network that is not one: names the file, the field, the value and what is allowed."""


def plain_name(value: Any) -> bool:
    """Whether ``value`` may name a value of a graph, in the source that torch.fx writes."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def plain_path(value: Any) -> bool:
    """Whether ``value`` may be the path of a module."""
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


def encode(value: Any, tensor: Callable[[torch.Tensor], str] | None = None, depth: int = 0) -> Any:
    """``value`` as JSON; ``tensor`` names a tensor in the file of weights.

    Raises:
        TypeError: it is not plain; says of what type.
    """
    if depth > _DEEPEST:
        raise TypeError(f"values nested more than {_DEEPEST} deep")

    def deeper(v: Any) -> Any:
        return encode(v, tensor, depth + 1)

    if value is None or isinstance(value, bool):
        return value
    if type(value) is int:
        if abs(value) > _MOST:
            raise TypeError(f"the int {value}, which does not fit 64 bits")
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is str:
        if not _TEXT.fullmatch(value):
            raise TypeError(f"the string {value[:60]!r}, which is not plain text")
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Tensor) and tensor is not None:
        return {"tensor": tensor(value)}
    if isinstance(value, list):
        return [deeper(v) for v in value]
    if type(value) in (tuple, torch.Size):
        return {"tuple": [deeper(v) for v in value]}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int, float)):
                raise TypeError(f"a dict with the key {key!r}; keys can be strings and numbers")
        return {"dict": [[encode(k), deeper(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [deeper(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    for tag, known in (("dtype", _DTYPES), ("memory_format", _FORMATS)):
        for name, one in known.items():
            if value is one:
                return {tag: name}
    if isinstance(value, torch.device):
        return {"device": value.type}
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}")


def decode(
    value: Any,
    fail: Callable[[str], Exception],
    node: Callable[[str], Any] | None = None,
    tensor: Callable[[str], torch.Tensor] | None = None,
    device: torch.device | None = None,
    depth: int = 0,
) -> Any:
    """What :func:`encode` was given; ``fail`` makes the error of what it never writes.

    ``device``: where devices in the graph are moved to.
    """
    if depth > _DEEPEST:
        raise fail(f"values are nested more than {_DEEPEST} deep")

    def deeper(v: Any) -> Any:
        return decode(v, fail, node, tensor, device, depth + 1)

    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) > _MOST:
            raise fail(f"{str(value)[:30]} does not fit 64 bits")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise fail(f"{value} must be written as an object")
        return value
    if isinstance(value, str):
        if not _TEXT.fullmatch(value):
            raise fail(f"the string {value[:60]!r} is not plain text")
        return value
    if isinstance(value, list):
        return [deeper(v) for v in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise fail(f"{str(value)[:60]} is no value of a graph")
    ((tag, inner),) = value.items()
    if tag == "node" and node is not None and isinstance(inner, str):
        return node(inner)
    if tag == "tensor" and tensor is not None and isinstance(inner, str):
        return tensor(inner)
    if tag == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if tag == "ellipsis" and inner is True:
        return ...
    if tag == "tuple" and isinstance(inner, list):
        return tuple(deeper(v) for v in inner)
    if tag == "slice" and isinstance(inner, list) and len(inner) == 3:
        return slice(*(deeper(v) for v in inner))
    if tag == "dict" and isinstance(inner, list):
        pairs = [pair for pair in inner if isinstance(pair, list) and len(pair) == 2]
        keys = [deeper(pair[0]) for pair in pairs]
        if len(pairs) == len(inner) and all(isinstance(k, (str, int, float)) for k in keys):
            return {k: deeper(pair[1]) for k, pair in zip(keys, pairs, strict=True)}
    if isinstance(inner, str):
        if tag == "dtype" and inner in _DTYPES:
            return _DTYPES[inner]
        if tag == "memory_format" and inner in _FORMATS:
            return _FORMATS[inner]
        if tag == "device" and re.fullmatch(r"[a-z]{1,20}", inner):
            return torch.device("cpu") if device is None else device
    raise fail(f"{str(value)[:60]} is no value of a graph")
