"""Predictive uncertainty from a stochastic first layer."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.nn.modules.conv import _ConvNd

from .errors import ConversionError
from .graphs import is_steps, module_of
from .inputs import as_given, tree_map
from .network import ConvertedNetwork, _steps
from .spiking import Repeat, SpikingActivation, TimeShape

__all__ = ["Prediction", "StochasticPrefix", "stochastic_prefix"]

PER = ("example", "step")


@dataclass(frozen=True)
class Prediction:
    """What samples of a stochastic network say; entropies in nats.

    Attributes:
        logits: ``[B, C]``, the mean over samples.
        probabilities: ``[B, C]``, the mean of the samples' softmax.
        entropy: ``[B]``, of ``probabilities``: how uncertain the prediction is.
        information: ``[B]``, ``entropy`` less the mean entropy of the samples: the part of it that
            comes from the weights (mutual information). 0 for one sample.
    """

    logits: Tensor
    probabilities: Tensor
    entropy: Tensor
    information: Tensor


class _Sampled(fx.Interpreter):
    """A graph in which one affine layer has weights of its own for every example."""

    def __init__(self, graph: fx.GraphModule, draw: _Draw) -> None:
        super().__init__(graph)
        self.draw = draw

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if str(target) != self.draw.path:
            return super().call_module(target, args, kwargs)
        return self.draw.apply(args[0] if args else next(iter(kwargs.values())))


class _Draw:
    """The first affine layer and the spread of its weights."""

    def __init__(
        self, layer: nn.Module, path: str, std: float | Tensor, generator: torch.Generator | None
    ) -> None:
        self.layer, self.path, self.std, self.generator = layer, path, std, generator

    def apply(self, x: Tensor) -> Tensor:
        """``[B, *]``: each example with weights drawn for it."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        std = torch.as_tensor(self.std, dtype=weight.dtype, device=weight.device)
        if not bool((std > 0).any()):
            return self.layer(x)  # the deterministic network, to the bit
        shape = (len(x), *weight.shape)
        # Drawn where the generator lives, so that it means the same on every device.
        where = weight.device if self.generator is None else self.generator.device
        noise = torch.randn(shape, generator=self.generator, dtype=weight.dtype, device=where)
        weights = weight + std * noise.to(weight.device)

        def one(own: Tensor, example: Tensor) -> Tensor:
            return functional_call(self.layer, {"weight": own}, (example[None],))[0]

        return vmap(one)(weights, x)


class _Prefix(nn.Module):
    """The prefix with weights drawn for every example of every call."""

    def __init__(self, prefix: fx.GraphModule, draw: _Draw) -> None:
        super().__init__()
        self.prefix, self._draw = prefix, draw

    def forward(self, x: Any) -> Any:
        """What the prefix gives, ``[B, *]``."""
        return _Sampled(self.prefix, self._draw).run(x)


class _Kept(nn.Module):
    """The prefix as it is; keeps its input for a body that draws weights at every step."""

    def __init__(self, prefix: fx.GraphModule) -> None:
        super().__init__()
        self.prefix = prefix
        self.x: Any = None

    def forward(self, x: Any) -> Any:
        """What the prefix gives, ``[B, *]``."""
        self.x = x
        return self.prefix(x)


