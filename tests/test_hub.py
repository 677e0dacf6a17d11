"""Saved networks: the same bits when loaded, no code, whole files or none, clear refusals."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import any_networks as nets
import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import Everything, activation_for, images
from support import PACKAGE, in_a_process, optional
from torch import Tensor, nn

import snnkernels
from snnkernels.conversion import ops
from snnkernels.conversion.errors import ConversionError
from snnkernels.conversion.methods import DSR, STBIF, Advanced, BitSerial, Burst
from snnkernels.conversion.stochastic import stochastic_prefix
from snnkernels.hub import files, spiking, tables

optional("safetensors")


def network(act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), act(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 6, 3, padding=1), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(6, 10), act(), nn.Linear(10, 5)),
    ).eval()


X = images(4, size=6)


@pytest.fixture
def snn() -> snnkernels.ConvertedNetwork:
    return snnkernels.convert(network(), X, T=4, progress=False)


@torch.no_grad()
def same(snn: Any, again: Any, *x: Any, curve: tuple[int, ...] = (1, 3)) -> None:
    want, got = snn(*x), again(*x)
    for a, b in zip(
        torch.utils._pytree.tree_leaves(want), torch.utils._pytree.tree_leaves(got), strict=True
    ):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert str(again.report) == str(snn.report)
    assert (again.T, again.latency(), again.inputs) == (snn.T, snn.latency(), snn.inputs)
    assert [name for name, _ in again.neurons()] == [name for name, _ in snn.neurons()]
    if len(x) == 1:
        curves = [net.predict_curve(x[0], curve) for net in (snn, again)]
        assert all(torch.equal(curves[0][t], curves[1][t]) for t in curve)


# ---- round trips ---------------------------------------------------------------------------------

METHODS = [
    *(m["name"] for m in snnkernels.methods() if m["name"] != "advanced"),
    *(Advanced(iterations=2), BitSerial(unrolled=True), DSR(kind="lif"), STBIF(levels=4)),
    Burst(group=False),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_gives_the_same_bits(method: Any, tmp_path: Path) -> None:
    ann = network(activation_for(method))
    snn = snnkernels.convert(ann, X, method=method, T=4, progress=False)
    same(snn, snnkernels.load_pretrained(snn.save_pretrained(tmp_path / "net")), X)


@pytest.mark.parametrize("family", ["densenet", "shared", "unet", "se", "attention", "everything"])
def test_families_of_networks(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: nn.Module = {
        "densenet": lambda: nets.DenseNet(nn.ReLU),
        "shared": lambda: nets.Shared(nn.ReLU),
        "unet": lambda: nets.UNet(nn.ReLU, "size"),
        "se": lambda: nets.SENet(nn.ReLU, how="expand"),
        "attention": lambda: nets.Attention(nn.ReLU),
        "everything": Everything,
    }[family]()
    x = images(3)
    snn = snnkernels.convert(net.eval(), x, T=4, on_unsupported="mean", progress=False)
    same(snn, snnkernels.load_pretrained(snn.save_pretrained(tmp_path)), x)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "weights"},
        {"fold": False},
        {"v_init": "uniform"},
        {"v_init": "mse"},
        {"threshold": 1.25},
    ],
    ids=str,
)
def test_options_of_convert(options: dict[str, Any], tmp_path: Path) -> None:
    snn = snnkernels.convert(network(), X, T=4, progress=False, **options)
    same(snn, snnkernels.load_pretrained(snn.save_pretrained(tmp_path)), X)


class Several(nn.Module):
    """Two inputs, an option, a value that is not plain, names that are not, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({"größe-1": nn.Linear(6, 8), "größe_1": nn.Linear(3, 8)})
        self.words = nn.Embedding(5, 8)
        self.register_buffer("offset", torch.arange(8.0) / 8)
        self.out = nn.Linear(8, 4)

    def forward(
        self, x: Tensor, *, größe: Tensor, gain: float = 0.5, hook: Any = print
    ) -> dict[str, Any]:
        h = F.relu(self.layers["größe-1"](x) + gain * self.layers["größe_1"](größe))
        h = h + self.words(torch.tensor([3])) + self.offset
        h = F.relu(h) if hook is print else h
        return {"logits": self.out(h).log_softmax(-1), "all": (h[:, :2].mT, [h.mean(1)])}


def test_inputs_outputs_constants_and_names(tmp_path: Path) -> None:
    net, x, z = Several(), torch.randn(5, 6), torch.randn(5, 3)
    snn = snnkernels.convert(
        net, [(x, z)], inputs=lambda i: {"x": i[0], "größe": i[1]}, T=4, threshold="max"
    )
    again = snnkernels.load_pretrained(snn.save_pretrained(tmp_path))
    with torch.no_grad():
        want, got = snn(x, größe=z), again(x, größe=z, gain=0.5)
    assert torch.equal(want["logits"], got["logits"])
    assert type(got["all"]) is tuple
    assert torch.equal(want["all"][0], got["all"][0])
    with pytest.raises(ValueError, match=r"converted with gain=0\.5"):
        again(x, größe=z, gain=1.0)
    with pytest.raises(ValueError, match="converted with hook=<built-in function print>"):
        again(x, größe=z, hook=print)
    with pytest.raises(TypeError, match="takes x, größe"):
        again(x)


def test_dtype_memory_and_what_learns(tmp_path: Path) -> None:
    net = network().double().to(memory_format=torch.channels_last)
    snn = snnkernels.convert(net, X.double(), T=4, progress=False)
    weights = [p for p in snn.parameters() if p.dim() == 4]
    weights[0].requires_grad_(False)
    again = snnkernels.load_pretrained(snn.save_pretrained(tmp_path), device="cpu")
    same(snn, again, X.double())
    found = [p for p in again.parameters() if p.dim() == 4]
    assert [p.requires_grad for p in found] == [False, *(True for _ in found[1:])]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in found)
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    half = snnkernels.convert(network(), X, T=4, progress=False).half()
    loaded = snnkernels.load_pretrained(half.save_pretrained(tmp_path))
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {
        n: t.dtype for n, t in half.state_dict().items()
    }


