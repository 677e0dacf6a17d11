"""SpikingJelly: what :func:`snnkernels.patch` and :func:`snnkernels.patched` do with it.

Two releases are known, by what their classes have: 0.0.0.0.14 and 2.0.0. A patched neuron changes
its class to a subclass of its own, so ``isinstance``, ``functional.reset_net`` (which keeps
references), ``set_step_mode``, monitors, hooks and ``v`` work as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from . import sj_run, sj_scaled
from .adapters import Adapter, Change, Refused
from .checks import imported, positive, say
from .swaps import Swap

__all__ = ["ADAPTER", "recipe", "release"]

_NEURONS = "spikingjelly.activation_based.neuron"
_WHY = {
    "ParametricLIFNode": "its learned leak is rounded in another order than ours",
    "NonSpikingIFNode": "it gives membranes, not spikes",
    "NonSpikingLIFNode": "it gives membranes, not spikes",
}


def release() -> str:
    """``"14"`` or ``"2"``: which of the known releases is installed.

    Raises:
        ImportError: SpikingJelly is not installed.
        Refused: it is another release.
    """
    neuron = imported(_NEURONS, ADAPTER)
    if hasattr(neuron.IFNode, "jit_eval_multi_step_forward_soft_reset"):
        return "14"
    functional = import_module("spikingjelly.activation_based.functional")
    if hasattr(neuron.IFNode, "multi_step_functional_forward") and hasattr(
        functional, "if_multi_step"
    ):
        return "2"
    raise Refused("this release of SpikingJelly is not known; known are 0.0.0.0.14 and 2.0.0")


def _nodes() -> Any:
    """The module of fused classes for the installed release."""
    return import_module(f"{__package__}.sj{release()}_nodes")


def recipe(
    dataloader: Iterable[Any],
    *,
    T: int = 16,
    threshold: str = "mmse",
    per_channel: bool = True,
    v_init: float | str = "half",
) -> Any:
    """Our conversion as a recipe for SpikingJelly's converter (2.0.0).

    Example::

        recipe = snnkernels.interop.spikingjelly.recipe(loader, T=16)
        snn = ann2snn.Converter(recipe=recipe).convert(ann)

    The network is SpikingJelly's (an ``fx.GraphModule`` that is called step by step, or with
    ``set_step_mode(snn, "m")`` on ``[T, B, *]``), each ReLU one :class:`snnkernels.IFNode` in the
    units of its current: OPI's start at half the threshold, thresholds of least squared error,
    spikes that weigh the threshold. ``F.relu`` and ``x.relu()`` are converted too, and max-pools
    become pools of running sums, whose mean is right at every T. :func:`snnkernels.convert` has
    more methods, and a network that is faster.

    Args:
        dataloader: calibration inputs: tensors, or (input, anything).
        T: the number of steps that thresholds are made for.
        threshold: ``"mmse"``, ``"max"``, ``"kl"`` or a percentile such as ``"99.9%"``.
        per_channel: a threshold per channel, or one per layer.
        v_init: ``"half"``, or which part of the threshold membranes begin at.

    Raises:
        ImportError: SpikingJelly 2.0.0 is not installed.
        ValueError: an option that is not allowed.
    """
    try:
        known = release()
    except Refused as refused:
        raise ImportError(str(refused)) from None
    if known != "2":
        raise ImportError(
            "recipes are of SpikingJelly 2.0.0; with 0.0.0.0.14 use snnkernels.convert, or its own "
            "converter and snnkernels.patch"
        )
    made: Any = import_module(f"{__package__}.sj2_recipe").OPIRecipe
    return made(dataloader, T=T, threshold=threshold, per_channel=per_channel, v_init=v_init)


class SpikingJelly(Adapter):
    """SpikingJelly 0.0.0.0.14 and 2.0.0."""

    library = "spikingjelly"
    pip = "spikingjelly"

    def recognises(self, module: nn.Module) -> bool:
        """See :class:`.Adapter`."""
        return any(c.__module__.startswith(_NEURONS) for c in type(module).__mro__)

    def replace(self, module: nn.Module, path: str) -> type[nn.Module]:
        """See :class:`.Adapter`."""
        return self._checked(module, _nodes())

    def _checked(self, module: Any, nodes: Any) -> type[nn.Module]:
        """The fused class for a neuron, or Refused."""
        cls = type(module)
        if cls not in nodes.FUSED:
            known = next((c for c in cls.__mro__ if c in nodes.FUSED), None)
            if known is not None and not cls.__module__.startswith(_NEURONS):
                raise Refused(
                    f"{cls.__name__} derives from {known.__name__} and may differ from it"
                )
            raise Refused(_WHY.get(cls.__name__, "there is no kernel for this neuron"))
        own = [n for n, value in module.__dict__.items() if callable(value) and hasattr(cls, n)]
        if own:
            raise Refused(f"this one has a {', '.join(own)} of its own")
        sj_run.surrogate_of(module.surrogate_function)
        if cls.__name__ == "LIFNode":
            if module.decay_input:
                raise Refused(
                    "decay_input=True computes v + (x - (v - v_reset)) / tau, which rounds in "
                    "another order than our beta * v + x / tau"
                )
            exact = release() == "14" and module.v_reset is None
            sj_run.leak_of(module.tau, module.v_reset, exact)
        threshold = module.v_threshold
        if isinstance(threshold, Tensor) and cls.__name__ != "ActivationAwareIFNode":
            raise Refused("v_threshold was set to a tensor")
        if isinstance(threshold, Tensor):
            if not positive(threshold):
                raise Refused("a threshold is not positive and finite")
            threshold = 1.0
        v = 0.0  # the membrane may come and go; a call looks at it again
        sj_run.check(torch.empty(1), v, threshold, module.v_reset, ())
        return nodes.FUSED[cls]

    def groups(self, model: nn.Module) -> Iterable[dict[nn.Module, Change]]:
        """Scaler - neuron - scaler of a converted network."""
        try:
            nodes = _nodes()
        except Refused:  # replace says so of every neuron
            return
        for row in sj_scaled.find(model, tuple(nodes.SCALERS), nodes.BETWEEN_SCALERS):
            try:
                fused = self._checked(row[1], nodes)
            except Refused:
                continue
            first, last = nodes.SCALERS[type(row[0])][0], nodes.SCALERS[type(row[2])][1]
            yield sj_scaled.changes(row, first, Change(fused), last)

    def hook(self) -> AbstractContextManager[None]:
        """``functional.if_multi_step`` (2.0.0), ``IFNode``'s forwards (0.0.0.0.14)."""
        try:
            known = release()
        except Refused as refused:
            raise ImportError(str(refused)) from None
        return _HOOKS[known]()

    @contextmanager
    def in_tests(self) -> Iterator[None]:
        """See :class:`.Adapter`: ``neuron.IFNode`` and the others are the fused classes."""
        with self.hook(), _CLASSES():
            yield


