"""The converted network: a module that runs in time and answers like the ANN."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..bound import takes_methods
from .inputs import Inputs, Ports, as_given
from .means import FromMeans, RunningMean
from .parts import Parts
from .pools import CumulativeMaxPool
from .report import Report
from .spiking import SpikingActivation
from .steps import Clock

if TYPE_CHECKING:
    from pathlib import Path

    from torch.export import ExportedProgram

    from .certify import Certificate

__all__ = ["ConvertedNetwork"]

_WITH_STATE = (SpikingActivation, CumulativeMaxPool, RunningMean, FromMeans)


def _steps(T: Any) -> int:
    try:
        steps = 0 if isinstance(T, bool) else operator.index(T)
    except TypeError:
        steps = 0
    if steps < 1:
        raise ValueError(f"T must be a whole number of at least 1, got {T!r}")
    return steps


def _ends(steps: Any) -> list[int]:
    """The numbers of steps of a curve, ascending."""
    if isinstance(steps, str) or not isinstance(steps, Iterable):
        raise TypeError(f"steps={steps!r} must be whole numbers of at least 1, such as [1, 2, 4]")
    given = list(steps)
    if not given:
        raise ValueError("steps is empty: predict_curve needs at least one number of steps")
    try:
        return sorted({_steps(T) for T in given})
    except ValueError as error:
        raise ValueError(f"steps={given!r}: {error}") from None


@takes_methods
class ConvertedNetwork(nn.Module):
    """A spiking network made by :func:`snnkernels.convert`.

    Three graphs: ``prefix`` runs once on the input, ``body`` holds the neurons and runs T steps,
    ``suffix`` runs once on the rates of the last neurons. Every call starts from the initial
    potentials and leaves no state behind. Batch normalisation and dropout act as in evaluation,
    whatever :meth:`train` says.

    The weights are parameters that require a gradient, for fine-tuning: without
    ``torch.no_grad()`` a call takes the training path, which keeps every step's spikes and is
    about half as fast. Use ``torch.no_grad()`` for inference.

    Attributes:
        T: the number of steps the thresholds were made for, and the default of a call.
        extra_steps: what the method adds to the T steps of a call, in latency and in work.
        report: what was done with every node.
        metadata: what else is to travel with the network (names of classes, how inputs are
            prepared): a dict of plain JSON values, saved by :meth:`save_pretrained`.

    Shape: the inputs and the output of the ANN; any batch size.
    """

    def __init__(
        self,
        parts: Parts,
        T: int,
        report: Report,
        clock: Clock | None = None,
        ports: Ports | None = None,
    ) -> None:
        super().__init__()
        self._ports = Ports.single() if ports is None else ports
        self.T = _steps(T)
        self._clock = Clock() if clock is None else clock
        self.report = report
        self.metadata: dict[str, Any] = {}
        self.prefix, self.body, self.suffix = parts.prefix, parts.body, parts.suffix
        self._counted = list(parts.counted)
        self._of_body = list(parts.statics_of_body)
        self._of_suffix = list(parts.statics_of_suffix)
        self.eval()

    @property
    def extra_steps(self) -> int:
        """Steps that the method adds to T: probes, and windows in which layers wait."""
        return self.latency() - self.T

    def latency(self, T: int | None = None) -> int:
        """Steps until the answer for ``T`` (default: those of the conversion): all are counted.

        Raises:
            ValueError: T < 1 or not a whole number.
        """
        T = self.T if T is None else _steps(T)
        return T + self._clock.steps.added(T)

    def neurons(self) -> Iterator[tuple[str, SpikingActivation]]:
        """``(name in the ANN, layer)`` of every spiking layer, in order of execution."""
        for module in self.body.modules():
            if isinstance(module, SpikingActivation):
                yield module.label, module

    def reset(self) -> None:
        """Back to the initial potentials; calls do it themselves."""
        for module in self.body.modules():
            if isinstance(module, _WITH_STATE):
                module.reset()

    def train(self, mode: bool = True) -> ConvertedNetwork:
        """Set the flag of this module only: the converted layers stay in evaluation mode."""
        super().train(False)
        self.training = mode
        return self

    def _read(self, statics: Any, counts: Any, T: int, dtype: torch.dtype) -> Any:
        rates = []
        for path, count in zip(self._counted, counts, strict=True):
            layer = self.body.get_submodule(path)
            assert isinstance(layer, SpikingActivation)
            rates.append(layer.rate(count, T, dtype))
        return self.suffix(*(statics[i] for i in self._of_suffix), *rates)

    def _segments(self, x: Any, ends: list[int]) -> Iterator[Any]:
        """The answer after each number of steps in ``ends`` (rising), from one run."""
        self.reset()
        clock, steps = self._clock, self._clock.steps
        try:
            statics = self.prefix(x)
            inputs = [statics[i] for i in self._of_body]
            dtype = next(t.dtype for t in inputs if t.is_floating_point())
            if steps.parallel:
                for clock.levels in ends:
                    self.reset()
                    yield self._read(statics, self.body(*inputs, 1), clock.levels, dtype)
                return
            if steps.whole:
                runs = [[end] for end in ends] if steps.apart else [ends]
                for run in runs:
                    self.reset()
                    starts = [steps.first(end) for end in run]
                    marks = sorted({*run, *starts} - {0})
                    clock.ends, clock.levels = tuple(marks), run[-1]
                    found = self.body(*inputs, steps.rows(run[-1]))
                    for start, end in zip(starts, run, strict=True):
                        between = [counts[marks.index(end)] for counts in found]
                        if start:
                            before = [counts[marks.index(start)] for counts in found]
                            between = [b - a for a, b in zip(before, between, strict=True)]
                        yield self._read(statics, between, end - start, dtype)
                return
            counts: Any = None
            done = 0
            for end in ends:
                new = self.body(*inputs, end - done)
                counts = (
                    new if counts is None else [a + b for a, b in zip(counts, new, strict=True)]
                )
                done = end
                yield self._read(statics, counts, done, dtype)
        finally:
            clock.ends = None
            self.reset()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, in order; other parameters of the ANN keep their values."""
        return self._ports.names

    def forward(self, *inputs: Any, T: int | None = None, **named: Any) -> Any:
        """The ANN's output as estimated in ``T`` steps (default: those of the conversion).

        Args:
            inputs: what the ANN takes, ``[B, *]`` each, shown unchanged at every step.
            T: number of steps, at least 1.
            named: inputs by name.

        Raises:
            TypeError: inputs are missing, or the ANN does not have them.
            ValueError: T < 1 or not a whole number; the inputs differ in their batch; a parameter
                that is no input of the converted network has another value than at conversion.
        """
        T = self.T if T is None else _steps(T)
        one = len(inputs) == 1 and not named
        x = inputs[0] if one and isinstance(inputs[0], (Tensor, Inputs)) else Inputs(inputs, named)
        (out,) = self._segments(self._ports.bind(x), [T])
        return out

    def predict_curve(self, x: Any, steps: Iterable[int] = (1, 2, 4, 8, 16, 32)) -> dict[int, Any]:
        """The outputs after several numbers of steps, from one run: ``{T: output}``.

        At the price of the longest (a parallel network: of all together). The same as separate
        calls up to the rounding of the layers between neurons, which see batches of other sizes (a
        library may choose another algorithm for them); given the same currents, the neurons do the
        same bit for bit.

        Args:
            x: ``[B, *]``; of several inputs a tuple by position or a dict by name.
            steps: numbers of steps; order and repetitions do not matter.

        Raises:
            ValueError: ``steps`` is empty, or one is not a whole number of at least 1.
            TypeError: ``steps`` is no iterable of numbers.
        """
        ends = _ends(steps)
        x = self._ports.bind(as_given(x))
        return dict(zip(ends, self._segments(x, ends), strict=True))

    def certify(self, x: Any, T: int | None = None) -> Certificate:
        """What spike counts and answers can be, and which predictions are proven.

        Args:
            x: the inputs, ``[B, *]``; of several a tuple by position or a dict by name.
            T: number of steps (default: those of the conversion).

        See :func:`snnkernels.conversion.certify.certify`.
        """
        from .certify import certify

        return certify(self, x, T)

    if TYPE_CHECKING:  # from upper floors, bound in snnkernels/__init__.py

        def save_pretrained(self, folder: str | Path) -> Path:
            """Save into a folder, see :func:`snnkernels.hub.save_pretrained`."""
            ...

        def push_to_hub(
            self,
            repo_id: str,
            *,
            private: bool | None = None,
            token: str | bool | None = None,
            revision: str | None = None,
            create_pr: bool = False,
            commit_message: str = "Upload a network converted by snnkernels",
        ) -> Any:
            """Save to the Hugging Face Hub, see :func:`snnkernels.hub.push_to_hub`."""
            ...

        def export(
            self,
            example: Any,
            *,
            T: int | None = None,
            dynamic_batch: bool = True,
            operators: str = "snnkernels",
            strict: bool = False,
        ) -> ExportedProgram:
            """The network as ``torch.export`` has it, see :func:`snnkernels.hub.export`."""
            ...

        def over_time(self, x_seq: Tensor) -> Tensor:
            """Step by step, see :func:`snnkernels.interop.sequence.over_time`."""
            ...

    def extra_repr(self) -> str:
        """Show T and the number of spiking layers."""
        extra = f", extra_steps={self.extra_steps}" if self.extra_steps else ""
        return f"T={self.T}{extra}, spiking_layers={sum(1 for _ in self.neurons())}"
