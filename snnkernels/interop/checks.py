"""What neurons of several libraries ask before a call is ours, and what is said if it is not."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.backends import outside
from ..kernels.spec import Asked
from .adapters import Adapter, Refused

__all__ = ["PLAIN", "WITH_V_SEQ", "imported", "positive", "refuse_transforms", "say"]

# Classes of tensors that kernels take; others may mean anything.
PLAIN = (Tensor, nn.Parameter)
WITH_V_SEQ = Asked(v_seq=True)
_said: set[tuple[str, str]] = set()


def imported(name: str, adapter: Adapter) -> Any:
    """A module of the adapter's library.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error}. {type(adapter).__name__} is needed for this: pip install {adapter.pip}"
        ) from error


def positive(value: Tensor) -> bool:
    """Whether all of ``value`` is positive and finite."""
    value = value.detach()
    return bool((torch.isfinite(value) & (value > 0)).all())


def refuse_transforms() -> None:
    """Raises :class:`.Refused` inside a transform of torch.func, where no call is ours."""
    if torch._C._are_functorch_transforms_active():
        raise Refused("a transform of torch.func is active")


def say(refused: Refused, what: str) -> None:
    """Warns of a fall-back, once per reason in a process.

    Args:
        refused: why.
        what: whose code runs instead.
    """
    reason = str(refused)
    if (reason, what) not in _said:
        _said.add((reason, what))
        warnings.warn(f"{what}: {reason}", RuntimeWarning, stacklevel=outside())
