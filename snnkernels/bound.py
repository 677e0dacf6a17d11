"""Methods of a class whose work is done on a floor above it.

``snn.save_pretrained(...)`` reads best as a method, but the converter must not know about files.
``snnkernels/__init__.py`` says which functions are methods of which class; they are imported when
they are first looked at.
"""

from __future__ import annotations

from importlib import import_module
from types import MethodType
from typing import Any, TypeVar

__all__ = ["METHODS", "takes_methods"]

_Class = TypeVar("_Class", bound=type)

METHODS: dict[str, dict[str, str]] = {}
"""Filled by ``snnkernels/__init__.py``: class name to {method name: module that defines it}."""


class _Bound:
    """The function ``name`` of ``snnkernels.<module>`` as a method."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        function = getattr(import_module(f"{__package__}.{self.module}"), self.name)
        return function if obj is None else MethodType(function, obj)


def takes_methods(cls: _Class) -> _Class:
    """Class decorator: add the methods that ``snnkernels/__init__.py`` binds to this class.

    Raises:
        TypeError: the class has one of them already.
    """
    for name, module in METHODS.get(cls.__name__, {}).items():
        if name in vars(cls):
            raise TypeError(f"{cls.__name__}.{name} is defined and bound: one of the two must go")
        setattr(cls, name, _Bound(module, name))
    return cls
