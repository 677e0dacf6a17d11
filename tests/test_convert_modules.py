"""Module by module: networks whose own Python depends on the data."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import images, randomize, relative
from torch import Tensor, nn

import snnkernels
from snnkernels.conversion import QCFS, ConversionError, ConvertedNetwork, convert, convert_modules


class Backbone(nn.Module):
    def __init__(self, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.act1, self.act2 = nn.Conv2d(6, 3, 3, padding=1), act(), act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.conv2(self.act1(self.bn(self.conv1(x)))))


class Refine(nn.Module):
    """Runs its backbone until the answer is small enough: how often depends on the data."""

    def __init__(self, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone(act)
        self.head = nn.Sequential(nn.Linear(3, 8), act(), nn.Linear(8, 4))
        with torch.no_grad():
            self.backbone.conv2.weight.mul_(0.5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        rounds = 0
        while x.abs().mean() > 0.1:
            x = 0.5 * x + 0.5 * self.backbone(x)
            rounds += 1
        return {"answer": self.head(x.mean((2, 3))), "rounds": rounds}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return randomize(Refine())


@pytest.fixture(scope="module")
def x() -> Tensor:
    return images(6)


@torch.no_grad()
def test_a_loop_that_depends_on_the_data(net: nn.Module, x: Tensor) -> None:
    before = copy.deepcopy(net.state_dict())
    snn = convert_modules(net, ["backbone", "head"], x, threshold="max", T=256)
    expected, answer = net(x), snn(x)
    assert expected["rounds"] > 1
    assert answer["rounds"] == expected["rounds"]
    curve = snn.predict_curve(x, [16, 256])
    error = {T: relative(y["answer"], expected["answer"]) for T, y in curve.items()}
    assert error[256] < 0.02
    assert error[256] < error[16]
    assert torch.equal(curve[16]["answer"], snn(x, T=16)["answer"])
    assert torch.equal(snn(x)["answer"], answer["answer"])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert type(net.backbone) is Backbone
    assert list(snn.converted) == ["backbone", "head"]
    assert type(snn.network) is Refine


@torch.no_grad()
def test_calibration_sees_every_call(net: nn.Module, x: Tensor) -> None:
    seen: list[Tensor] = []
    handle = net.backbone.act1.register_forward_hook(lambda m, a, out: seen.append(out))
    net(x)
    handle.remove()
    assert len(seen) > 1
    highest = torch.cat(seen).amax((0, 2, 3))
    batches = x.split(3)  # a batch of its own may take fewer rounds: take the whole as one
    snn = convert_modules(net, "backbone", [x], threshold="max", progress=False)
    found = dict(snn.neurons())["backbone.act1"].node.v_threshold
    torch.testing.assert_close(found.view(-1), highest, atol=1e-5, rtol=1e-5)
    assert len(convert_modules(net, "backbone", batches, T=4, progress=False).converted) == 1


@torch.no_grad()
def test_the_report_has_the_rows_of_all_modules_and_the_whole_answer(
    net: nn.Module, x: Tensor
) -> None:
    snn = convert_modules(net, {"backbone": {"method": "srp"}, "head": None}, x, T=8)
    report = snn.report
    assert report.method == "srp, opi"
    assert "θ mmse" in report["backbone.act1"].action
    assert "θ mmse" in report["head.1"].action
    true = relative(snn(x)["answer"], net(x)["answer"])
    assert report["output.answer"].error == pytest.approx(true, rel=1e-6)
    text = str(report)
    rounds = net(x)["rounds"]
    assert f"backbone was called {rounds} times for the loader's first item" in text
    assert "backbone: srp adds 4 steps" in text
    assert snn.converted["backbone"].extra_steps == 4
    assert snn.converted["head"].extra_steps == 0


@torch.no_grad()
def test_parallel_modules_are_the_qcfs_network_without_data() -> None:
    net, x = randomize(Refine(lambda: QCFS(8, 2.0))), images(6)
    snn = convert_modules(net, ["backbone", "head"], method="parallel", T=8, fold=False)
    torch.testing.assert_close(snn(x)["answer"], net(x)["answer"])
    assert not any(row.name.startswith("output") for row in snn.report.rows)


def test_it_is_a_module_like_others(net: nn.Module, x: Tensor) -> None:
    snn = snnkernels.convert_modules(net, ["backbone"], x, T=4)
    answer = snn(x)["answer"]
    for twin in (copy.deepcopy(snn), pickle.loads(pickle.dumps(snn))):
        assert torch.equal(twin(x)["answer"], answer)
    assert torch.equal(snn.train()(x)["answer"], answer)
    assert snn.training
    assert not any(m.training for m in snn.network.modules())
    assert "T=4, spiking: backbone" in repr(snn)
    with pytest.raises(RuntimeError):
        snn(x[:, :2], T=3)
    assert [m.T for m in snn.converted.values()] == [4]  # given back whatever happened
    for T in (0, 1.5):
        with pytest.raises(ValueError, match="T must be a whole number"):
            snn(x, T=T)
    with pytest.raises(ValueError, match="steps is empty"):
        snn.predict_curve(x, [])


class Calls(nn.Module):
    """Calls its block by name and with constants, and knows it by two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()
        self.same = self.block
        self.steps = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        h = self.block(x, skip=y, gain=0.5)
        return self.steps[0](self.same(h, gain=0.5, skip=y))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, skip: Tensor | None = None, gain: float = 1.0) -> Tensor:
        h = F.relu(self.a(x))
        if skip is not None:
            h = h + F.relu(self.b(skip))
        return F.relu(self.c(gain * h))