class _Timed(fx.Interpreter):
    """A body whose inputs have a value for every step: ``[T * B, *]``."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, Repeat):
            return args[0]
        if isinstance(module, TimeShape):
            return tuple(args[0].shape)
        if not isinstance(module, SpikingActivation):
            return super().call_module(target, args, kwargs)
        held, module.constant = module.constant, False
        try:
            return super().call_module(target, args, kwargs)
        finally:
            module.constant = held

    def run_node(self, n: fx.Node) -> Any:
        # numel of a constant value times T: the value has T already.
        if n.target is operator.mul and any(map(is_steps, n.args)):
            return self.env[n.args[0]]  # type: ignore[index]
        return super().run_node(n)


class _Body(nn.Module):
    """The body on a first layer whose weights are drawn at every step."""

    def __init__(self, body: fx.GraphModule, kept: _Kept, draw: _Draw, of_body: list[int]) -> None:
        super().__init__()
        self.body, self._kept, self._draw, self._of_body = body, (kept,), draw, of_body

    def get_submodule(self, target: str) -> nn.Module:
        """As in the body itself."""
        return self.body.get_submodule(target)

    def forward(self, *inputs: Any) -> Any:
        """``(*statics, T)`` to counts; of the statics only the shapes are used."""
        rows, kept = inputs[-1], self._kept[0]
        assert kept.x is not None
        x = _times(kept.x, rows)
        statics = _Sampled(kept.prefix, self._draw).run(x)
        return _Timed(self.body).run(*(statics[i] for i in self._of_body), rows)


class StochasticPrefix(nn.Module):
    """A converted network whose first affine layer has Gaussian weights.

    Made by :func:`stochastic_prefix`; shares weights and neurons with the network it was made of.

    Attributes:
        network: a :class:`ConvertedNetwork` that draws new weights in every call.
        per: ``"example"`` or ``"step"``.
    """

    def __init__(self, network: ConvertedNetwork, per: str) -> None:
        super().__init__()
        self.network, self.per = network, per

    @torch.no_grad()
    def forward(self, x: Any, T: int | None = None, samples: int = 1) -> Prediction:
        """Mean logits and predictive entropy.

        Args:
            x: ``[B, *]``; of several inputs a tuple by position or a dict by name.
            T: number of steps; default: that of the conversion.
            samples: weights drawn for each example (with ``per="step"``: for each step of it);
                they run as a batch of ``samples * B``.

        Raises:
            ValueError: T or samples is not a whole number of at least 1.
            ConversionError: the answer is not one tensor ``[B, C]``.
        """
        T = self.network.T if T is None else T
        try:
            samples = _steps(samples)
        except ValueError as error:
            raise ValueError(
                f"samples must be a whole number of at least 1, got {samples!r}"
            ) from error
        x = self.network._ports.bind(as_given(x))
        many = _times(x, samples)
        logits = self.network(many, T=T)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ConversionError("stochastic_prefix: the answer must be one tensor [B, C]")
        logits = logits.view(samples, len(x), -1)
        each = logits.float().softmax(-1)
        mean = each.mean(0)
        entropy = _entropy(mean)
        return Prediction(
            logits.mean(0), mean, entropy, (entropy - _entropy(each).mean(0)).clamp(min=0)
        )


def _times(x: Any, n: int) -> Any:
    """``[B, *]`` to ``[n * B, *]``: the batch n times, of every input."""
    return tree_map(x, lambda t: t.unsqueeze(0).expand(n, *t.shape).flatten(0, 1))


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def stochastic_prefix(
    snn: ConvertedNetwork,
    *,
    std: float | Tensor,
    per: str = "example",
    generator: torch.Generator | None = None,
) -> StochasticPrefix:
    """``snn`` with weights of its first affine layer drawn from ``N(weight, std²)``.

    Idea: Lei et al., arXiv 2112.06281 (STF-BNN): a network is trained as usual, then its first
    layer alone becomes Bayesian; ``std`` is what that leaves, or one number for a quick look. The
    first layer runs once for all T steps, so drawing its weights costs next to nothing.

    ``per="example"`` (default): one draw for each example, held for all steps. The current of the
    first neurons stays constant in time, so their counts are exact as ever; the spread is between
    samples. ``per="step"``: a draw for each step, whose T-step average is a Monte Carlo average as
    well, at the price of T first layers. *It adds unevenness*: a current that varies from step to
    step can bring negative parts and parts above θ (S+ and E of the bounds in
    :meth:`ConvertedNetwork.certify` grow), which averages out only in what neurons receive, not in
    what they fire.

    Example::

        uncertain = stochastic_prefix(snn, std=0.05)
        prediction = uncertain(images, samples=16)
        prediction.logits, prediction.entropy

    Args:
        snn: shared, not copied; not changed.
        std: standard deviation in the weights' own units, not negative: a number, or a tensor that
            broadcasts to the weight. The bias is not drawn. 0 is ``snn`` itself.
        per: see above.
        generator: where the numbers come from; seeded alike it gives the same answers.

    Raises:
        ConversionError: no linear layer or convolution stands before the first neurons, or it is
            called more than once; the method shows its input once (ptl; with ``per="step"`` others
            as well).
        ValueError: std or per.
        TypeError: snn or generator.
    """
    if not isinstance(snn, ConvertedNetwork):
        raise TypeError(f"snn must be a converted network, got {type(snn).__name__}")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
    if per not in PER:
        raise ValueError(f"per={per!r} is not known; allowed: {', '.join(map(repr, PER))}")
    drawn = isinstance(snn.prefix, fx.GraphModule)
    if not drawn or (per == "step" and snn._clock.steps.bias != "every"):
        raise ConversionError(
            f"stochastic_prefix: method {snn.report.method!r} shows its input once: "
            + ("pass per='example'" if drawn else "convert by another method")
        )
    path = _first_affine(snn.prefix)
    layer = snn.prefix.get_submodule(path)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    value = torch.as_tensor(std)
    if not bool(((value >= 0) & torch.isfinite(value)).all()):
        raise ValueError(f"std={std!r} must be at least 0 and finite")
    try:
        fits = torch.broadcast_shapes(value.shape, weight.shape) == weight.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"std has shape {tuple(value.shape)}, which does not broadcast to the weight of "
            f"{path}, {tuple(weight.shape)}"
        )
    draw = _Draw(layer, path, std, generator)
    # A second network of the same parts: only what draws is new.
    twin = ConvertedNetwork.__new__(ConvertedNetwork)
    twin.__dict__ = {**snn.__dict__, "_modules": dict(snn._modules)}
    if per == "example":
        twin.prefix = _Prefix(snn.prefix, draw)  # type: ignore[assignment]
    else:
        kept = _Kept(snn.prefix)
        twin.prefix = kept  # type: ignore[assignment]
        twin.body = _Body(snn.body, kept, draw, snn._of_body)  # type: ignore[assignment]
    return StochasticPrefix(twin, per)


def _first_affine(prefix: fx.GraphModule) -> str:
    calls = [
        str(n.target)
        for n in prefix.graph.nodes
        if isinstance(module_of(prefix, n), (nn.Linear, _ConvNd))
    ]
    if not calls:
        raise ConversionError(
            "stochastic_prefix: no linear layer or convolution (as a module) stands before the "
            "first neurons"
        )
    if calls.count(calls[0]) > 1:
        raise ConversionError(f"stochastic_prefix: {calls[0]} is called more than once")
    return calls[0]
