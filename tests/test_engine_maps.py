"""Plans on maps of uint8 spikes, as GPUs run them, in plain PyTorch on CPUs; graphs by a fake."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import multiprocessing
import os
import weakref
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import fused_conv_cases as cases
import pytest
import torch
from test_engine import NETWORKS, converted, counts_of, counts_of_plan, exact
from test_engine_int8 import LOWERED, network, oracle
from test_fused_conv import needs_triton, once
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from snnkernels import models
from snnkernels.conversion import ACTIVATIONS
from snnkernels.engine import built as built_module
from snnkernels.engine import lower, map_layers
from snnkernels.engine import plan as module
from snnkernels.engine.map_layers import MapLayer

CHECKPOINTS = os.environ.get("SNNKERNELS_CHECKPOINT", "").split()
PLANS_FUSE = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs take maps here, and all precisions."""
    monkeypatch.setattr(built_module, "_form", lambda device: "maps")
    every = ("float32", "float16", "bfloat16", "int8")
    monkeypatch.setitem(module.PRECISIONS, "cpu", every)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a fused kernel; its plain PyTorch form runs."""
    monkeypatch.setattr(map_layers, "why_not", lambda device, dtype: "")


@pytest.mark.parametrize("name", NETWORKS)
def test_all_counts_are_equal_where_sums_are_exact(name: str) -> None:
    snn, x = exact(name)
    plan = lower(snn)
    for T in (1, 7, 40):
        want, got = counts_of(snn, x, T), counts_of_plan(plan, x, T)
        assert got, plan.explain()
        for label, counts in got.items():
            assert torch.equal(counts, want[label]), f"{label} at T={T}"
        with torch.no_grad():
            assert torch.equal(plan(x, T=T), snn(x, T=T))
            curve, other = plan.predict_curve(x, (1, T)), snn.predict_curve(x, (1, T))
            assert all(torch.equal(curve[t], other[t]) for t in curve)


@pytest.mark.parametrize("name", ["vgg average", "residual", "mlp"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_fused_layers_give_the_same_counts(name: str, precision: str, fused: None) -> None:
    snn, x = exact(name)
    plan = lower(snn, precision=precision)
    want, got = counts_of(snn, x, 9), counts_of_plan(plan, x, 9)
    for label, counts in got.items():
        assert torch.equal(counts, want[label]), label
    (built,) = plan._built.values()
    layers = [m for m in built.body.modules() if isinstance(m, MapLayer)]
    assert sum(m.fused is not None for m in layers) == len(layers) - 1
    assert all("no convolution" in m.why for m in layers if m.fused is None)


@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.parametrize("together", [False, True])
def test_whole_numbers_are_the_same_bits_here(
    name: str, together: bool, request: pytest.FixtureRequest
) -> None:
    if together:
        request.getfixturevalue("fused")
    snn, x = network(name)
    plan = lower(snn, precision="int8")
    for T in (1, 6, 35):
        want, got = oracle(plan, x, T), counts_of_plan(plan, x, T)
        assert got.keys() == want.keys()
        for label, counts in got.items():
            assert torch.equal(counts, want[label]), f"{label} at T={T}"


def subject_of(name: str) -> tuple[Any, Tensor]:
    """A small network, or that of a checkpoint on one image of noise."""
    if not name.endswith(".safetensors"):
        return network(name)
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 32)
    ann = models.load_checkpoint(name, activations=ACTIVATIONS).model
    return converted(ann, x), x[:1]


def interpreted(name: str, T: int) -> tuple[dict[str, Tensor], list[bool]]:
    """Counts of a plan whose fused layers Triton interprets, and which layers are fused."""
    built_module._form = lambda device: "maps"
    module.PRECISIONS["cpu"] = ("int8",)
    snn, x = subject_of(name)
    plan = lower(snn, precision="int8")
    counts = counts_of_plan(plan, x, T)
    (built,) = plan._built.values()
    layers = [m for m in built.body.modules() if isinstance(m, MapLayer)]
    return counts, [layer.fused is not None for layer in layers]


@needs_triton
@once
# SNNKERNELS_CHECKPOINT=resnet10.safetensors: a network trained on CIFAR-10 as well.
@pytest.mark.parametrize("name", ["residual", "small cnn", *CHECKPOINTS])
def test_whole_numbers_are_the_same_bits_in_the_interpreter(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=cases.start) as pool:
        got, fused = pool.submit(interpreted, name, 3).result()
    assert fused == [False] + [True] * (len(fused) - 1)  # the first has a constant current
    monkeypatch.undo()
    snn, x = subject_of(name)
    want = counts_of_plan(lower(snn, precision="int8"), x, 3)  # by the kernel for CPUs
    assert got.keys() == want.keys()
    for label, counts in got.items():
        assert torch.equal(counts, want[label]), label


class Fake:
    """Captures by keeping the computation; a replay runs it and writes where the answers lie."""

    def __init__(self) -> None:
        self.captured = self.replayed = self.finished = 0

    def capturing(self) -> bool:
        return False

    def turn(self) -> Any:
        return contextlib.nullcontext()

    def capture(self, run: Any) -> tuple[Any, tuple[Tensor, ...]]:
        self.captured += 1
        answers = tuple(torch.empty_like(a) for a in run())
        return (run, answers), answers

    def replay(self, graph: Any) -> None:
        self.replayed += 1
        run, answers = graph
        for place, value in zip(answers, run(), strict=True):
            place.copy_(value)

    def finish(self) -> None:
        self.finished += 1


def test_calls_are_captured_by_shape_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(module, "_backend", lambda device: fake)
    snn, x = exact("residual")
    plan = lower(snn)
    want = snn(x, T=5)
    for _ in range(4):
        assert torch.equal(plan(x, T=5), want)
    assert (fake.captured, fake.replayed) == (1, 3)
    assert torch.equal(plan(x, T=6), snn(x, T=6))
    assert torch.equal(plan(x[:1], T=5), snn(x[:1], T=5))
    assert (fake.captured, fake.replayed) == (1, 3)
    curve = plan.predict_curve(x, (2, 5))
    curve = plan.predict_curve(x, (2, 5))
    assert fake.captured == 2
    assert torch.equal(curve[5], want)
    with torch.no_grad():
        next(snn.body.parameters()).mul_(2)
    assert torch.equal(plan(x, T=5), snn(x, T=5))
    assert fake.captured == 2
    assert fake.finished > 0
    off = lower(snn, without=["capture_graphs"])
    for _ in range(3):
        off(x, T=5)
    assert fake.captured == 2


def test_a_capture_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Fake):
        def capture(self, run: Any) -> Any:
            raise RuntimeError("no memory")

    monkeypatch.setattr(module, "_backend", lambda device: Failing())
    snn, x = exact("small cnn")
    plan = lower(snn)
    want = snn(x)
    for _ in range(3):
        assert torch.equal(plan(x), want)
    assert "none: RuntimeError: no memory" in str(plan.explain())


def test_batches_in_pieces() -> None:
    snn, x = exact("vgg average")
    plan = lower(snn, max_memory="64KiB")
    many = torch.cat([x] * 4)
    assert torch.equal(plan(many), snn(many))
    assert plan.peak_memory(1) > 0


class Peak(TorchDispatchMode):
    """Most bytes that tensors made inside take at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if id(storage) not in self.sizes:
                    weakref.finalize(storage, self.sizes.pop, id(storage), None)
                self.sizes[id(storage)] = storage.nbytes()
        self.most = max(self.most, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("name", ["vgg maximum", "residual", "small cnn"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_no_call_takes_more_than_planned(name: str, precision: str) -> None:
    snn, x = network(name)
    plan = lower(snn, precision=precision, max_memory="1GiB")
    many = torch.cat([x] * 4)
    plan(many, T=20)
    with Peak() as peak:
        plan(many, T=20)
    planned = plan.peak_memory(len(many), T=20)
    assert planned / 4 < peak.most <= planned


def test_pickled_and_copied_plans_run() -> None:
    snn, x = exact("small cnn")
    plan = lower(snn)
    want = plan(x)
    assert torch.equal(copy.deepcopy(plan)(x), want)


def test_explain_says_what_is_fused(fused: None) -> None:
    snn, x = exact("vgg maximum")
    text = str(lower(snn, precision="float16").explain(x))
    assert "fused" in text
    assert "apart: a cumulative max-pool" in text


def test_precisions_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    snn, x = exact("small cnn")
    with pytest.raises(ValueError, match="precision='float16' does not run on cpu; there are"):
        lower(snn, precision="float16")(x)
    meta = converted(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU()), x).to("meta")
    assert "not on one CPU or CUDA device" in lower(meta).why_not()


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOWERED)
def test_whole_numbers_are_the_same_bits_on_a_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    snn, x = network(name)
    other, _ = network(name)
    plan = lower(other.cuda(), precision="int8")
    got = counts_of_plan(plan, x.cuda(), 9)
    monkeypatch.undo()
    want = counts_of_plan(lower(snn, precision="int8"), x, 9)
    for label, counts in want.items():
        assert torch.equal(got[label].cpu(), counts), label
    if PLANS_FUSE:
        (built,) = plan._built.values()
        assert any(m.fused is not None for m in built.body.modules() if isinstance(m, MapLayer))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_graphs_replay_the_same_answers_on_a_gpu(precision: str) -> None:
    snn, x = exact("residual")
    snn, x = snn.cuda(), x.cuda()
    plan = lower(snn, precision=precision)
    want = [plan(x, T=T) for T in (5, 6)]
    for _ in range(3):
        for T, first in zip((5, 6), want, strict=True):
            assert torch.equal(plan(x, T=T), first)
    (built,) = plan._built.values()
    assert len(built.graphs) == 2, built.graphs.why_not
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(plan(x, T=5), want[0])
    if precision == "float32":
        with torch.no_grad():
            assert torch.equal(want[0], snn(x, T=5))
            next(snn.body.parameters()).mul_(2)
            assert torch.equal(plan(x, T=5), snn(x, T=5))
