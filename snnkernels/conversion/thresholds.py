"""Which threshold and initial potential every neuron gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .activations_rates import RateNorm
from .balancing import Balancing, balanced_threshold
from .calibration import Statistics, parse_rule, rule_threshold
from .errors import ConversionError
from .methods import Method
from .ops import Activation
from .starts import parse_start, settled_start

__all__ = ["Site", "plan", "settle"]


@dataclass
class Site:
    """One activation on its way to becoming neurons."""

    path: str
    activation: Activation
    rule: Any  # "learned", a rule of calibration.py, a Balancing, a number or a tensor
    v_init: Any  # what starts.py knows; settled: "half", a number or a tensor
    per_channel: bool
    theta: Tensor = field(default_factory=lambda: torch.ones(()))
    channel_dim: int = 1  # -1: the last, the features of a linear layer
    channels: int | None = None  # their number, as far as the layers before tell
    borrowed: list[int] = field(default_factory=list)  # channels that never fired
    rare: list[int] = field(default_factory=list)  # channels whose percentile is 0
    silent: bool = False
    learned: Any = None  # the threshold that training left, if the method reads one
    start: Any = None  # v_init as it was asked for, before it was settled
    amplitude: Any = None  # what a spike weighs, where a method's settle has found it
    grown: Tensor | None = None  # what balancing found, float64 [C] or [1]
    fit_start: bool = False  # v_init is to be fitted to the spiking network

    @property
    def label(self) -> str:
        """The name users see."""
        return self.activation.label

    @property
    def asked_start(self) -> str:
        """v_init as it was asked for, in an error's words."""
        return "a tensor" if isinstance(self.start, Tensor) else repr(self.start)

    @property
    def needs_data(self) -> bool:
        """Whether the rule works on calibration data."""
        return self.needs_histogram or isinstance(self.rule, Balancing)

    @property
    def needs_histogram(self) -> bool:
        """Whether the rule works on a histogram of the activations."""
        return isinstance(self.rule, str) and self.rule != "learned"

    def describe(self) -> str:
        """How the threshold came about."""
        if self.rule == "learned":
            return f"{type(self.activation.inner).__name__} -> IF, θ learned"
        kind = type(self.activation.inner).__name__
        kind = f"ReLU{self.activation.inner.max_val:g}" if kind == "Hardtanh" else kind
        if self.needs_data:
            return f"{kind} -> IF, θ {self.rule} per {'channel' if self.per_channel else 'layer'}"
        return f"{kind} -> IF, θ given"


def _lookup(name: str, value: Any, label: str, labels: list[str], default: Any) -> Any:
    if not isinstance(value, dict):
        return value
    unknown = sorted(set(value) - set(labels))
    if unknown:
        raise ValueError(
            f"{name} names {unknown}, which are not activations of this network; it has {labels}"
        )
    return value.get(label, default)


def plan(
    activations: dict[str, Activation],
    method: Method,
    threshold: Any,
    per_channel: bool | None,
    v_init: Any,
    channels: dict[str, tuple[int, int | None]],
) -> list[Site]:
    """Decide rule and initial potential of every activation, before any data is looked at.

    ``channels``: channel dimension and number of channels (None if not known), by path.

    Raises:
        ValueError, TypeError: values that are not allowed; the message names the argument.
        ConversionError: the method does not suit the network, or a learned threshold is not
            positive and finite.
    """
    labels = [a.label for a in activations.values()]
    if threshold is None:
        method.check(list(activations.values()))
    sites = []
    for path, activation in activations.items():
        if isinstance(activation.inner, RateNorm) and method.trains != "RateNorm":
            raise ConversionError(
                f"{activation.label} is a RateNorm, which answers in rates: method='rnl' gives its "
                f"neurons spikes of weight 1, method={method.name!r} does not. What opi adds is "
                "method='rnl', v_init='half'"
            )
        learned = method.learned(activation)
        own = "learned" if learned is not None else method.threshold
        rule = _lookup("threshold", threshold, activation.label, labels, None)
        rule = own if rule is None else rule
        if rule is None:
            method.check([activation])
        if isinstance(rule, str):
            if rule != "learned":
                parsed = parse_rule(rule)
                rule = parsed if isinstance(parsed, Balancing) else rule
        elif isinstance(rule, bool) or not isinstance(rule, (Real, Tensor, Balancing)):
            raise TypeError(
                "threshold must be 'mmse', 'max', 'kl', 'ltb' (or a Balancing), a percentile such "
                "as '99.9%', a number, a tensor or a dict from layer name to one of these; got "
                f"{type(rule).__name__}"
            )
        start = _lookup("v_init", v_init, activation.label, labels, None)
        start = method.v_init if start is None else start
        if isinstance(start, str) or not isinstance(start, (Real, Tensor)):
            parse_start(start if isinstance(start, str) else repr(start))
        apart = method.per_channel if per_channel is None else bool(per_channel)
        site = Site(path, activation, rule, start, apart, learned=learned, start=start)
        site.channel_dim, site.channels = channels[path]
        sites.append(site)
    for site in sites:
        if site.rule == "learned":
            site.theta = _positive(site, site.learned, "the learned threshold")
        elif not site.needs_data:
            site.theta = _positive(site, site.rule, "threshold")
        if isinstance(site.v_init, str):
            continue
        start = torch.as_tensor(site.v_init)
        if not bool(torch.isfinite(start).all()):
            raise ValueError(f"v_init of {site.label} must be finite, got {site.v_init}")
    return sites


