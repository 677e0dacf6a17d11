"""Conversion methods, one file each."""

from __future__ import annotations

from .base import Method
from .opi import OPI
from .qcfs import QCFSMethod

__all__ = ["METHODS", "Method", "find_method"]

METHODS: dict[str, Method] = {m.name: m for m in (OPI(), QCFSMethod())}


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        ValueError: no such method; lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r} is not known; allowed: {', '.join(METHODS)}")
    return METHODS[name]
