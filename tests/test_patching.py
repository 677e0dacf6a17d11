"""The machinery of patch and unpatch, on an adapter of a library that does not exist."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnkernels
from snnkernels.interop import Adapter, Change, PatchError, Refused, adapters, register, swaps

theirs = ModuleType("otherlib")


class Neuron(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.inner = nn.Identity()
        self.register_buffer("v", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v + x.sum()
        return self.gain * x


class Cell(Neuron):
    """Patched by another module in its place."""


class Scaler(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


for cls in (Neuron, Cell, Scaler):
    cls.__module__ = "otherlib"
    setattr(theirs, cls.__name__, cls)


class Fast(Neuron):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Ours(nn.Module):
    def __init__(self, gain: float, v: Tensor) -> None:
        super().__init__()
        self.gain = gain
        self.register_buffer("v", v)

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v + x.sum()
        return self.gain * x


class Passing(Scaler):
    def forward(self, x: Tensor) -> Tensor:
        return self.partner[0].gain * x  # type: ignore[index, union-attr]


class Other(Adapter):
    library = "otherlib"

    def recognises(self, module: nn.Module) -> bool:
        return isinstance(module, Neuron)

    def replace(self, module: nn.Module, path: str) -> Any:
        assert isinstance(module, Neuron)
        if type(module) not in (Neuron, Cell):
            raise Refused(f"{type(module).__name__} has a forward of its own")
        if module.gain < 0:
            raise Refused("gain is negative")
        if type(module) is Cell:
            return Ours(module.gain, module.v.clone())
        return Fast

    def groups(self, model: nn.Module) -> Iterable[dict[nn.Module, Change]]:
        for module in model.modules():
            if isinstance(module, nn.Sequential) and [type(m) for m in module] == [Scaler, Neuron]:
                scaler, neuron = module
                yield {
                    scaler: Change(Passing, attributes={"partner": (neuron,)}, helper=True),
                    neuron: Change(Fast, "fused with its scaler"),
                }

    def restore(self, module: nn.Module, ours: nn.Module) -> None:
        super().restore(module, ours)
        module.v = ours.v


@pytest.fixture(autouse=True)
def other_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "otherlib", theirs)
    monkeypatch.setattr(adapters, "_ADAPTERS", {})
    register(Other())
    return


def test_a_class_swap_keeps_the_very_module() -> None:
    neuron = Neuron()
    seen: list[int] = []
    neuron.register_forward_hook(lambda *_: seen.append(1))
    model = nn.Sequential(nn.Linear(2, 2), neuron).eval()
    model(torch.ones(1, 2))
    v = neuron.v
    report = snnkernels.patch(model)
    assert model[1] is neuron
    assert type(neuron) is Fast
    assert not neuron.training
    assert neuron.v is v
    model(torch.ones(1, 2))
    assert seen == [1, 1]
    assert report
    assert report.counts == {"fused": 1, "already": 0, "refused": 0}
    (line,) = report
    assert (line.path, line.library, line.was) == ("1", "otherlib", "otherlib.Neuron")
    assert snnkernels.unpatch(model) == 1
    assert type(neuron) is Neuron
    assert set(neuron.__dict__) == set(Neuron().__dict__)
    assert snnkernels.unpatch(model) == 0


def test_a_module_in_the_place_of_another_and_back() -> None:
    shared = Cell(3.0)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())}).eval()
    assert isinstance(model["b"], nn.Sequential)
    report = snnkernels.patch(model)
    ours = model["a"]
    assert type(ours) is Ours
    assert ours is model["b"][0]
    assert not ours.training
    assert report.fused[0].shared == ("b.0",)
    assert "also b.0" in str(report)
    assert set(model.state_dict()) == {"a.v", "b.0.v"}  # the original is not part of the model
    ours(torch.ones(2))
    model.train()
    assert snnkernels.unpatch(model) == 1
    assert model["a"] is shared
    assert model["b"][0] is shared
    assert shared.v.item() == 2
    assert shared.training


def test_the_root_itself() -> None:
    neuron = Neuron()
    assert snnkernels.patch(neuron).fused[0].path == ""
    assert type(neuron) is Fast
    snnkernels.unpatch(neuron)
    assert type(neuron) is Neuron
    with pytest.warns(UserWarning, match="no parent to hold"):
        assert not snnkernels.patch(Cell())


def test_twice_is_once() -> None:
    model = nn.Sequential(Neuron(), Cell())
    snnkernels.patch(model)
    classes = [type(m) for m in model.modules()]
    again = snnkernels.patch(model)
    assert again.counts == {"fused": 0, "already": 2, "refused": 0}
    assert [type(m) for m in model.modules()] == classes
    assert snnkernels.unpatch(model) == 2
    assert [type(m) for m in model] == [Neuron, Cell]


def test_what_is_refused() -> None:
    class Mine(Neuron):
        pass

    def model() -> nn.Sequential:
        return nn.Sequential(Neuron(), Mine(), Neuron(-1.0))

    net = model()
    with pytest.warns(
        UserWarning, match=r"left 2 of 3 neurons.*1 \(.*Mine\): Mine has a forward"
    ) as warned:
        report = snnkernels.patch(net)
    assert warned[0].filename == __file__
    assert [type(m) for m in net] == [Fast, Mine, Neuron]
    assert [line.reason for line in report.refused] == [
        "Mine has a forward of its own",
        "gain is negative",
    ]
    assert "left as it is" in str(report)
    assert "1 fused, 2 refused" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snnkernels.patch(model(), on_refused="report")
    net = model()
    with pytest.raises(PatchError, match="nothing was changed") as error:
        snnkernels.patch(net, on_refused="error")
    assert len(error.value.report.refused) == 2
    assert [type(m) for m in net] == [Neuron, Mine, Neuron]


def test_groups_go_first_and_come_back() -> None:
    model = nn.Sequential(nn.Sequential(Scaler(), Neuron(5.0)), Scaler())
    report = snnkernels.patch(model)
    assert [(line.path, line.reason) for line in report] == [
        ("0.1", "fused with its scaler"),
    ]
    assert isinstance(model[0], nn.Sequential)
    assert type(model[0][0]) is Passing
    assert type(model[1]) is Scaler
    assert model[0](torch.ones(1)).item() == 25
    # A copy is a patched network of its own.
    twin = copy.deepcopy(model)
    assert twin[0][0].partner[0] is twin[0][1]
    assert snnkernels.patch(model).counts == {"fused": 0, "already": 1, "refused": 0}
    assert snnkernels.unpatch(twin) == 1
    assert snnkernels.unpatch(model) == 1
    assert model[0](torch.ones(1)).item() == twin[0](torch.ones(1)).item() == 10
    assert "partner" not in model[0][0].__dict__


def test_a_patched_model_is_pickled() -> None:
    # Classes by their names, as in a library that is installed.
    here = sys.modules[__name__]
    Fast.__module__ = here.__name__
    model = pickle.loads(pickle.dumps(snnkernels_patched(nn.Sequential(Neuron(2.0)))))
    assert type(model[0]) is Fast
    assert snnkernels.unpatch(model) == 1
    assert type(model[0]) is Neuron


def snnkernels_patched(model: nn.Module) -> nn.Module:
    snnkernels.patch(model)
    return model


def test_report_as_data() -> None:
    report = snnkernels.patch(nn.Sequential(Neuron(), Cell()))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["counts"] == {"fused": 2, "already": 0, "refused": 0}
    assert data["modules"][0]["path"] == "0"
    assert len(report) == 2
    assert "no neurons" in str(snnkernels.patch(nn.ReLU()))
    assert len(snnkernels.patch(nn.ReLU())) == 0


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="must be a torch"):
        snnkernels.patch(torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a torch"):
        snnkernels.unpatch("net")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_refused='never' is unknown"):
        snnkernels.patch(Neuron(), on_refused="never")
    with pytest.raises(TypeError, match="not a snnkernels"):
        register(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names no library"):
        register(Adapter())
    with pytest.raises(ValueError, match=r"'nolib' is unknown; known are .*'spikingjelly'"):
        snnkernels.patched("nolib").__enter__()
    with pytest.raises(ValueError, match="names no library"):
        snnkernels.patched().__enter__()


def test_swap_nests_and_comes_back() -> None:
    owner = SimpleNamespace(f=lambda x: x + 1)
    original = owner.f
    swap = swaps.Swap(lambda: [(owner, "f", lambda theirs: lambda x: 10 * theirs(x))])
    with swap():
        with swap():
            assert owner.f(1) == 20
        assert owner.f(1) == 20
    assert owner.f is original
    with pytest.raises(RuntimeError, match="inside"), swap():
        raise RuntimeError("inside")
    assert owner.f is original
    # Left in another order, from another thread.
    one, two = ExitStack(), ExitStack()
    one.enter_context(swap())
    two.enter_context(swap())
    thread = threading.Thread(target=one.close)
    thread.start()
    thread.join()
    assert owner.f(1) == 20
    two.close()
    assert owner.f is original
