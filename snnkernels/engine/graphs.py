"""A computation captured once for each shape of its inputs and number of steps, then replayed.

Between replays nothing runs in Python for a layer: at small batches the launches themselves are
what takes time. What a graph reads and writes lies at fixed places, so inputs are copied in,
answers copied out, and two replays never overlap. The CUDA calls are behind :class:`Backend`, so
that all decisions are tested without a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Backend", "CudaBackend", "Graphs"]

Answers = tuple[Tensor, ...]


class Backend(Protocol):
    """What :class:`Graphs` needs of a device."""

    def capturing(self) -> bool:
        """Whether what is run now is being captured by somebody."""

    def turn(self) -> AbstractContextManager[None]:
        """What is run inside comes, on the device, after all that ran inside before."""

    def capture(self, run: Callable[[], Answers]) -> tuple[Any, Answers]:
        """A graph of ``run`` and where its answers will lie; nothing is computed."""

    def replay(self, graph: Any) -> None:
        """Compute."""

    def finish(self) -> None:
        """Wait until the device is through with all turns."""


class CudaBackend:
    """CUDA graphs of one device, all in one pool of memory.

    The pool is shared, as no two graphs of it run at the same time: every turn waits for the one
    before, on whatever stream that was.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._last = torch.cuda.Event()

    def capturing(self) -> bool:
        """As :meth:`Backend.capturing`."""
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def turn(self) -> AbstractContextManager[None]:
        """As :meth:`Backend.turn`."""
        return _Turn(self.device, self._last)

    def capture(self, run: Callable[[], Answers]) -> tuple[Any, Answers]:
        """As :meth:`Backend.capture`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            answers = run()
        return graph, answers

    def replay(self, graph: Any) -> None:
        """As :meth:`Backend.replay`."""
        graph.replay()

    def finish(self) -> None:
        """As :meth:`Backend.finish`."""
        self._last.synchronize()


class _Turn:
    def __init__(self, device: torch.device, last: torch.cuda.Event) -> None:
        self._device, self._last = torch.cuda.device(device), last

    def __enter__(self) -> None:
        self._device.__enter__()
        self._last.wait()

    def __exit__(self, *error: Any) -> None:
        self._last.record()
        self._device.__exit__(*error)


class _Captured:
    """A graph with the memory that it reads and writes."""

    def __init__(self, backend: Backend, inputs: Sequence[Tensor], run: Callable[..., Any]) -> None:
        # Calls outside of inference_mode write there as well, whoever made the first ones.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [torch.empty_like(x, memory_format=torch.preserve_format) for x in inputs]
            self.graph, self.answers = backend.capture(lambda: run(*self.inputs))

    def replay(self, backend: Backend, inputs: Sequence[Tensor]) -> Answers:
        for place, x in zip(self.inputs, inputs, strict=True):
            place.copy_(x)
        backend.replay(self.graph)
        # The next replay writes over them.
        return tuple(answer.clone() for answer in self.answers)


class Graphs:
    """Runs a computation, by its graph where there is one.

    The first call of a shape runs the computation itself: libraries choose their algorithms and
    kernels are compiled then, and a shape that never comes back (the last batch of an epoch) costs
    no capture. The second call captures, later ones replay. Callable from any thread and on any
    stream.

    Attributes:
        why_not: what the capture raised; nothing is captured from then on. Empty: nothing.
    """

    def __init__(
        self,
        compute: Callable[..., Answers],
        backend: Backend,
        *,
        most: int = 8,
    ) -> None:
        """A computation, captured by need.

        Args:
            compute: ``compute(*inputs, T) -> answers``: tensors in, a tuple of tensors out, every
                allocation through torch, nothing read back to the host, the same work each time.
            backend: of the device of its inputs.
            most: graphs that are kept; of more, that which was not used for longest is dropped.

        Raises:
            ValueError: ``most`` is not allowed.
        """
        if most < 1:
            raise ValueError(f"most={most!r} must be at least 1")
        self.compute, self.backend, self.most = compute, backend, most
        self.why_not = ""
        self._version: Hashable = None
        self._graphs: dict[Hashable, _Captured | None] = {}  # None: seen once
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._drop(len(self._graphs))

    def _drop(self, number: int) -> None:
        """Those that were not used for longest."""
        for key in list(self._graphs)[: max(number, 0)]:
            if self._graphs[key] is not None:
                # Its memory goes to whoever asks next, on any stream.
                self.backend.finish()
            del self._graphs[key]

    def __call__(self, *inputs: Tensor, T: Any, version: Hashable = None) -> Answers:
        """The answers, as new tensors.

        Args:
            inputs: of the computation; a graph is for their shapes, strides, dtypes and device.
            T: number of steps, or what else of them the computation is told.
            version: of everything else that the computation reads (weights, settings); when it
                changes all graphs are dropped: they read what was there when they were captured.
        """
        with self._lock, torch.no_grad():
            if self.backend.capturing() or self.why_not:
                return self.compute(*inputs, T)
            if version != self._version:
                self.clear()
                self._version = version
            with self.backend.turn():
                return self._run(inputs, T)

    def _run(self, inputs: Sequence[Tensor], T: Any) -> Answers:
        shapes = tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        key = (shapes, T)
        seen = key in self._graphs
        graph = self._graphs.pop(key, None)
        if graph is None and seen:
            try:
                graph = _Captured(self.backend, inputs, lambda *given: self.compute(*given, T))
            except Exception as error:
                self.why_not = f"{type(error).__name__}: {error}"
                self.clear()
                return self.compute(*inputs, T)
        self._graphs[key] = graph  # the last is the one used last
        self._drop(len(self._graphs) - self.most)
        return self.compute(*inputs, T) if graph is None else graph.replay(self.backend, inputs)
