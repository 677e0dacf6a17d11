"""What neurons of several libraries ask before a call is ours, and what is said if it is not."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..kernels.spec import Asked
from .adapters import Refused

__all__ = ["PLAIN", "WITH_V_SEQ", "positive", "refuse_transforms", "say"]

# Classes of tensors that kernels take; others may mean anything.
PLAIN = (Tensor, nn.Parameter)
WITH_V_SEQ = Asked(v_seq=True)
_said: set[tuple[str, str]] = set()


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
        warnings.warn(f"{what}: {reason}", RuntimeWarning, stacklevel=4)