@torch.no_grad()
def test_several_inputs_constants_and_two_names() -> None:
    net, (x, y) = Calls(), torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    item = {"x": x, "y": y}
    snn = convert_modules(net, "block", [item], inputs=lambda i: i, threshold="max", T=512)
    block = snn.converted["block"]
    assert block.inputs == ("x", "skip")
    assert snn.network.same is block
    assert relative(snn(x, y), net(x, y)) < 0.02
    assert torch.equal(snn(x=x, y=y), snn(x, y))
    assert torch.equal(snn.predict_curve((x, y), [512])[512], snn(x, y))
    with pytest.raises(ValueError, match=r"converted with gain=0\.5"):
        block(x, y, gain=2.0)


class Early(nn.Module):
    """Leaves early where it is sure: what the rest is called with is some of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.exit = nn.Linear(16, 3)
        self.rest = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        out = self.exit(h)
        unsure = out.softmax(1).amax(1) < 0.4
        if unsure.any():
            out[unsure] = self.rest(h[unsure])
        return out


def test_an_early_exit() -> None:
    net, x = Early(), torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConversionError, match=r"\['stem', 'rest'\], loader") as error:
        convert(net, x)
    assert "test_convert_modules.py" in str(error.value)
    assert "if unsure.any():" in str(error.value)
    snn = convert_modules(net, ["stem", "rest"], list(x.split(8)), threshold="max", T=1024)
    with torch.no_grad():
        difference = (snn(x) - net(x)).abs().amax(1)
    assert (difference < 0.05).float().mean() > 0.9  # the others decide the other way


# The error of convert names the line and this way.


class Loop(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.kind == "if":
            return h if h.sum() > 0 else -h
        if self.kind == "while":
            while h.norm() > 1:
                h = h / 2
        if self.kind == "item":
            h = h * float(h.max().item())
        if self.kind == "range":
            for _ in range(int(x[0, 0])):
                h = h + 1
        if self.kind == "iterate":
            h = torch.stack([row * 2 for row in h])
        return h


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("if", r"return h if h\.sum\(\) > 0 else -h"),
        ("while", r"while h\.norm\(\) > 1:"),
        ("item", r"h = h \* float\(h\.max\(\)\.item\(\)\)"),
        ("range", r"for _ in range\(int\(x\[0, 0\]\)\):"),
        ("iterate", r"h = torch\.stack\(\[row \* 2 for row in h\]\)"),
    ],
)
def test_control_flow_names_the_line_and_the_way_out(kind: str, line: str) -> None:
    words = rf"\(test_convert_modules\.py:\d+: {line}\).*snnkernels\.convert_modules\(ann, \['stem'"
    with pytest.raises(ConversionError, match=words):
        convert(Loop(kind), torch.rand(4, 6))


def test_the_error_says_if_no_module_can_be_converted() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else F.relu(x)

    with pytest.raises(ConversionError, match="no module of this network can be"):
        convert(nn.Sequential(Branch()), torch.rand(4, 6))


# Arguments.


def _once(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(3)


@pytest.mark.parametrize(
    ("modules", "given", "error", "words"),
    [
        ([], {}, ValueError, "modules is empty"),
        (["back"], {}, ValueError, r"'back', which is not a module of it; it has \['backbone'"),
        ([""], {}, ValueError, "'', which is not a module"),
        (["backbone", "backbone.conv1"], {}, ValueError, "'backbone.conv1' inside 'backbone'"),
        ({"head": {"T": 3}}, {}, ValueError, r"modules\['head'\] has 'T', which is the same for"),
        (["backbone.conv1"], {}, ConversionError, "module backbone.conv1: no activation found"),
        (["backbone", "head"], {"loader": "once"}, ValueError, "can be read only once"),
        (["backbone"], {"loader": []}, ConversionError, "module backbone: loader is empty"),
        (["backbone"], {"loader": ["a"]}, TypeError, "loader must yield tensors"),
        (["backbone"], {"loader": torch.rand(2, 5, 4, 4)}, ConversionError, "itself fails on item"),
        (["backbone"], {"T": 0}, ValueError, "T must be"),
        (["backbone"], {"method": "none"}, ValueError, "method='none' is not known"),
    ],
)
def test_arguments(
    net: nn.Module, x: Tensor, modules: Any, given: dict, error: type[Exception], words: str
) -> None:
    if given.get("loader") == "once":
        given = {"loader": _once(x)}
    with pytest.raises(error, match=words):
        convert_modules(net, modules, **{"loader": x, **given})


def test_a_module_that_is_never_called() -> None:
    net = Calls()
    data = torch.rand(4, 8)
    with pytest.raises(ConversionError, match="steps was never called while the network ran on"):
        convert_modules(net, ["steps"], [(data, data)], inputs=lambda i: i)


def test_the_root_has_a_T_of_its_own() -> None:
    class Net(Refine):
        def forward(self, x: Tensor, T: int = 3) -> Any:
            return super().forward(x)

    with pytest.raises(ConversionError, match="an input called T"):
        convert_modules(Net(), ["backbone"], images(2))


def test_one_pass_of_a_loader_that_can_be_read_once(net: nn.Module, x: Tensor) -> None:
    snn = convert_modules(net, ["backbone"], _once(x), T=4)
    assert isinstance(snn.converted["backbone"], ConvertedNetwork)


def test_hooks_are_left_out_and_said(x: Tensor) -> None:
    net = randomize(Refine())
    net.backbone.register_forward_hook(lambda m, a, out: 2 * out)
    assert "forward hooks of backbone were left out" in str(
        convert_modules(net, ["head"], x, T=2).report
    )