def test_layers_without_weights_load_without_a_warning(tmp_path: Path) -> None:
    """Found by fuzzing: torch warns that it has nothing to draw."""
    with pytest.warns(UserWarning, match="zero-element"):
        net = nn.Sequential(nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    x = torch.zeros(4, 0)
    snn = snnkernels.convert(net, x, T=4, progress=False)
    snn.save_pretrained(tmp_path / "net")
    same(snn, snnkernels.load_pretrained(tmp_path / "net"), x)


def test_shared_weights_stay_shared_and_learn(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(self.act(self.a(x)))))

    x = torch.randn(5, 6)
    snn = snnkernels.convert(Tied(), x, T=4, progress=False)
    again = snnkernels.load_pretrained(snn.save_pretrained(tmp_path))
    same(snn, again, x)
    assert len(list(again.parameters())) == len(list(snn.parameters()))
    for net in (snn, again):
        net(x).sum().backward()
    grads = [[p.grad for p in net.parameters()] for net in (snn, again)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_everything_else_works_on_a_loaded_network(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path
) -> None:
    snn.metadata = {"classes": ["a", "b"], "mean": [0.5], "nested": {"ü": None}}
    again = snnkernels.load_pretrained(snn.save_pretrained(tmp_path))
    assert again.metadata == snn.metadata
    with torch.no_grad():
        assert torch.equal(snnkernels.lower(again)(X), snnkernels.lower(snn)(X))
    assert torch.equal(again.certify(X).low, snn.certify(X).low)
    once_more = again.save_pretrained(tmp_path / "again")
    for name in ("graph.json", "model.safetensors"):
        assert files.digest(once_more / name) == files.digest(tmp_path / name), name
    same(copy.deepcopy(again), snn, X)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: snnkernels" in card
    assert f'load_pretrained("{tmp_path.name}")' in card
    assert "| node |" in card


def test_the_same_network_gives_the_same_bytes(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path
) -> None:
    # Eight: an order that a hash table chooses shows in one of them.
    saves = [snn.save_pretrained(tmp_path / str(i) / "net") for i in range(8)]
    for name in ("graph.json", "model.safetensors", "config.json", "README.md"):
        assert len({(folder / name).read_bytes() for folder in saves}) == 1, name


def test_every_argument_of_a_neuron_is_saved_or_named() -> None:
    for cls in (snnkernels.IFNode, snnkernels.LIFNode):
        arguments = {*inspect.signature(snnkernels.IFNode).parameters}
        if cls is snnkernels.LIFNode:
            arguments |= {*inspect.signature(cls).parameters} - {"args", "kwargs"}
        saved = {*spiking._OPERANDS, *spiking._OPTIONS, *spiking._OTHERS}
        assert arguments <= saved, f"{cls.__name__}: save these too: {arguments - saved}"
        node = cls()
        assert {*vars(node), *node._buffers, *node._parameters} <= spiking._KNOWN


def test_what_a_save_would_drop_is_refused(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path
) -> None:
    (_, layer), *_ = snn.neurons()
    node = layer.node
    node.refractory = 3
    with pytest.raises(ConversionError, match=r"its IFNode has refractory, which"):
        snn.save_pretrained(tmp_path)
    del node.refractory
    node.register_buffer("gain", torch.ones(1))
    with pytest.raises(ConversionError, match="its IFNode has gain"):
        snn.save_pretrained(tmp_path)
    del node.gain

    class Own(snnkernels.surrogate.ATan):
        pass

    node.surrogate_function = Own()
    with pytest.raises(ConversionError, match="is a class of your own"):
        snn.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_a_monitor_stores_is_not_saved(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path
) -> None:
    plain = snn.save_pretrained(tmp_path / "plain")
    with snnkernels.VoltageMonitor(snn):
        watched = snn.save_pretrained(tmp_path / "watched")
    assert (watched / "graph.json").read_bytes() == (plain / "graph.json").read_bytes()


def test_loads_without_the_anns_code_and_other_packages(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path
) -> None:
    """A process in which nothing but torch, numpy and safetensors can be imported."""
    snn.save_pretrained(tmp_path / "net")
    with torch.no_grad():
        torch.save((X, snn(X)), tmp_path / "answer.pt")
    code = f"""
import sys
import torch, numpy, safetensors
blocked = {{"sklearn", "scipy", "matplotlib", "tqdm", "rich", "PIL", "huggingface_hub",
            "nir", "onnx", "test_hub", "conversion_helpers", "pytest", "hypothesis"}}
sys.modules.update(dict.fromkeys(blocked))  # importing one is an ImportError
import pickle
def refuse(*a, **k): raise AssertionError("unpickled")
answer = torch.load({str(tmp_path / "answer.pt")!r})
pickle.load = pickle.loads = torch.load = refuse
import snnkernels
snn = snnkernels.load_pretrained({str(tmp_path / "net")!r})
x, want = answer
with torch.no_grad():
    assert torch.equal(snn(x), want)
    assert torch.allclose(snnkernels.lower(snn)(x), want, atol=1e-5)
print("loaded", snnkernels.__file__)
"""
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded", str(PACKAGE / "__init__.py")]


class Around(nn.Module):
    """A layer of neurons, and ``last`` of the network and what they give, ``[B, 3]``."""

    def __init__(self, last: Callable[[Any, Tensor], Any], **more: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = nn.Linear(6, 6), nn.Linear(6, 3), last
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.last(self, F.relu(self.b(F.relu(self.a(x)))))


def nested(depth: int) -> nn.Module:
    net: nn.Module = nn.Linear(3, 3)
    for _ in range(depth):
        net = nn.Sequential(net)
    return net


@pytest.mark.parametrize(
    ("last", "more"),
    [
        pytest.param(last, more, id=name)
        for name, (last, more) in {
            "a weight used twice": (lambda net, h: F.linear(h, net.b.weight.t()), {}),
            "a name that is taken": (
                lambda net, h: net.b_weight(F.linear(h, net.b.weight.t())),
                {"b_weight": nn.Linear(6, 2)},
            ),
            "called, and what is in it": (
                lambda net, h: (
                    net.attention(*[h[:, None]] * 3)[0] + net.attention.out_proj(h)[:, None]
                ),
                {"attention": nn.MultiheadAttention(3, 1, batch_first=True)},
            ),
            "deep": (lambda net, h: net.deep(h), {"deep": nested(60)}),
            "recurrent": (
                lambda net, h: net.cell(h[:, None])[0][:, 0],
                {"cell": nn.GRU(3, 4, 2, bias=False, batch_first=True)},
            ),
            "long": (lambda net, h: getattr(net, "q" * 500)(h), {"q" * 500: nn.Linear(3, 3)}),
            "numbers": (
                lambda net, h: {"a b": h, 1: (h, float("-inf")), 1.5: [h[..., 0:2:1]]},
                {},
            ),
            "dtypes": (lambda net, h: (h.to(torch.float64), h.to(h.device), torch.Size([1])), {}),
            "devices": (lambda net, h: h.to(torch.device("cpu")).mT.mT, {}),
            "memory": (
                lambda net, h: h[..., None, None].contiguous(memory_format=torch.channels_last),
                {},
            ),
        }.items()
    ],
)
def test_paths_and_values_of_every_kind(
    last: Callable[[Any, Tensor], Any], more: dict[str, nn.Module], tmp_path: Path
) -> None:
    """Found by this test: a weight that two layers use was saved, and refused when loaded."""
    ann, x = Around(last, **more).eval(), images(4, 6, 1).flatten(1)
    snn = snnkernels.convert(ann, x, T=64, progress=False)
    again = snnkernels.load_pretrained(snn.save_pretrained(tmp_path / "net"))
    with torch.no_grad():
        assert repr(again(x)) == repr(snn(x))
        for got, want in zip(
            *(torch.utils._pytree.tree_leaves(y) for y in (snn(x), ann(x))), strict=True
        ):
            if isinstance(want, Tensor):
                assert (got - want).abs().max() < 0.1
    shared = [len({id(p) for p in network.parameters()}) for network in (snn, again)]
    assert shared[0] == shared[1]
    once_more = again.save_pretrained(tmp_path / "again")
    assert files.digest(once_more / "graph.json") == files.digest(tmp_path / "net/graph.json")


@pytest.mark.parametrize("kind", ["module", "buffer"])
@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile", "_graph"])
def test_names_that_torch_fx_has_too(name: str, kind: str, tmp_path: Path) -> None:
    """Found by this test: torch.fx looks for them first, and convert gave its errors."""
    value = nn.Linear(3, 3) if kind == "module" else nn.Buffer(torch.arange(3.0))
    taken = {f"{name}_": nn.Linear(3, 3)}

    def last(net: Any, h: Tensor) -> Any:
        held = getattr(net, name)
        return getattr(net, f"{name}_")(held(h) if kind == "module" else held + h)

    ann, x = Around(last, **{name: value}, **taken).eval(), torch.randn(4, 6)
    snn = snnkernels.convert(ann, x, T=64, progress=False)
    with torch.no_grad():
        assert (snn(x) - ann(x)).abs().max() < 0.1
    assert getattr(ann, name) is value
    same(snn, snnkernels.load_pretrained(snn.save_pretrained(tmp_path)), x)


def tuples(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = (value,)
    return value


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (lambda net, h: {None: h}, r"output .* a dict with the key None; keys can be"),
        (lambda net, h: {("a", 1): h}, r"a dict with the key \('a', 1\)"),
        (lambda net, h: {"it's": h}, r"the string \"it's\", which is not plain text"),
        (lambda net, h: (h, 2**63), "the int 9223372036854775808, which does not fit 64 bits"),
        (lambda net, h: (h, 1j), r"a builtins\.complex"),
        (lambda net, h: (h, torch.float8_e5m2), r"a torch\.dtype"),
        (lambda net, h: tuples(h, 51), "values nested more than 50 deep"),
        (lambda net, h: h * h.nbytes, r"getattr\('nbytes',\) is not one of H, T, data"),
        (lambda net, h: torch.linalg.norm(h), r"linalg_norm.* not in the list of those"),
        (
            lambda net, h: h + 0 * h.data_ptr(),
            "the method 'data_ptr' is not in",
        ),
        (
            lambda net, h: torch.sparse.mm(net.sparse, h.t()),
            "tensor of torch.float32, torch.sparse_coo on cpu; dense",
        ),
        (
            lambda net, h: getattr(net, "q" * 2500)(h),
            r"q \(call_module .* too long, or its modules",
        ),
    ],
)
def test_values_and_names_that_cannot_be_saved(
    last: Callable[[Any, Tensor], Any], words: str, tmp_path: Path
) -> None:
    """They are refused when saved, not when loaded."""
    more = {"q" * 2500: nn.Linear(3, 3), "sparse": nn.Buffer(torch.eye(3).to_sparse())}
    x = torch.randn(3, 6)
    snn = snnkernels.convert(Around(last, **more).eval(), x, T=4, progress=False)
    with pytest.raises(ConversionError, match=f"(?s){words}"):
        snn.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()


# ---- what cannot be saved ------------------------------------------------------------------------


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


class OwnConv(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


class OwnNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        """Takes whatever comes."""


class PlainConv(nn.Conv2d):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, 3, padding=1)


class WithPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Pair:
        y = self.net(x)
        return Pair(y, y + 1)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (WithPair(), r"Pair.*your own code.*return tuples"),
        (
            nn.Sequential(OwnNorm(3, track_running_stats=False), network()),
            r"0 .*own _check_input_dim: its code",
        ),
        (nn.Sequential(network(), nn.TransformerEncoderLayer(5, 1, 8)), "1 .*not in the list"),
    ],
)
def test_your_own_code_is_refused(net: nn.Module, words: str, tmp_path: Path) -> None:
    snn = snnkernels.convert(net.eval(), X, T=2, progress=False)
    with pytest.raises(ConversionError, match=f"(?s){words}"):
        snn.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_plain_subclasses_and_parametrizations_are_layers(tmp_path: Path) -> None:
    conv = PlainConv(3, 3)
    nn.utils.parametrizations.weight_norm(conv)
    net = nn.Sequential(conv, nn.ReLU(), PlainConv(3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    snn = snnkernels.convert(net.eval(), X, T=2, progress=False)
    same(snn, snnkernels.load_pretrained(snn.save_pretrained(tmp_path)), X)


def test_what_a_convolution_calls_is_part_of_the_graph(tmp_path: Path) -> None:
    """A method of a subclass that its torch forward calls: of operations of torch."""
    net = nn.Sequential(OwnConv(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), network()).eval()
    snn = snnkernels.convert(net, X, T=256, progress=False)
    with torch.no_grad():
        assert (snn(X) - net(X)).abs().max() < 0.05 * net(X).abs().max()
    same(snn, snnkernels.load_pretrained(snn.save_pretrained(tmp_path)), X)


def test_what_is_no_converted_network(snn: snnkernels.ConvertedNetwork, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got Plan; save the network and lower it again"):
        snnkernels.ConvertedNetwork.save_pretrained(snnkernels.lower(snn), tmp_path)
    with pytest.raises(ConversionError, match="call stochastic_prefix again"):
        stochastic_prefix(snn, std=0.1).network.save_pretrained(tmp_path)
    snn.metadata = {"x": {1, 2}}  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"snn\.metadata cannot be written as JSON"):
        snn.save_pretrained(tmp_path)
    snn.metadata = {1: "x"}  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"snn\.metadata must be a dict"):
        snn.save_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    snn.metadata = {}
    with pytest.raises(NotADirectoryError, match="is a file"):
        snn.save_pretrained(tmp_path / "file")


def test_networks_converted_in_part_are_saved_in_parts(tmp_path: Path) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if float(x.sum()) > -1e9 else x

    whole = snnkernels.convert_modules(Loop(), ["net"], X, T=2, progress=False)
    with pytest.raises(ConversionError, match=r"module by module .*'net'"):
        whole.save_pretrained(tmp_path)
    part = whole.network.get_submodule("net")
    assert isinstance(part, snnkernels.ConvertedNetwork)
    same(part, snnkernels.load_pretrained(part.save_pretrained(tmp_path)), X)


# ---- files ---------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_one(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """os.replace fails at its first, second, ... call: the folder holds the old save or the new."""
    folder = tmp_path / "net"
    other = snnkernels.convert(network(activation_for("qcfs")), X, method="qcfs", T=2)
    replace, seen = os.replace, set()
    for allowed in range(6):
        shutil.rmtree(folder, ignore_errors=True)
        snn.save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
        calls = []

        def failing(a: Any, b: Any, calls: list[Any] = calls, allowed: int = allowed) -> None:
            calls.append(a)
            if len(calls) > allowed:
                raise OSError("killed")
            replace(a, b)

        monkeypatch.setattr(os, "replace", failing)
        if allowed < 5:
            with pytest.raises(OSError, match="killed"):
                other.save_pretrained(folder)
        else:
            other.save_pretrained(folder)
        monkeypatch.setattr(os, "replace", replace)
        found = snnkernels.load_pretrained(folder)
        want = snn if allowed == 0 else other
        same(want, found, X)
        seen.add(found.T)
        assert (folder / "notes.txt").read_text() == "mine"
        # The next save goes on from there.
        snn.save_pretrained(folder)
        same(snn, snnkernels.load_pretrained(folder), X)
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            ["README.md", "config.json", "graph.json", "model.safetensors", "notes.txt"]
        )
    assert seen == {2, 4}


