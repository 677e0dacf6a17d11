"""Activations by the names and settings that checkpoints store them under."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from .activations import QCFS, ClipReLU, ThresholdReLU
from .activations_rates import RateNorm

__all__ = ["ACTIVATIONS", "name_activation"]


def _qcfs(stored: Mapping[str, str]) -> nn.Module:
    return QCFS(int(stored["L"]), gradient=stored.get("gradient", "floor_clip"))


def _threshold_relu(stored: Mapping[str, str]) -> nn.Module:
    steps = stored.get("shift_steps")
    return ThresholdReLU(float(stored["ceiling"]), None if steps is None else int(steps))


def _rate_norm(stored: Mapping[str, str]) -> nn.Module:
    return RateNorm(p=stored.get("p", "sigmoid"))


ACTIVATIONS: dict[str, Callable[[Mapping[str, str]], nn.Module]] = {
    "clip_relu": lambda stored: ClipReLU(),
    "qcfs": _qcfs,
    "threshold_relu": _threshold_relu,
    "rate_norm": _rate_norm,
}
"""From a name to a function that makes the module of a checkpoint's metadata (all text).

For ``snnkernels.models.load_checkpoint(path, activations=ACTIVATIONS)``. What is learned comes
with the weights; the rest is metadata: ``L`` and ``gradient`` of QCFS, ``ceiling`` and
``shift_steps`` of ThresholdReLU, ``p`` of RateNorm.
"""


def name_activation(module: nn.Module) -> dict[str, object]:
    """The metadata that :data:`ACTIVATIONS` makes a module such as ``module`` from.

    For ``snnkernels.models.save_checkpoint(model, path, architecture, **name_activation(module))``.

    Raises:
        ValueError: neither ReLU nor one of ours; names its type.
    """
    if isinstance(module, nn.ReLU):
        return {"activation": "relu"}
    if isinstance(module, ClipReLU):
        return {"activation": "clip_relu"}
    if isinstance(module, QCFS):
        return {"activation": "qcfs", "L": module.levels, "gradient": module.gradient}
    if isinstance(module, ThresholdReLU):
        steps = {} if module.shift_steps is None else {"shift_steps": module.shift_steps}
        return {"activation": "threshold_relu", "ceiling": module.ceiling, **steps}
    if isinstance(module, RateNorm):
        return {"activation": "rate_norm", "p": module.p}
    raise ValueError(
        f"{type(module).__name__} has no name in checkpoints; there are relu, "
        f"{', '.join(ACTIVATIONS)}"
    )
