"""What neurons of several libraries ask before a call is ours, and what is said if it is not."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..kernels.spec import Asked

__all__ = ["PLAIN", "WITH_V_SEQ", "positive", "say", "transformed"]

# Classes of tensors that kernels take; others may mean anything.
PLAIN = (Tensor, nn.Parameter)
WITH_V_SEQ = Asked(v_seq=True)
_said: set[tuple[str, str]] = set()


def positive(value: Tensor) -> bool:
    """Whether all of ``value`` is positive and finite."""
    value = value.detach()
    return bool((torch.isfinite(value) & (value > 0)).all())


def transformed() -> str | None:
    """Why no call is ours at all just now, or None."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    return None


def say(reason: str, what: str) -> None:
    """Warns of a fall-back, once per reason in a process.

    Args:
        reason: why.
        what: whose code runs instead.
    """
    if (reason, what) not in _said:
        _said.add((reason, what))
        warnings.warn(f"{what}: {reason}", RuntimeWarning, stacklevel=4)