def test_a_first_save_that_fails_leaves_nothing_that_loads(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        snn.save_pretrained(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "net").mkdir()
    with pytest.raises(OSError, match="disk full"):
        snn.save_pretrained(tmp_path / "net")
    assert list((tmp_path / "net").iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        snnkernels.load_pretrained(tmp_path / "net")


@pytest.fixture
def folder(snn: snnkernels.ConvertedNetwork, tmp_path: Path) -> Path:
    return snn.save_pretrained(tmp_path / "net")


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_weights(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors: \d+ bytes, but config\.json says"):
        snnkernels.load_pretrained(folder)
    rewrite(folder)  # and where the sizes agree, safetensors itself says so
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        snnkernels.load_pretrained(folder)


def test_one_bit_of_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: its SHA-256 is not the one in"):
        snnkernels.load_pretrained(folder)


def test_a_header_that_promises_more(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    rewrite(folder)
    with pytest.raises(ValueError, match="damaged"):
        snnkernels.load_pretrained(folder)


def test_missing_files_and_names_that_are_none(folder: Path, tmp_path: Path) -> None:
    (folder / "graph.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"graph\.json is missing"):
        snnkernels.load_pretrained(folder)
    for name in ("nowhere", "../up", "a/b/c", "/abs/olute", "-x/y"):
        with pytest.raises(FileNotFoundError, match="is no folder, and no id"):
            snnkernels.load_pretrained(name)
    with pytest.raises(TypeError, match="must be a folder or a hub id, got int"):
        snnkernels.load_pretrained(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        snnkernels.load_pretrained(tmp_path)


def rewrite(
    folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, name: str = ""
) -> None:
    """Change a JSON file, and have config.json agree with what is there now."""
    if change is not None:
        given = json.loads((folder / name).read_text())
        change(given)
        (folder / name).write_text(json.dumps(given))
    config = json.loads((folder / "config.json").read_text())
    for each in ("graph.json", "model.safetensors"):
        data = (folder / each).read_bytes()
        config["files"][each] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if name != "config.json" or change is None or "files" in config:
        (folder / "config.json").write_text(json.dumps(config))


def nodes(graph: dict[str, Any], op: str, part: str = "body") -> dict[str, Any]:
    return next(n for n in graph[part]["nodes"] if n["op"] == op)


def neuron(graph: dict[str, Any]) -> dict[str, Any]:
    return next(m for m in graph["modules"] if m["kind"] == "SpikingActivation")["args"]


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set ``given[a][b]... = value``."""

    def change(given: Any) -> None:
        for key in path[:-2]:
            given = given[key]
        given[path[-2]] = path[-1]

    return change


def layer(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    """The first module of that kind."""
    return next(m for m in graph["modules"] if m["kind"] == kind)


def add(kind: str, **more: Any) -> Callable[[dict[str, Any]], None]:
    """One module more; args that are not named are 0."""

    def change(graph: dict[str, Any]) -> None:
        fields = tables.LAYERS[kind][1] if kind in tables.LAYERS else ()
        given = {**dict.fromkeys(fields, 0), **more.pop("args", {})}
        graph["modules"].append({"name": "x", "kind": kind, "args": given, **more})

    return change


def insert(op: str, target: Any, *args: Any, **kwargs: Any) -> Callable[[dict[str, Any]], None]:
    """One node more in the suffix, behind its input; "x" in args is that input."""

    def change(graph: dict[str, Any]) -> None:
        nodes = graph["suffix"]["nodes"]
        given = [{"node": nodes[0]["name"]} if a == "x" else a for a in args]
        node = {"name": "new", "op": op, "target": target, "args": given, "kwargs": kwargs}
        nodes.insert(1, node)

    return change


NODE, SUFFIX = r"args\.node", r"suffix\.nodes\[1\]"
EVIL = "__import__('os').system('touch pwned')"
FUNCTION = {"name": "evil", "op": "call_function", "args": [], "kwargs": {}}
GRAPHS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "function": (
        lambda g: g["suffix"]["nodes"].insert(
            1, {**FUNCTION, "target": "os.system", "args": ["ls"]}
        ),
        r"suffix\.nodes\[1\]\.target: got 'os\.system'; allowed: functions of the list",
    ),
    "import": (
        lambda g: g["prefix"]["nodes"].insert(1, {**FUNCTION, "target": "builtins.__import__"}),
        r"prefix\.nodes\[1\]\.target: got 'builtins\.__import__'",
    ),
    "torch.load": (
        lambda g: g["prefix"]["nodes"].insert(1, {**FUNCTION, "target": "torch.load"}),
        r"got 'torch\.load'",
    ),
    "placeholder": (
        lambda g: nodes(g, "placeholder").update(name=f"x={EVIL}", target=f"x={EVIL}"),
        r"body\.nodes\[0\]\.name: got .* allowed: a new name of letters",
    ),
    "placeholder target": (
        lambda g: nodes(g, "placeholder").update(target=f"x={EVIL}"),
        r"body\.nodes\[0\]\.target",
    ),
    "keyword": (
        lambda g: nodes(g, "call_module").update(kwargs={f"a={EVIL}, b": 1}),
        r"kwargs: got",
    ),
    "string": (
        lambda g: nodes(g, "call_module").update(args=[f'"+{EVIL}+"']),
        r"args: got .*plain text",
    ),
    "dunder": (
        lambda g: g["suffix"]["nodes"].insert(
            1,
            {
                **FUNCTION,
                "target": "builtins.getattr",
                "args": [{"node": g["suffix"]["nodes"][0]["name"]}, "__class__"],
            },
        ),
        r"suffix\.nodes\[1\]\.args: got .*__class__",
    ),
    "method": (
        lambda g: g["suffix"]["nodes"].insert(
            1,
            {
                **FUNCTION,
                "op": "call_method",
                "target": "tofile",
                "args": [{"node": g["suffix"]["nodes"][0]["name"]}, "x"],
            },
        ),
        r"suffix\.nodes\[1\]\.target: got 'tofile'",
    ),
    "op": (lambda g: nodes(g, "call_module").update(op="exec"), r"\.op: got 'exec'"),
    "later node": (
        lambda g: nodes(g, "call_module").update(args=[{"node": "output"}]),
        "'output' is no node before it",
    ),
    "module path": (
        lambda g: g["body"]["modules"].update({"../../x": 0}),
        r"body\.modules: got '\.\./\.\./x'",
    ),
    "nested paths": (
        lambda g: g["body"]["modules"].update({f"{next(iter(g['body']['modules']))}.node": 0}),
        "no path inside that of",
    ),
    "module number": (
        lambda g: g["body"]["modules"].update({next(iter(g["body"]["modules"])): 10**6}),
        r"got '1000000'; allowed: the number of a module",
    ),
    "kind": (
        lambda g: g["modules"][1].update(kind="subprocess.Popen"),
        r"modules\[1\]\.kind: got 'subprocess\.Popen'; allowed: one of",
    ),
    "negative size": (
        lambda g: next(m for m in g["modules"] if m["kind"] == "torch.nn.Linear")["args"].update(
            in_features=-3
        ),
        r"modules\[\d+\] \(torch\.nn\.Linear\)",
    ),
    "huge size": (
        lambda g: next(m for m in g["modules"] if m["kind"] == "torch.nn.Linear")["args"].update(
            in_features=2**40
        ),
        r"modules\[\d+\]",
    ),
    "unknown argument": (
        lambda g: next(m for m in g["modules"] if m["kind"] == "torch.nn.Linear")["args"].update(
            device="cuda"
        ),
        r"modules\[\d+\]\.args: got .*device",
    ),
    "threshold NaN": (
        lambda g: neuron(g)["node"].update(v_threshold={"float": "nan"}),
        r"modules\[\d+\]\.args\.node\.v_threshold: got 'nan'; allowed: positive finite",
    ),
    "scale not finite": (
        lambda g: neuron(g)["node"].update(input_scale={"float": "inf"}),
        r"node\.input_scale: got 'a value that is not finite'",
    ),
    "no flag": (
        lambda g: neuron(g)["node"].update(store_count=[[]]),
        r"node\.store_count: got .*allowed: true or false",
    ),
    # What is left out would be a default, and the numbers others.
    "neuron's field left out": (
        lambda g: neuron(g)["node"].pop("input_scale"),
        r"args\.node: got 'no input_scale'; allowed: exactly",
    ),
    "layer's field left out": (lambda g: neuron(g).pop("scale"), "args: got 'no scale'"),
    "layers without end": (
        lambda g: g["modules"].append(
            {
                **{"name": "x", "kind": "torch.nn.RNN", "tensors": {}},
                "args": dict.fromkeys(tables.LAYERS["torch.nn.RNN"][1], 10**8),
            }
        ),
        r"args\.num_layers: got '100000000'",
    ),
    "argument left out": (
        lambda g: next(m for m in g["modules"] if m["kind"] == "torch.nn.Conv2d")["args"].pop(
            "stride"
        ),
        r"modules\[\d+\]\.args: got 'no stride'",
    ),
    "surrogate's width left out": (
        lambda g: neuron(g)["node"]["surrogate"].pop("alpha"),
        r"surrogate: got .*with its own arguments",
    ),
    "threshold negative": (
        lambda g: neuron(g)["node"].update(v_threshold=-1.0),
        r"node\.v_threshold: got '-1\.0'",
    ),
    "threshold word": (
        lambda g: neuron(g)["node"].update(v_threshold="half"),
        r"node\.v_threshold: got 'half'",
    ),
    "tie": (lambda g: neuron(g)["node"].update(tie="<"), r"SpikingActivation.*tie='<'"),
    "surrogate": (
        lambda g: neuron(g)["node"].update(surrogate={"name": "os.system"}),
        r"surrogate: got .*allowed: one of atan",
    ),
    "label": (lambda g: neuron(g).update(label=3), r"args\.label: got '3'"),
    "tensor name": (
        lambda g: neuron(g).update(scale="../../etc/passwd"),
        r"tensor: got '\.\./\.\./etc/passwd'",
    ),
    "tensor shape": (
        lambda g: next(iter(g["tensors"].values())).update(shape=[2, 2]),
        r"tensors\..*allowed: float32\[.*which is what the file of weights holds",
    ),
    "tensor missing": (
        lambda g: g["tensors"].update(more={"shape": [1], "dtype": "float32", "role": "buffer"}),
        r"the file of weights lacks \['more'\]",
    ),
    "tensor left out": (
        lambda g: g["tensors"].pop(next(iter(g["tensors"]))),
        "the file of weights has .* beside those named",
    ),
    "role": (
        lambda g: next(iter(g["tensors"].values())).update(role="code"),
        r"role: got 'code'",
    ),
    "order": (
        lambda g: next(t for t in g["tensors"].values() if len(t["shape"]) == 4).update(
            order=[0, 0, 1, 9]
        ),
        r"order: got",
    ),
    "no output": (lambda g: g["suffix"]["nodes"].pop(), "the last node"),
    "part": (put("body", []), r"body: got '\[\]'"),
    "version": (put("format_version", 2), r"format_version: got '2'"),
    # Values of arguments.
    **{
        f"value {value!r:.40}": (
            insert("call_function", "torch.abs", "x", value),
            rf"{SUFFIX}\.args: got .*{words}",
        )
        for value, words in (
            (2**63, r"9223372036854775808 does not fit 64 bits"),
            ({"node": "x", "tensor": "y"}, "is no value of a graph"),
            ({"tensor": "0.weight"}, "is no value of a graph"),
            ({"float": "1"}, "is no value of a graph"),
            ({"ellipsis": 1}, "is no value of a graph"),
            ({"slice": [1, 2]}, "is no value of a graph"),
            ({"tuple": 3}, "is no value of a graph"),
            ({"dict": [[1, 2], [3]]}, "is no value of a graph"),
            ({"dict": [[None, 2]]}, "is no value of a graph"),
            ({"dtype": "float8_e5m2"}, "is no value of a graph"),
            ({"memory_format": "mine"}, "is no value of a graph"),
            ({"device": "cpu; ls"}, "is no value of a graph"),
            ("a\nb", "not plain text"),
        )
    },
    "a keyword of Python": (
        insert("call_function", "torch.abs", "x", **{"class": 1}),
        "suffix: got .*allowed: a graph that torch.fx accepts",
    ),
    "tensors": (put("tensors", []), r"tensors: got '\[\]'; allowed: an object"),
    "tensor": (
        lambda g: g["tensors"].update({next(iter(g["tensors"])): 3}),
        r"tensors\..*: got '3'; allowed: an object",
    ),
    "format": (
        put("format", "snnkernels"),
        "format: got 'snnkernels'; allowed: 'snnkernels-graph'",
    ),
    "outputs of the body": (
        lambda g: g["body"]["nodes"][-1].update(args=[{"tuple": []}]),
        r"body has 0 outputs; allowed: 1",
    ),
    "spread": (put("spread", [[0, 0]]), r"spread: got '\[0, 0\]'; allowed: pairs of"),
    # Nodes.
    "fields of a node": (lambda g: g["suffix"]["nodes"][1].pop("args"), rf"{SUFFIX}: got"),
    "nodes": (put("suffix", "nodes", {}), r"suffix\.nodes: got '\{\}'; allowed: a list"),
    "no nodes": (put("suffix", "nodes", []), r"suffix\.nodes: got 'the last node'"),
    "modules of a part": (put("suffix", "modules", []), r"suffix\.modules: got '\[\]'"),
    "behind the output": (
        lambda g: g["suffix"]["nodes"].append({**FUNCTION, "target": "torch.abs"}),
        "got 'evil'; allowed: nothing behind the output",
    ),
    "args no list": (lambda g: g["suffix"]["nodes"][1].update(args=3), "args must be a list"),
    "kwargs no object": (lambda g: g["suffix"]["nodes"][1].update(kwargs=[]), "kwargs an object"),
    "the name self": (lambda g: g["suffix"]["nodes"][1].update(name="self"), r"name: got 'self'"),
    "a word of Python": (
        lambda g: g["suffix"]["nodes"][1].update(name="class"),
        r"name: got 'class'; allowed: a name that torch\.fx accepts",
    ),
    "output with a name": (
        lambda g: g["suffix"]["nodes"][-1].update(target="x"),
        r"target: got 'x'; allowed: output, and one argument",
    ),
    "method of no node": (insert("call_method", "abs", 3), "a method is called on a node"),
    "no module there": (insert("call_module", "nowhere", "x"), "a path under modules"),
    "no constant there": (insert("get_attr", "nowhere"), "a path under attributes"),
    "no function": (insert("call_function", ["torch.abs"]), rf"{SUFFIX}\.target: got"),
    "attribute": (insert("call_function", "builtins.getattr", "x", "grad_fn"), "grad_fn.*not one"),
    "attribute of a number": (insert("call_function", "builtins.getattr", 3, "T"), "of a node"),
    "attribute of nothing": (insert("call_function", "builtins.getattr"), "attribute of a tensor"),
    "attribute by keyword": (
        insert("call_function", "builtins.getattr", "x", "T", default=1),
        "getattr is of a node",
    ),
    **{
        f"path {path}": (
            lambda g, path=path: g["body"]["modules"].update({path: 0}),
            rf"body\.modules: got '{path}'; allowed: no name of an attribute of modules",
        )
        for path in ("forward", "graph", "training", "_modules", "x.train", "__class__")
    },
    # Modules.
    "modules": (put("modules", {}), r"modules: got '\{\}'; allowed: a list"),
    "module": (put("modules", 1, 3), r"modules\[1\]: got '3'; allowed: an object"),
    "args of a module": (put("modules", 1, "args", 3), r"modules\[1\]\.args: got '3'"),
    "tensors of a module": (
        lambda g: layer(g, "torch.nn.Linear").update(tensors=[]),
        r"tensors: got '\[\]'; allowed: an object",
    ),
    "tensors that are missing": (
        lambda g: layer(g, "torch.nn.Linear")["tensors"].pop("bias"),
        r"tensors: got \"\['weight'\]\"; allowed: \['bias', 'weight'\]",
    ),
    "another layer's tensor": (
        lambda g: layer(g, "torch.nn.Linear")["tensors"].update(
            weight=layer(g, "torch.nn.Linear")["tensors"]["bias"]
        ),
        r"tensors\.weight: got '\(10,\)'; allowed: \(10, 6\)",
    ),
    "buffer as a weight": (
        lambda g: g["tensors"][layer(g, "torch.nn.Linear")["tensors"]["bias"]].update(
            role="buffer"
        ),
        "bias is a parameter, not a buffer",
    ),
    "pool of a pool": (
        add("CumulativeMaxPool", pool={"kind": "CumulativeMaxPool"}),
        r"pool: got .*allowed: a max-pool of torch\.nn",
    ),
    "pool": (add("CumulativeMaxPool", pool=3), r"pool: got '3'; allowed: a max-pool"),
    "counted layer": (
        lambda g: g["modules"].append(
            {
                **{"name": "x", "kind": "CountSpikes"},
                "layer": g["modules"].index(layer(g, "torch.nn.Linear")),
            }
        ),
        r"layer: got '\d+'; allowed: the number of a spiking layer",
    ),
    "scale and shift": (
        lambda g: g["modules"].append(
            {
                **{"name": "x", "kind": "ChannelAffine"},
                "tensors": {
                    "scale": layer(g, "torch.nn.Linear")["tensors"]["bias"],
                    "shift": layer(g, "torch.nn.Conv2d")["tensors"]["bias"],
                },
            }
        ),
        r"tensors: got '\(10,\)'; allowed: scale and shift of one size",
    ),
    # Constructors of torch raise more than errors of values.
    "heads": (
        add("torch.nn.MultiheadAttention", args={"embed_dim": 4, "num_heads": 3}),
        r"\(torch\.nn\.MultiheadAttention\): got 'embed_dim must be divisible by num_heads'",
    ),
    "ceiling": (add("torch.nn.Hardtanh"), r"Hardtanh\): got 'max_val .* must be greater"),
    "groups": (add("torch.nn.GroupNorm"), r"GroupNorm\): got 'integer modulo by zero'"),
    # Neurons.
    "no neuron": (lambda g: neuron(g).update(node={"kind": "Other"}), f"{NODE}: got .*an IFNode"),
    "signed": (lambda g: neuron(g)["node"].update(signed=3), rf"{NODE}\.signed: got '3'"),
    "signed, less": (
        lambda g: neuron(g)["node"].update(signed={}),
        r"signed: got 'no high, low, margin'",
    ),
    "probe": (lambda g: neuron(g)["node"].update(probe=[]), rf"{NODE}\.probe: got"),
    "floor of a threshold that is not learned": (
        lambda g: neuron(g)["node"].update(floor={"tensor": next(iter(g["tensors"]))}),
        rf"{NODE}\.floor: got .*null where the threshold is not learned",
    ),
    "start": (lambda g: neuron(g)["node"].update(v_init=[1]), r"\(SpikingActivation\): got"),
    "reset": (
        lambda g: neuron(g)["node"].update(v_reset={"evil": 1}),
        rf"{NODE}\.v_reset: got .*allowed: a plain value",
    ),
    "channel_dim": (lambda g: neuron(g).update(channel_dim=1.0), r"channel_dim: got '1\.0'"),
    "deep": (
        lambda g: nodes(g, "call_module").update(args=json.loads("[" * 80 + "]" * 80)),
        "nested more than 50 deep",
    ),
}
CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (put("format", "bert"), r"config\.json: format: got 'bert'"),
    "newer": (put("format_version", 99), r"format_version: got '99'; .*pip install -U snnkernels"),
    **{
        f"T {value!r}": (put("T", value), r"config\.json: T: got")
        for value in (0, -1, 1.5, True, "8", None, 2**40)
    },
    "steps": (put("steps", "before", -1), "steps: before: got '-1'"),
    "more steps": (put("steps", "evil", 1), "steps: got"),
    "bias": (put("steps", "bias", "never"), "steps: bias: got 'never'"),
    "counted": (put("counted", ["../x"]), "counted: got"),
    "of_body": (put("of_body", [7]), "of_body: got"),
    "of_suffix": (put("of_suffix", [0]), "suffix takes 1 inputs; allowed: 2"),
    "parameters": (put("inputs", "parameters", [["x; y", "KEYWORD_ONLY"]]), "parameters: got"),
    "names": (put("inputs", "names", ["z"]), "names: got"),
    "metadata": (put("metadata", []), r"metadata: got '\[\]'; allowed: an object"),
    "fixed": (put("inputs", "fixed", {"x": {"float": "1"}}), "fixed: got .*plain values: x: "),
    "order of parameters": (
        put("inputs", "parameters", [["x", "KEYWORD_ONLY"], ["y", "POSITIONAL_ONLY"]]),
        r"parameters: got .*allowed: a signature \(wrong parameter order",
    ),
    "several inputs": (
        lambda c: c["inputs"].update(
            parameters=[["x", "KEYWORD_ONLY"], ["y", "KEYWORD_ONLY"]], names=["x", "y"]
        ),
        "packed: got 'False'; allowed: true for several inputs",
    ),
    "packed": (put("inputs", "packed", 1), "packed: got '1'; allowed: true or false"),
    "names no list": (put("inputs", "names", "x"), "names: got 'x'; allowed: a list"),
    "names no strings": (
        put("inputs", "names", [1]),
        r"names: got '\[1\]'; allowed: a list of str",
    ),
    "silent channels": (
        put("report", "silent_channels", {"2": ["x"]}),
        r"silent_channels: got .*lists of channels by layer \(2\)",
    ),
    "report": (put("report", "rows", [{"name": 1}]), r"rows\[0\]: name: got '1'"),
    "rate": (put("report", "rows", 0, "rate", "x"), r"rate: got 'x'"),
    "files": (put("files", {}), r"files: graph\.json: got"),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_hostile_graphs(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, words = GRAPHS[case]
    monkeypatch.chdir(folder)
    rewrite(folder, change, "graph.json")
    with pytest.raises(ValueError, match=f"(?s)graph.json.*{words}"):
        snnkernels.load_pretrained(folder)
    assert not (folder / "pwned").exists()


def test_numbers_beyond_those_of_json(folder: Path) -> None:
    """Python reads 1e999 as infinity."""
    path = folder / "graph.json"
    rewrite(folder, lambda g: g["suffix"]["nodes"][1]["args"].append("HUGE"), "graph.json")
    path.write_text(path.read_text().replace('"HUGE"', "1e999"))
    rewrite(folder)
    with pytest.raises(ValueError, match=r"args: got 'inf must be written as an object'"):
        snnkernels.load_pretrained(folder)


def test_private_fields_of_inputs(tmp_path: Path) -> None:
    """Of an input any public field may be read, as it may be a dataclass."""
    rows = [(torch.randn(5, 6), torch.randn(5, 3))]
    given = {"inputs": lambda i: {"x": i[0], "größe": i[1]}, "threshold": "max"}
    snn = snnkernels.convert(Several(), rows, T=4, **given)
    folder = snn.save_pretrained(tmp_path)

    def change(graph: dict[str, Any]) -> None:
        nodes = graph["prefix"]["nodes"]
        (given,) = [n for n in nodes if n["target"] == "snnkernels.network_input"][:1]
        args = [{"node": given["name"]}, "__class__"]
        node = {"name": "new", "op": "call_function", "target": "builtins.getattr", "kwargs": {}}
        nodes.insert(nodes.index(given) + 1, {**node, "args": args})

    rewrite(folder, change, "graph.json")
    with pytest.raises(ValueError, match=r"getattr\('__class__',\) reads a private attribute"):
        snnkernels.load_pretrained(folder)


OWN_FIELDS = {
    "ttfs": ("round", 1, "round: got '1'; allowed: true or false"),
    "multi_threshold": ("thresholds", 17, "thresholds: got '17'; allowed: 1 to 16"),
    "dsr": ("how", [], r"how: got '\[\]'; allowed: an object"),
}


@pytest.mark.parametrize("method", OWN_FIELDS)
def test_fields_of_one_kind_of_layer(method: str, tmp_path: Path) -> None:
    field, value, words = OWN_FIELDS[method]
    ann = network(activation_for(method))
    folder = snnkernels.convert(ann, X, method=method, T=4, progress=False).save_pretrained(
        tmp_path
    )
    rewrite(
        folder,
        lambda g: next(m for m in g["modules"] if field in m.get("args", {}))["args"].update(
            {field: value}
        ),
        "graph.json",
    )
    with pytest.raises(ValueError, match=rf"args\.{words}"):
        snnkernels.load_pretrained(folder)


def test_whole_numbers_do_not_learn(tmp_path: Path) -> None:
    x, picks = images(4, 6, 1).flatten(1), nn.Buffer(torch.tensor([2, 0]))
    net = Around(lambda net, h: h.index_select(1, net.picks), picks=picks).eval()
    snn = snnkernels.convert(net, x, T=4, progress=False)
    folder = snn.save_pretrained(tmp_path)
    same(snn, snnkernels.load_pretrained(folder), x)
    rewrite(folder, lambda g: g["tensors"]["suffix.picks"].update(role="parameter"), "graph.json")
    with pytest.raises(ValueError, match=r"picks\.role: got 'parameter'; allowed: buffer or froz"):
        snnkernels.load_pretrained(folder)


def test_masks_and_tensors_that_are_arguments(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, shift: Tensor = torch.arange(6.0)) -> Tensor:  # noqa: B008
            return self.last(F.relu(self.first(x) + shift))

    x = images(4, 6, 1).flatten(1)
    snn = snnkernels.convert(Shifted().eval(), x, T=4, progress=False)
    with torch.no_grad():
        plain = snn(x)
    ((_, layer),) = snn.neurons()
    layer.node.mask = torch.tensor([True, True, False, True, False, True])
    again = snnkernels.load_pretrained(snn.save_pretrained(tmp_path))
    same(snn, again, x)
    with torch.no_grad():
        assert not torch.equal(again(x), plain)
    ((_, loaded),) = again.neurons()
    assert torch.equal(loaded.node.mask, layer.node.mask)


def test_neurons_that_leak(tmp_path: Path) -> None:
    x, net = images(4, 6, 1).flatten(1), Around(lambda net, h: h).eval()
    snn = snnkernels.convert(net, x, T=8, progress=False)
    for beta, (_, layer) in zip((0.75, torch.linspace(0.5, 0.9, 3)), snn.neurons(), strict=True):
        layer.node = snnkernels.LIFNode(beta=beta, v_threshold=0.5, v_reset=None, step_mode="m",
                                        channel_dim=1)  # fmt: skip
    again = snnkernels.load_pretrained(snn.save_pretrained(tmp_path))
    same(snn, again, x)
    betas = [layer.node.beta for _, layer in again.neurons()]
    assert betas[0] == 0.75
    assert torch.equal(betas[1], torch.linspace(0.5, 0.9, 3))


def test_what_was_put_into_a_converted_network(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path
) -> None:
    linear = next(m for m in snn.modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ConversionError, match=r"its weight is not a tensor of shape \(10, 6\)"):
        snn.save_pretrained(tmp_path / "net")

    class Own(snnkernels.IFNode):
        pass

    _, layer = next(snn.neurons())
    layer.node = Own()
    with pytest.raises(ConversionError, match=r"its neurons are .*Own, not IFNode or LIFNode"):
        snn.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_files_that_are_too_large_and_digests_of_python_3_10(
    snn: snnkernels.ConvertedNetwork, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    same(snn, snnkernels.load_pretrained(folder), X)
    monkeypatch.setattr(files, "_MOST_JSON", 10)
    with pytest.raises(ValueError, match=r"config\.json: \d+ bytes; at most 10 are read"):
        snnkernels.load_pretrained(folder)


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_configs(folder: Path, case: str) -> None:
    change, words = CONFIGS[case]
    path = folder / "config.json"
    given = json.loads(path.read_text())
    change(given)
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=f"(?s){words}"):
        snnkernels.load_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", '{"T": NaN}', "\xff"])
def test_what_is_no_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json: (no JSON|got)"):
        snnkernels.load_pretrained(folder)


def test_thresholds_in_the_weights_are_checked(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path
) -> None:
    _, layer = next(snn.neurons())
    layer.node.v_threshold[1] = float("nan")
    folder = snn.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"v_threshold: got .* allowed: .*finite"):
        snnkernels.load_pretrained(folder)
    layer.node.v_threshold[1] = -2.0
    with pytest.raises(ValueError, match=r"v_threshold: .*positive finite"):
        snnkernels.load_pretrained(snn.save_pretrained(tmp_path))


def test_the_closed_lists_have_what_conversion_lets_through() -> None:
    """What may stand between neurons can be saved; what reads files or runs code is not listed."""
    names = {*ops.FREE, *ops.WITH_DIMS, *ops.SUMS, *ops.PRODUCTS, *ops.CONVOLUTIONS, *ops.QUOTIENTS}
    known = {name.rpartition(".")[2] for name in tables.FUNCTIONS} | tables.METHODS
    # zero_pad2d has no function in torch; rsub is a method of Python.
    assert names - known <= {"zero_pad2d", "__matmul__"}
    kinds = {f"torch.nn.{k.__name__}" for k in (*ops.AFFINE_MODULES, *ops.MAX_POOL_MODULES)}
    kinds = {k for k in kinds if not k.rpartition(".")[2].startswith("_")}
    assert kinds - set(tables.LAYERS) <= {"torch.nn.ChannelAffine"}
    for word in (
        "load",
        "save",
        "ops",
        "compile",
        "jit",
        "from_file",
        "set_",
        "hub",
        "exec",
        "eval",
    ):
        assert f"torch.{word}" not in tables.FUNCTIONS
        assert word not in tables.METHODS
    for word in ("numpy", "tofile", "apply_", "map_", "register_hook", "backward", "storage"):
        assert word not in tables.METHODS
    for kind, (_, fields) in tables.LAYERS.items():
        assert all(field.isidentifier() for field in fields), kind


# ---- the hub, which is not called ----------------------------------------------------------------


def test_push_and_load_through_a_hub_of_our_own(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = optional("huggingface_hub")
    store, calls = tmp_path / "hub", []

    class Api:
        def __init__(self, token: Any = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **given: Any) -> None:
            calls.append(("create", repo_id, given))

        def upload_folder(self, *, repo_id: str, folder_path: str, **given: Any) -> str:
            shutil.copytree(folder_path, store / repo_id)
            calls.append(("upload", repo_id, given))
            return "a commit"

    def download(repo_id: str, **given: Any) -> str:
        calls.append(("download", repo_id, given))
        return str(store / repo_id)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert snn.push_to_hub("me/net", private=True, token="t") == "a commit"
    assert calls[0] == ("token", "t")
    assert calls[1][1:] == ("me/net", {"private": True, "exist_ok": True, "repo_type": "model"})
    assert 'load_pretrained("me/net")' in (store / "me/net/README.md").read_text()
    same(snn, snnkernels.load_pretrained("me/net", revision="main"), X)
    assert calls[-1][2]["revision"] == "main"
    (store / "me/empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"repository me/empty holds no config\.json"):
        snnkernels.load_pretrained("me/empty")
    assert calls[-1][2]["allow_patterns"] == ["config.json", "graph.json", "model.safetensors"]
    with pytest.raises(ValueError, match="repo_id='a/b/c' must be"):
        snn.push_to_hub("a/b/c")


def test_missing_packages_are_named(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: snnkernels.load_pretrained("me/net"), lambda: snn.push_to_hub("me/net")):
        with pytest.raises(ImportError, match=r"pip install 'snnkernels\[hub\]'"):
            call()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"safetensors: pip install 'snnkernels\[hub\]'"):
        snn.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()
