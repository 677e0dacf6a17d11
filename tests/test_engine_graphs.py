"""Capture and replay by shape, on a device that is none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from snnkernels.engine.graphs import CudaBackend, Graphs


class FakeBackend:
    """Replays by running the computation again into the places of the capture."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.nested = False
        self.fails: Exception | None = None
        self.depth = 0

    def capturing(self) -> bool:
        return self.nested

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.depth += 1
        assert self.depth == 1, "two turns at once"
        try:
            yield
        finally:
            self.depth -= 1

    def capture(self, run: Callable[[], tuple[Tensor, ...]]) -> Any:
        self.log.append("capture")
        if self.fails is not None:
            raise self.fails
        places = tuple(torch.full_like(answer, torch.nan) for answer in run())
        return (run, places), places

    def finish(self) -> None:
        self.log.append("finish")

    def replay(self, graph: Any) -> None:
        assert self.depth == 1, "a replay outside of a turn"
        self.log.append("replay")
        run, places = graph
        for place, answer in zip(places, run(), strict=True):
            place.copy_(answer)


class Layer:
    """What is computed, and how often Python ran it."""

    def __init__(self) -> None:
        self.weight = torch.tensor(2.0)
        self.runs = 0

    def __call__(self, x: Tensor, T: int) -> tuple[Tensor, ...]:
        self.runs += 1
        return x * self.weight * T, x.sum(0)


@pytest.fixture
def parts() -> tuple[Layer, FakeBackend, Graphs]:
    layer, backend = Layer(), FakeBackend()
    return layer, backend, Graphs(layer, backend, most=3)


def same(graphs: Graphs, x: Tensor, T: int, weight: float = 2.0, **given: Any) -> None:
    scaled, total = graphs(x, T=T, **given)
    assert torch.equal(scaled, x * weight * T)
    assert torch.equal(total, x.sum(0))


def test_first_runs_second_captures_later_replay(parts: Any) -> None:
    _, backend, graphs = parts
    for n, log in enumerate(([], ["capture", "replay"], ["replay"], ["replay"])):
        backend.log.clear()
        same(graphs, torch.randn(4, 3), T=8)
        assert backend.log == log, n
    assert len(graphs) == 1


def test_a_graph_for_each_shape_layout_dtype_and_number_of_steps(parts: Any) -> None:
    _, backend, graphs = parts
    graphs.most = 9
    x = torch.randn(4, 4)
    others: list[tuple[Tensor, int]] = [
        (x, 8), (x, 4), (x[:2], 8), (x.t(), 8), (x.double(), 8),
    ]  # fmt: skip
    for _ in range(3):
        for given, T in others:
            same(graphs, given, T)
    assert backend.log.count("capture") == len(graphs) == len(others)


def test_a_graph_captured_in_inference_mode_runs_outside_and_back(parts: Any) -> None:
    _, backend, graphs = parts
    with torch.inference_mode():
        for _ in range(2):
            same(graphs, torch.randn(4, 3), T=8)
    same(graphs, torch.randn(4, 3, requires_grad=True), T=8)
    with torch.inference_mode():
        same(graphs, torch.randn(4, 3), T=8)
    assert backend.log == ["capture", "replay", "replay", "replay"]
    assert not any(answer.requires_grad for answer in graphs(torch.randn(4, 3), T=8))


def test_answers_do_not_change_with_the_next_call(parts: Any) -> None:
    _, _, graphs = parts
    x = torch.ones(2, 2)
    for _ in range(2):
        graphs(x, T=1)
    before = graphs(x, T=1)
    kept = [t.clone() for t in before]
    graphs(x * 5, T=1)
    for a, b in zip(before, kept, strict=True):
        assert torch.equal(a, b)
    x.zero_()  # nor does a graph read the caller's tensor later
    same(graphs, torch.full((2, 2), 3.0), T=1)


def test_new_weights_drop_all_graphs(parts: Any) -> None:
    layer, backend, graphs = parts
    x = torch.randn(4, 3)
    for _ in range(3):
        same(graphs, x, T=8, version=("weights", 0))
    layer.weight = torch.tensor(3.0)
    backend.log.clear()
    same(graphs, x, T=8, weight=3.0, version=("weights", 1))
    assert (backend.log, len(graphs)) == (["finish"], 0)  # nobody reads what is freed
    backend.log.clear()
    same(graphs, x, T=8, weight=3.0, version=("weights", 1))
    assert backend.log == ["capture", "replay"]