def _positive(site: Site, value: Any, what: str) -> Tensor:
    theta = torch.as_tensor(value).detach().clone()
    theta = theta if theta.is_floating_point() else theta.float()
    theta = theta.reshape(()) if theta.numel() == 1 else theta
    if theta.dim() > 1 or theta.numel() == 0:
        raise ValueError(
            f"{what} of {site.label} has shape {tuple(theta.shape)}; it must be a scalar or one "
            "value for each channel"
        )
    bad = ~((theta > 0) & torch.isfinite(theta))
    if bool(bad.any()):
        hint = (
            ". A learned one that is not means that training went wrong there: fine-tune with a "
            "smaller learning rate, or pass threshold= for this layer"
        )
        raise ConversionError(
            f"{site.label}: {what} must be positive and finite, got {theta[bad].flatten()[0]:g}"
            + (hint if site.rule == "learned" else "")
        )
    return theta


def settle(site: Site, seen: Statistics | None, T: int, dtype: torch.dtype) -> None:
    """Give ``site`` its final threshold and initial potential, in the neurons' state dtype."""
    if seen is not None:
        dtype = seen.dtype
        site.channel_dim, site.channels = seen.channel_dim, seen.channels
    for what, value in (("threshold", site.theta), ("v_init", site.v_init)):
        known = site.channels is not None and isinstance(value, Tensor) and value.dim() <= 1
        if known and value.numel() not in (1, site.channels):
            raise ValueError(
                f"{what} of {site.label} has {value.numel()} values, but the layer has "
                f"{site.channels} channels"
            )
    start = site.v_init
    if isinstance(start, Tensor) and start.dim() > 1 and seen and start.shape != seen.shape[1:]:
        raise ValueError(
            f"v_init of {site.label} has shape {tuple(start.shape)}; it must be a scalar, one "
            f"value for each channel, or of the layer's shape {tuple(seen.shape[1:])}"
        )
    state = torch.float64 if dtype == torch.float64 else torch.float32
    if site.grown is not None:
        site.theta, site.borrowed, site.silent = balanced_threshold(site.grown)
        site.theta = site.theta if site.per_channel else site.theta.reshape(())
    elif site.needs_data:
        assert seen is not None
        assert seen.histogram is not None
        if isinstance(start, str):
            start = parse_start(start).fraction
        else:
            start = torch.as_tensor(start, dtype=torch.float64)
            if start.dim() > 1 or (start.numel() > 1 and not site.per_channel):
                start = start.mean()  # the layer's one staircase
        theta, borrowed, site.silent = rule_threshold(site.rule, seen.histogram, T, start)
        fired = seen.histogram.maximum > 0
        site.borrowed = [c for c in borrowed if not bool(fired[c])]
        site.rare = [c for c in borrowed if bool(fired[c])]
        site.theta = theta if site.per_channel else theta.reshape(())
    site.theta = site.theta.to(state)
    if isinstance(site.v_init, str):
        site.v_init = settled_start(site, seen)
    if isinstance(site.v_init, Tensor):
        site.v_init = site.v_init.detach().to(site.theta.device, state)
        site.v_init = site.v_init.reshape(()) if site.v_init.numel() == 1 else site.v_init
