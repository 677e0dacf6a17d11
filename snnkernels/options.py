"""What some methods ask of a neuron beyond integrate, fire and reset."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Probe", "Signed"]

_INT32 = 2**31 - 1


class Signed(NamedTuple):
    """Spikes of -1 as well, guarded by the running count (Fast-SNN, ST-BIF).

    A step emits +1 where ``m >= v_threshold`` and the count so far is below ``high``; otherwise -1
    where ``m <= -margin`` (``m < 0`` if ``margin`` is 0) and the count is above ``low``. A spike of
    either sign is subtracted as ``v = m - spike * v_threshold``.

    Fast-SNN (Hu et al., TPAMI 2023) is ``Signed(margin=1e-3)``; ST-BIF (SpikeZIP, ICML 2024) with
    L levels is ``Signed(high=L)``.
    """

    low: int = 0
    high: int | None = None
    margin: float = 0.0

    def check(self) -> None:
        """Raises ValueError or TypeError that names the field."""
        for name, value in (("low", self.low), ("high", self.high)):
            if name == "high" and value is None:
                continue
            if type(value) is not int:
                raise TypeError(f"signed.{name}={value!r} must be an int")
            if not -_INT32 <= value <= _INT32:
                raise ValueError(f"signed.{name}={value} does not fit 32 bits")
        if self.high is not None and self.high < self.low:
            raise ValueError(f"signed.high={self.high} is below signed.low={self.low}")
        _check_margin("signed", self.margin)


class Probe(NamedTuple):
    """Steps that look at a neuron's residual membrane before its answer counts.

    ``kind="mask"`` (SRP, Hao et al., AAAI 2023): the first ``steps`` of the T rows are the probe.
    Neurons whose membrane after them is not above ``margin * v_threshold`` emit nothing in the
    remaining rows, which start from ``v_init`` again and alone are counted.

    ``kind="shift"`` (COS, Hao et al., ICLR 2023): the first ``steps`` rows are run beforehand,
    without output, and move ``v_init`` by as much as takes one spike away (membrane below 0 though
    it fired) or adds one (membrane at or above the threshold); then all T rows run. ``iterations``
    repeats the probe from the moved start, until the count is the one that all currents together
    ask for.
    """

    steps: int
    kind: str = "mask"
    margin: float = 1e-3
    iterations: int = 1

    def check(self) -> None:
        """Raises ValueError or TypeError that names the field."""
        if self.kind not in ("mask", "shift"):
            raise ValueError(f"probe.kind={self.kind!r} is unknown; allowed are 'mask' and 'shift'")
        for name, value in (("steps", self.steps), ("iterations", self.iterations)):
            if type(value) is not int:
                raise TypeError(f"probe.{name}={value!r} must be an int")
            if not 1 <= value <= _INT32:
                raise ValueError(f"probe.{name}={value} must be at least 1")
        if self.kind == "mask" and self.iterations != 1:
            raise ValueError(f"probe.iterations={self.iterations} is for kind='shift'")
        _check_margin("probe", self.margin)


def _check_margin(name: str, margin: float) -> None:
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise TypeError(f"{name}.margin={margin!r} must be a number")
    if not 0 <= margin < math.inf:
        raise ValueError(f"{name}.margin={margin!r} must be at least 0 and finite")
