"""What a method's own step may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from .calibration import Statistics
from .report import Report
from .source import Source
from .thresholds import Site

__all__ = ["Context"]


@dataclass
class Context:
    """A conversion under way.

    Attributes:
        model: the normalised ANN, its activations at ``site.path``, in eval mode.
        sites: one for each activation, in order.
        seen: statistics of the calibration data by path; empty without a loader.
        T: number of steps the conversion is for.
        sample: the loader's first inputs, or None.
        batches: gives the loader's batches anew (a loader that can be read only once: those that
            calibration has left), or None without a loader.
        report: to note what was done.
        progress: whether bars are wanted.
        source: of the batches, for passes that ranks share; None without a loader.
    """

    model: fx.GraphModule
    sites: list[Site]
    seen: dict[str, Statistics]
    T: int
    sample: Tensor | None
    batches: Callable[[], Iterator[Tensor]] | None
    report: Report
    progress: bool = True
    source: Source | None = None
