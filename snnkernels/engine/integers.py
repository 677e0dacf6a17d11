"""Layers in whole numbers: 8-bit weights, 32-bit thresholds, biases and membranes.

Every output channel has a unit. Its weights, bias, threshold and start are multiples of it, so all
sums are exact and a spike train is the same bits in any order of summation, on any device. Linear
quantisation per channel is standard (Jacob et al., CVPR 2018); neurons compare whole numbers, so no
scale is left at inference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..conversion.spiking import per_channel_view
from .network import Network, Node

__all__ = ["WholePrefix", "check_range", "current_bounds", "to_integers", "units_of"]

_LARGEST = 127  # weight
_MOST_CURRENT = 2**23  # of what is constant in time
_FINEST = 2**20  # units of a channel's smallest threshold at most
_LAST = 2**31 - 1  # of int32: a threshold that is never reached, a start that check_range refuses
_FRACTIONS = torch.linspace(0.3, 1.0, 36, dtype=torch.float64).tolist()
# Inputs: below 2^9 in steps of 2^-14. Weights on them: 18 bits. The sum of a window is then a whole
# number of the smallest product, of 23 + 18 bits and those of its size: exact in float64.
_INPUT_STEP, _MOST_INPUT, _WEIGHT_BITS, _MOST_TERMS = 2.0**-14, 2.0**9, 18, 2**11
_BIAS_BITS = 38  # of the weights' steps: below 2^52 of the products'
_MOVES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Unflatten, nn.MaxPool2d)
_MOVING = {
    "flatten",
    "reshape",
    "view",
    "permute",
    "transpose",
    "contiguous",
    "unsqueeze",
    "squeeze",
}


def to_integers(net: Network) -> list[str]:
    """Turn every layer's weights, bias, threshold and start into multiples of its channels' units.

    The unit of a channel is the one for which 8 bits leave the least square error of its weights.
    An identity shortcut is no convolution: its weights may be any whole number.

    Raises:
        ValueError: a layer of neurons is not lowered; names it and why.
    """
    done = []
    for node in net:
        if node.neurons is None:
            continue
        if node.op != "layer":
            raise ValueError(
                f"precision='int8' needs every layer of neurons lowered, but {node.name} is not: "
                f"{node.why or 'a pass was left out'}; use precision='float32'"
            )
        done.append(_to_integers(node))
    return done


def _to_integers(node: Node) -> str:
    neurons = node.neurons
    assert neurons is not None
    channels = node.size[0]
    theta = neurons.threshold.double()
    least = theta.expand(node.size).reshape(channels, -1).amin(1) if theta.dim() > 1 else theta
    least = least.expand(channels)
    unit = least / 2**14
    convolutions = [t.weight.flatten(1) for t in node.terms if not t.each]
    if convolutions:
        unit = _unit(torch.cat(convolutions, 1), unit).maximum(least / _FINEST)
    column = unit.view(-1, 1, 1, 1)
    terms = []
    for term in node.terms:
        whole = (term.weight / column).round()
        terms.append(replace(term, weight=whole if term.each else whole.clamp(-_LARGEST, _LARGEST)))
    bias = node.whole_bias()
    _check_finite(node.name, *(t.weight for t in node.terms), *([] if bias is None else [bias]))

    def whole_of(value: Tensor) -> Tensor:
        value = value.double()
        spread = unit if value.dim() <= 1 else unit.view(-1, *[1] * (value.dim() - 1))
        return (value / spread).round().clamp(-_LAST, _LAST).to(torch.int32)

    node.terms, node.unit = terms, unit
    node.bias = None if bias is None else (bias / unit).round()
    node.neurons = replace(
        neurons, threshold=whole_of(neurons.threshold).clamp(min=1),
        v_init=whole_of(neurons.v_init), bias=None,
    )  # fmt: skip
    units = (least / unit).median()
    return f"{node.name}: a threshold is {float(units):.0f} units (median)"


def _check_finite(name: str, *values: Tensor) -> None:
    """Devices turn what is no number into different whole numbers.

    Raises:
        ValueError: a value is not finite.
    """
    for value in values:
        bad = value[~value.isfinite()]
        if bad.numel():
            raise ValueError(
                f"precision='int8' needs finite weights and biases, but {name} has {float(bad[0])}"
            )


def _exponent(value: Tensor) -> int:
    """The power of two above all sizes; of zeros one below those of all numbers."""
    most = float(value.abs().max())
    return math.frexp(most)[1] if most else -900


def _unit(weights: Tensor, otherwise: Tensor) -> Tensor:
    """The unit of each row that leaves the least square error in 8 bits."""
    most = weights.abs().amax(1)
    best, found = torch.full_like(most, torch.inf), otherwise.clone()
    for fraction in _FRACTIONS:
        unit = (most * (fraction / _LARGEST)).clamp(min=1e-300)
        near = (weights / unit[:, None]).round().clamp(-_LARGEST, _LARGEST) * unit[:, None]
        error = (near - weights).square().sum(1)
        better = (error < best) & (most > 0)
        best = torch.where(better, error, best)
        found = torch.where(better, unit, found)
    return found


def units_of(statics: Sequence[Tensor], unit: Tensor, most: float) -> list[Tensor]:
    """The current that is constant in time, ``[B, C]`` or ``[B, C, H, W]`` float32, in units.

    Its parts are added first, exactly, and rounded once. What is beyond ``most`` is cut off there.
    """
    if not statics:
        return []
    total = statics[0]
    for static in statics[1:]:
        total = total + static
    units = total / per_channel_view(unit, 1, total.dim())
    return [units.round().clamp(-most, most).float()]


def current_bounds(node: Node) -> tuple[float, float]:
    """Largest size of a layer's current in units, and of the part of it that is constant in time.

    A constant part beyond the threshold, the start and all else together makes a neuron fire at
    every step whatever else it is given, or never: a larger one changes no spike. Behind a max-pool
    the position that leads may lag by twice all else, and so may its next sum.

    Raises:
        ValueError: float32 could not hold it.
    """
    assert node.neurons is not None
    sums = [torch.zeros(node.size[0], dtype=torch.float64) for _ in range(2)]
    for term in node.terms:
        most = 1 if term.either else math.prod(term.pool)
        for i, sign in enumerate((1, -1)):
            sums[i] += (sign * term.weight).clamp(min=0).flatten(1).sum(1) * most
    bound = float(torch.stack(sums).amax())
    bound += 0.0 if node.bias is None else float(node.bias.abs().max())
    constant = 0.0
    if node.statics:
        own = float(node.neurons.threshold.max()) + float(node.neurons.v_init.abs().max())
        constant = min(own + 4 * bound + 1, _MOST_CURRENT)
    bound += constant
    if bound >= 2**24:
        raise ValueError(
            f"precision='int8': sums of {node.name} can reach {bound:.4g}, beyond 2^24; use "
            "precision='float32'"
        )
    return bound, constant


def check_range(name: str, T: int, bound: float, start: int, side: int) -> None:
    """T steps must stay in range: 2^24 of running sums (float32), 2^31 of membranes.

    Raises:
        ValueError: they might not.
    """
    most = 2**24 if side > 1 else 2**31
    if T * bound + start >= most:
        raise ValueError(
            f"T={T} is too long for precision='int8': sums of {name} could reach "
            f"{T * bound + start:.4g} (allowed: below {most}); use precision='float32' or fewer "
            "steps"
        )


class WholePrefix:
    """What comes before the first neurons, exact: float64 on inputs and weights of few bits.

    Raises:
        ValueError: there is more than one convolution or linear layer, or other arithmetic.
    """

    def __init__(self, prefix: Any) -> None:
        if not isinstance(prefix, fx.GraphModule):
            raise ValueError(f"precision='int8': the input of {type(prefix).__name__} is not exact")
        linear: list[nn.Module] = []
        for node in prefix.graph.nodes:
            if node.op == "call_module":
                module = prefix.get_submodule(str(node.target))
                if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                    linear.append(module)
                elif not isinstance(module, _MOVES):
                    self._refuse(f"{node.target} ({type(module).__name__})")
            elif node.op in ("call_function", "call_method"):
                name = node.target if isinstance(node.target, str) else node.target.__name__
                if name not in _MOVING:
                    self._refuse(name)
        if len(linear) > 1:
            self._refuse(f"{len(linear)} convolutions or linear layers")
        self._run: Callable[..., Any] = copy.deepcopy(prefix).double()
        modules = self._run.named_modules() if isinstance(self._run, nn.Module) else ()
        for name, module in modules:
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                self._round(name, module)

    def _refuse(self, what: str) -> None:
        raise ValueError(
            "precision='int8' needs one convolution or linear layer between the input and first "
            f"neurons, whose sums are exact; found {what}; use precision='float32'"
        )

    def _round(self, name: str, module: Any) -> None:
        weight = module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        terms = weight[0].numel()
        if terms > _MOST_TERMS:
            self._refuse(f"one of {terms} terms (at most {_MOST_TERMS})")
        _check_finite(name, weight, *([] if bias is None else [bias]))
        bits = _exponent(weight) - _WEIGHT_BITS
        if bias is not None:  # a huge one leaves few bits to the weights: sums stay exact
            bits = max(bits, _exponent(bias) - _BIAS_BITS)
        step = 2.0**bits
        module.weight = nn.Parameter((weight / step).round() * step, requires_grad=False)
        if bias is not None:
            step *= _INPUT_STEP
            module.bias = nn.Parameter((bias / step).round() * step, requires_grad=False)

    def __call__(self, x: Any) -> Any:
        """The statics, float64.

        Raises:
            ValueError: a value of the input is beyond 512, or no number.
        """
        return self._run(_rounded(x))


def _rounded(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError("precision='int8' takes one floating-point tensor as input")
    most = float(x.detach().abs().max()) if x.numel() else 0.0
    if not most < _MOST_INPUT:
        raise ValueError(
            f"precision='int8' takes inputs below {_MOST_INPUT:.0f} in size, got {most:.6g}"
        )
    return (x.double() / _INPUT_STEP).round() * _INPUT_STEP