def _fused_classes() -> Iterable[tuple[Any, str, Callable[[Any], Any]]]:
    package = import_module(_NEURONS)
    for theirs, fused in _nodes().FUSED.items():
        # LIFNode is fused for some arguments only, which its fused class looks at.
        yield package, theirs.__name__, partial(_instead, fused)


def _instead(ours: Any, theirs: Any) -> Any:
    return ours


def _functions() -> Iterable[tuple[Any, str, Callable[[Any], Any]]]:
    package = import_module("spikingjelly.activation_based.functional")
    # Its neurons look in the package, its single-step functions in the module.
    for owner in (package, import_module(f"{package.__name__}.neuron")):
        yield owner, "if_multi_step", _if_multi_step
        yield owner, "lif_multi_step", _lif_multi_step


def _if_multi_step(theirs: Any) -> Any:
    @wraps(theirs)
    def if_multi_step(
        x_seq: Tensor,
        v: Tensor,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Any = None,
        detach_reset: bool = False,
        store_v_seq: bool = False,
        **precision: Any,
    ) -> Any:
        ours = _call(
            x_seq, v, v_threshold, v_reset, surrogate_function, detach_reset, store_v_seq, precision
        )
        if ours is not None:
            return ours
        return theirs(
            x_seq, v, v_threshold, v_reset, surrogate_function, detach_reset, store_v_seq,
            **precision,
        )  # fmt: skip

    return if_multi_step


def _lif_multi_step(theirs: Any) -> Any:
    @wraps(theirs)
    def lif_multi_step(
        x_seq: Tensor,
        v: Tensor,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Any = None,
        detach_reset: bool = False,
        store_v_seq: bool = False,
        **precision: Any,
    ) -> Any:
        ours = None
        if not decay_input and isinstance(x_seq, Tensor) and x_seq.device.type == "cpu":
            ours = _call(
                x_seq, v, v_threshold, v_reset, surrogate_function, detach_reset, store_v_seq,
                precision, tau,
            )  # fmt: skip
        if ours is not None:
            return ours
        return theirs(
            x_seq, v, tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset,
            store_v_seq, **precision,
        )  # fmt: skip

    return lif_multi_step


def _call(
    x_seq: Any,
    v: Any,
    v_threshold: Any,
    v_reset: Any,
    surrogate_function: Any,
    detach_reset: Any,
    store_v_seq: Any,
    precision: dict[str, Any],
    tau: float | None = None,
) -> tuple[Any, Any, Any] | None:
    """Our answer to a functional call, or None."""
    if precision.get("neuron_storage") is not None:
        return None
    if not (isinstance(x_seq, Tensor) and x_seq.dim() and x_seq.shape[0]):
        return None
    try:
        sj_run.check(x_seq, v, v_threshold, v_reset, x_seq.shape[1:])
        if surrogate_function is None:
            surrogate_function = import_module(sj_run.SURROGATES).Sigmoid()
        surrogate = sj_run.surrogate_of(surrogate_function)
        beta = None if tau is None else sj_run.leak_of(tau, v_reset, exact=False)
    except Refused as refused:
        say(refused, sj_run.OWN)
        return None
    return sj_run.run(
        x_seq, v, v_threshold, v_reset, surrogate, detach_reset, store_v_seq, beta=beta
    )


def _methods() -> Iterable[tuple[Any, str, Callable[[Any], Any]]]:
    nodes = _nodes()
    for theirs in nodes.FUSED:
        for name in ("single_step_forward", "multi_step_forward"):
            yield theirs, name, _method(theirs, nodes.run, name == "multi_step_forward")


def _method(cls: Any, run: Any, many: bool) -> Callable[[Any], Any]:
    def make(theirs: Any) -> Any:
        @wraps(theirs)
        def forward(self: Any, x: Any) -> Any:
            # Classes that derive from theirs may have their own charge, fire or reset.
            if type(self) is not cls or getattr(self, "decay_input", False):
                return theirs(self, x)
            spikes = run(self, x if many else x.unsqueeze(0), many and self.store_v_seq)
            if spikes is None:
                return theirs(self, x)
            return spikes if many else spikes[0]

        return forward

    return make


_CLASSES = Swap(_fused_classes)
_HOOKS = {"2": Swap(_functions), "14": Swap(_methods)}
ADAPTER = SpikingJelly()
