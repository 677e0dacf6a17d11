"""SpikingJelly's neuron with its defaults and its numbers, on our kernels.

SpikingJelly need not be installed. Where it has been imported before a node is made, its
``functional.*`` take the node for one of theirs (``snnkernels/joined.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import surrogate as _surrogate
from ..interop import sj_run
from ..interop.adapters import Refused
from ..interop.checks import say
from ..joined import join
from .memory import MemoryModule

__all__ = ["IFNode"]


class IFNode(MemoryModule):
    """Integrate-and-fire neurons with SpikingJelly's defaults: hard reset to 0, one step a call.

    ``m = v + x``, fire at ``m >= v_threshold``. Given the same current it has the spikes,
    membranes and surrogate gradients of ``spikingjelly.activation_based.neuron.IFNode`` (2.0.0).
    What comes after ``step_mode`` differs between SpikingJelly's releases and is by keyword here.
    Float16 and bfloat16 currents have membranes of their dtype, as there, and run step by step:
    :class:`snnkernels.IFNode` is fast with them and keeps float32.

    Args:
        v_threshold: where it fires, positive and finite.
        v_reset: what v becomes after a spike and begins as; ``None`` subtracts the threshold and
            begins at 0.
        surrogate_function: one of :mod:`snnkernels.surrogate` or SpikingJelly, a name, or any
            callable of ``m - v_threshold`` that gives spikes (those run step by step); ``None`` is
            Sigmoid of width 4, SpikingJelly's default.
        detach_reset: no gradient through the spike in the reset.
        step_mode: ``"s"``: inputs are ``[*shape]``, one step; ``"m"``: ``[T, *shape]``.
        store_v_seq: keep the membranes after each step in ``v_seq``; with ``"s"`` they are added
            one by one until :meth:`reset`.
        backend: any string; kept and without effect.

    Attributes:
        v: the membrane, ``[*shape]`` in the dtype of the input; a number before the first call and
            after :meth:`reset`. It may be set. A call with another shape starts anew.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range.
    """

    v: Any

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Any = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        *,
        store_v_seq: bool = False,
        backend: str = "torch",
    ) -> None:
        for name, value in (("v_threshold", v_threshold), ("v_reset", v_reset)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number or (value is None and name == "v_reset")):
                allowed = "a number or None" if name == "v_reset" else "a number"
                raise TypeError(f"{name}={value!r} must be {allowed}")
        v_reset = None if v_reset is None else float(v_reset)
        try:
            sj_run.check(torch.empty(0), 0.0, float(v_threshold), v_reset, ())
        except Refused as refused:
            raise ValueError(str(refused)) from None
        if surrogate_function is None:
            surrogate_function = _surrogate.Sigmoid()
        elif isinstance(surrogate_function, str):
            surrogate_function = _surrogate.resolve(surrogate_function)
        elif not callable(surrogate_function):
            raise TypeError(f"surrogate_function={surrogate_function!r} cannot be called")
        join(self)
        super().__init__(step_mode, backend)
        self.register_memory("v", 0.0 if v_reset is None else v_reset)
        self.v_threshold = float(v_threshold)
        self.v_reset = v_reset
        self.surrogate_function = surrogate_function
        self.detach_reset = bool(detach_reset)
        self.v_seq: Tensor | None = None
        self.store_v_seq = store_v_seq

    @property
    def store_v_seq(self) -> bool:
        """Whether ``v_seq`` is kept; setting it empties ``v_seq``."""
        return self._store_v_seq

    @store_v_seq.setter
    def store_v_seq(self, value: bool) -> None:
        self._store_v_seq = bool(value)
        self.v_seq = None

    def reset(self) -> None:
        """The membrane as it began, no ``v_seq``."""
        super().reset()
        self.v_seq = None

    def detach(self) -> None:
        """Cuts membrane and ``v_seq`` from the graph of earlier calls."""
        super().detach()
        if self.v_seq is not None:
            self.v_seq = self.v_seq.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Runs the neurons.

        Args:
            x: current, ``[T, *shape]`` (step mode ``"m"``) or ``[*shape]``; floating point.

        Returns:
            Spikes, 0 and 1, of its shape and dtype.

        Raises:
            TypeError: the current is no floating-point tensor.
            ValueError: no time dimension, or no steps.
        """
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {kind}")
        if self.step_mode == "m":
            if x.dim() == 0 or x.shape[0] == 0:
                raise ValueError(f"step_mode='m' needs [T, *shape] with T > 0, x is {[*x.shape]}")
            spikes, v_seq = self._run(x, self.store_v_seq)
            self.v_seq = v_seq
            return spikes
        spikes, _ = self._run(x.unsqueeze(0), False)
        if self.store_v_seq:
            v, kept = self._memories["v"].unsqueeze(0), self.v_seq
            fits = kept is not None and kept.shape[1:] == v.shape[1:] and kept.dtype == v.dtype
            self.v_seq = torch.cat((kept, v)) if kept is not None and fits else v.clone()
        return spikes[0]

    def _run(self, x_seq: Tensor, store: bool) -> tuple[Tensor, Tensor | None]:
        v, shape = self._memories["v"], x_seq.shape[1:]
        if isinstance(v, Tensor) and v.shape == shape:
            v = v.to(x_seq)
        else:
            start = (self.v_reset or 0.0) if isinstance(v, Tensor) else float(v)
            v = torch.full(shape, start, dtype=x_seq.dtype, device=x_seq.device)
        try:
            sj_run.check(x_seq, v, self.v_threshold, self.v_reset, shape)
            surrogate = self._surrogate()
        except Refused as refused:
            say(refused, "a compat.spikingjelly.IFNode runs step by step")
            spikes, v, v_seq = self._loop(x_seq, v, store)
        else:
            spikes, v, v_seq = sj_run.run(
                x_seq, v, self.v_threshold, self.v_reset, surrogate, self.detach_reset, store
            )
        self._memories["v"] = v
        return spikes, v_seq

    def _surrogate(self) -> _surrogate.Surrogate:
        if isinstance(self.surrogate_function, _surrogate.Surrogate):
            return _surrogate.resolve(self.surrogate_function)
        return sj_run.surrogate_of(self.surrogate_function)

    def _loop(self, x_seq: Tensor, v: Tensor, store: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Step by step in the dtype of the current."""
        spikes, voltages = [], []
        for x in x_seq:
            m = v + x
            spike = self.surrogate_function(m - self.v_threshold)
            fired = spike.detach() if self.detach_reset else spike
            if self.v_reset is None:
                v = m - fired * self.v_threshold
            else:
                v = fired * self.v_reset + (1.0 - fired) * m
            spikes.append(spike)
            voltages.append(v)
        return torch.stack(spikes), v, torch.stack(voltages) if store else None

    def extra_repr(self) -> str:
        """The arguments that differ between nodes."""
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, "
            f"detach_reset={self.detach_reset}, step_mode={self.step_mode!r}, "
            f"surrogate_function={self.surrogate_function!r}"
        )