def test_the_one_not_used_for_longest_is_dropped(parts: Any) -> None:
    _, backend, graphs = parts
    x = torch.randn(4)
    for T in (1, 2, 3):
        for _ in range(2):
            same(graphs, x, T)
    same(graphs, x, 1)
    same(graphs, x, 4)  # 2 goes
    backend.log.clear()
    same(graphs, x, 1)
    same(graphs, x, 3)
    assert backend.log == ["replay", "replay"]
    same(graphs, x, 2)
    assert backend.log == ["replay", "replay"]  # for the first time, again; 4 was no graph yet
    graphs.clear()
    assert len(graphs) == 0


def test_inside_somebody_elses_capture_it_just_runs(parts: Any) -> None:
    layer, backend, graphs = parts
    backend.nested = True
    for _ in range(3):
        same(graphs, torch.randn(3), T=2)
    assert (backend.log, layer.runs) == ([], 3)


def test_what_cannot_be_captured_runs_and_says_why(parts: Any) -> None:
    layer, backend, graphs = parts
    x = torch.randn(3)
    same(graphs, x, T=2)
    backend.fails = RuntimeError("operation not permitted when stream is capturing")
    for _ in range(3):
        same(graphs, x, T=2)
    assert backend.log == ["capture"]
    assert len(graphs) == 0
    assert graphs.why_not == "RuntimeError: operation not permitted when stream is capturing"
    assert layer.runs == 4


def test_an_error_of_the_computation_is_the_callers(parts: Any) -> None:
    _, backend, graphs = parts

    def broken(x: Tensor, T: int) -> tuple[Tensor, ...]:
        raise ValueError("spikes has shape")

    graphs.compute = broken
    for _ in range(2):
        with pytest.raises(ValueError, match="spikes has shape"):
            graphs(torch.ones(1), T=1)
    assert backend.depth == 0


def test_threads_take_turns(parts: Any) -> None:
    _, _, graphs = parts
    failed: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for i in range(20):
                same(graphs, torch.full((n % 2 + 1,), float(i)), T=n % 3 + 1)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def test_at_least_one_graph() -> None:
    with pytest.raises(ValueError, match="most=0"):
        Graphs(Layer(), FakeBackend(), most=0)


@pytest.mark.gpu
def test_cuda_graphs() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    layer = Layer()
    layer.weight = layer.weight.to(device)
    graphs = Graphs(layer, CudaBackend(device))
    other = torch.cuda.Stream()
    for i in range(12):
        x = torch.full((64, 33), float(i), device=device)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other if i % 2 else torch.cuda.current_stream()):
            same(graphs, x, T=8)
        torch.cuda.current_stream().wait_stream(other)
    assert (len(graphs), graphs.why_not) == (1, "")
    assert layer.runs == 2


def test_the_calls_of_cuda_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.cuda: turns wait for the one before, captures share pool and stream."""
    log: list[Any] = []

    class Entered:
        def __init__(self, *what: Any, **more: Any) -> None:
            self.what = (*what, *sorted(more.items()))

        def __enter__(self) -> None:
            log.append(("enter", *self.what))

        def __exit__(self, *error: Any) -> None:
            log.append(("exit", self.what[0]))

    class Logged:
        def __init__(self, name: str, *given: Any) -> None:
            self.name = name

        def __getattr__(self, call: str) -> Any:
            return lambda: log.append((self.name, call))

    device = torch.device("cuda", 1)
    cuda = {
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda d: f"stream of {d}",
        "Event": lambda: Logged("event"),
        "CUDAGraph": lambda: Logged("graph"),
        "device": lambda d: Entered("device", str(d)),
        "graph": lambda graph, **more: Entered("capture", **more),
        "is_current_stream_capturing": lambda: log.append("asked") or True,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    backend = CudaBackend(device)
    assert backend.capturing()
    assert log == [("enter", "device", "cuda:1"), "asked", ("exit", "device")]
    log.clear()
    answer = (torch.ones(1),)
    graph, answers = backend.capture(lambda: log.append("run") or answer)
    assert answers is answer
    how = (("capture_error_mode", "thread_local"), ("pool", "pool"), ("stream", "stream of cuda:1"))
    assert log == [("enter", "capture", *how), "run", ("exit", "capture")]
    log.clear()
    with backend.turn():
        backend.replay(graph)
    backend.finish()
    assert log == [
        ("enter", "device", "cuda:1"), ("event", "wait"), ("graph", "replay"), ("event", "record"),
        ("exit", "device"), ("event", "synchronize"),
    ]  # fmt: skip
    log.clear()
    with pytest.raises(RuntimeError, match="out of memory"), backend.turn():
        raise RuntimeError("out of memory")
    assert log[-2:] == [("event", "record"), ("exit", "device")]
