"""Random networks of supported and unsupported pieces through the converter.

Each is either refused with a ConversionError, or becomes a spiking network whose counts and answer,
and those of its plan, lie within the bounds that ``certify`` proves, and whose quantised ANN comes
near the ANN at many steps. No other exception, and the ANN stays as it is.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support import FUZZ, PURE
from torch import Tensor, nn

import snnkernels
from snnkernels.conversion import QCFS, ClipReLU, ConversionError, convert

CHANNELS = (2, 3, 4)


class Affine(nn.Module):
    """Convolution or linear layer to ``out`` channels, by the shape of what comes."""

    def __init__(self, out: int, kernel: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.how, self.layer = (out, kernel, groups, bias), nn.Identity()

    def build(self, x: Tensor) -> None:
        out, kernel, groups, bias = self.how
        if x.dim() == 4:
            groups = groups if x.shape[1] % groups == out % groups == 0 else 1
            kernel = min(kernel, *x.shape[2:])
            self.layer = nn.Conv2d(
                x.shape[1], out, kernel, padding=kernel // 2, groups=groups, bias=bias
            )
        else:
            self.layer = nn.Linear(x.shape[-1], out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Identity()

    def build(self, x: Tensor) -> None:
        if x.dim() == 3:
            return
        self.layer = (nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(x.shape[1])
        with torch.no_grad():
            self.layer.running_mean.uniform_(-0.3, 0.3)
            self.layer.running_var.uniform_(0.5, 2)
            self.layer.weight.uniform_(0.5, 1.5)
            self.layer.bias.uniform_(-0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Piece(nn.Module):
    """A function of the tensor alone, or of it and one from before; by their shapes, once."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.suits = name, True

    def build(self, x: Tensor, old: Tensor) -> None:
        self.suits = FUNCTIONS[self.name][0](x, old)

    def forward(self, x: Tensor, old: Tensor) -> Tensor:
        return FUNCTIONS[self.name][1 if self.suits else 2](x, old)


def _branch(x: Tensor, old: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def _write(x: Tensor, old: Tensor) -> Tensor:
    y = x * 1
    y[:, :1] = 0
    return y


def _add_in_place(x: Tensor, old: Tensor) -> Tensor:
    x = x * 1
    x += 0.25
    return x


def _always(x: Tensor, old: Tensor) -> bool:
    return True


def _alike(x: Tensor, old: Tensor) -> bool:
    return x.shape == old.shape


def _images(x: Tensor, old: Tensor) -> bool:
    return x.dim() == 4


def _wide(x: Tensor, old: Tensor) -> bool:
    return x.dim() == 4 and min(x.shape[2:]) > 1


def _same(x: Tensor, old: Tensor) -> Tensor:
    return x


# Name: where the first function suits; it; what is done elsewhere.
FUNCTIONS: dict[str, tuple[Any, Any, Any]] = {
    # What is affine, or moves values about.
    "add": (_alike, lambda x, old: x + old, lambda x, old: x + 1),
    "subtract": (_alike, lambda x, old: old - x, lambda x, old: 0.5 - x),
    "concat": (
        lambda x, old: x.dim() == old.dim() and x.shape[2:] == old.shape[2:],
        lambda x, old: torch.cat([x, old], 1),
        _same,
    ),
    "scale": (_always, lambda x, old: x * 0.5, _same),
    "divide": (_always, lambda x, old: x / 2, _same),
    "flatten": (_always, lambda x, old: x.flatten(1), _same),
    "view": (_always, lambda x, old: x.reshape(x.size(0), -1), _same),
    "mean": (_images, lambda x, old: x.mean((2, 3)), lambda x, old: x.mean(-1, keepdim=True)),
    "average": (_wide, lambda x, old: F.avg_pool2d(x, 2), _same),
    "adaptive": (_images, lambda x, old: F.adaptive_avg_pool2d(x, 1), _same),
    "max": (_wide, lambda x, old: F.max_pool2d(x, 2), _same),
    "permute": (_images, lambda x, old: x.permute(0, 1, 3, 2), _same),
    "chunk": (
        lambda x, old: x.shape[1] > 1,
        lambda x, old: torch.cat(x.chunk(2, 1)[::-1], 1),
        _same,
    ),
    "slice": (_always, lambda x, old: x[:, :2], _same),
    "pad": (_always, lambda x, old: F.pad(x, (1, 1)), _same),
    "dropout": (_always, lambda x, old: F.dropout(x, 0.5, False), _same),
    "upsample": (_images, lambda x, old: F.interpolate(x, scale_factor=2), _same),
    "relu": (_always, lambda x, old: F.relu(x), _same),
    "relu6": (_always, lambda x, old: F.relu6(x), _same),
    "clamp": (_always, lambda x, old: x.clamp(min=0), _same),
    "in place": (_always, _add_in_place, _same),
    # What is not.
    "sigmoid": (_always, lambda x, old: torch.sigmoid(x), _same),
    "tanh": (_always, lambda x, old: torch.tanh(x), _same),
    "gelu": (_always, lambda x, old: F.gelu(x), _same),
    "leaky": (_always, lambda x, old: F.leaky_relu(x, 0.1), _same),
    "softmax": (_always, lambda x, old: F.softmax(x, 1), _same),
    "product": (_alike, lambda x, old: x * old, lambda x, old: x * x),
    "abs": (_always, lambda x, old: x.abs(), _same),
    "norm": (_images, lambda x, old: F.layer_norm(x, x.shape[1:]), lambda x, old: F.normalize(x)),
    "batch": (_always, lambda x, old: x - x.mean(0, keepdim=True), _same),
    "sort": (_always, lambda x, old: x.sort(1)[0], _same),
    "argmax": (_always, lambda x, old: x.argmax(1), _same),
    "branch": (_always, _branch, _same),
    "write": (_always, _write, _same),
    "item": (_always, lambda x, old: x * float(x.detach().mean()), _same),
    "numpy": (_always, lambda x, old: x + torch.from_numpy(x.detach().numpy()), _same),
    "double": (_always, lambda x, old: x.double(), _same),
    "half": (_always, lambda x, old: x.half().float(), _same),
    "where": (_always, lambda x, old: torch.where(x > 0, x, 2 * x), _same),
    "matmul": (_always, lambda x, old: x @ x.transpose(-1, -2), _same),
    "random": (_always, lambda x, old: x + torch.rand_like(x), _same),
    "tuple": (_always, lambda x, old: x.max(1), _same),
    "detached": (_images, lambda x, old: F.max_pool2d(-x, 1).detach(), lambda x, old: -x),
    "size": (_always, lambda x, old: x * x.shape[1], _same),
    "cumsum": (_always, lambda x, old: x.cumsum(1), _same),
    "einsum": (_images, lambda x, old: torch.einsum("bchw,bchv->bcwv", x, x), _same),
    "expand": (
        _always,
        lambda x, old: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]).flatten(1),
        _same,
    ),
    "roll": (_always, lambda x, old: x.roll(1, 0), _same),
    "empty": (_always, lambda x, old: x[:, :0], _same),
    "scalar": (_always, lambda x, old: x.sum(), _same),
    "dict": (_always, lambda x, old: {"a": x, "b": old}, _same),
    "nothing": (_always, lambda x, old: None, _same),
}
LEGAL = tuple(FUNCTIONS)[: tuple(FUNCTIONS).index("sigmoid")]


class Random(nn.Module):
    """Pieces one after another; some read an earlier value as well."""

    def __init__(self, pieces: list[nn.Module], reads: list[int]) -> None:
        super().__init__()
        self.pieces, self.reads = nn.ModuleList(pieces), reads
        self.building = False

    def forward(self, x: Tensor) -> Any:
        seen = [x]
        for piece, back in zip(self.pieces, self.reads, strict=True):
            x = seen[-1]
            old = seen[max(0, len(seen) - 1 - back)]
            if self.building and hasattr(piece, "build"):
                piece.build(*((x, old) if isinstance(piece, Piece) else (x,)))
            seen.append(piece(x, old) if isinstance(piece, Piece) else piece(x))
        return seen[-1]


ACTIVATIONS = (nn.ReLU, nn.ReLU, nn.ReLU6, lambda: ClipReLU(1.5), lambda: QCFS(4, 1.5))


@st.composite
def networks(draw: st.DrawFn) -> tuple[Random, Tensor, bool]:
    """A network that runs, in eval mode, its input, and whether all pieces are supported."""
    torch.manual_seed(draw(st.integers(0, 50)))
    unsupported = draw(st.integers(0, 2)) == 2
    pieces: list[nn.Module] = []
    names: list[str] = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(
            st.sampled_from(("affine", "affine", "act", "act", "norm", "piece", "max pool"))
        )
        if kind == "affine":
            pieces.append(
                Affine(
                    draw(st.sampled_from(CHANNELS)), draw(st.sampled_from((1, 3))),
                    draw(st.sampled_from((1, 1, 2))), draw(st.booleans()),
                )
            )  # fmt: skip
        elif kind == "act":
            pieces.append(ACTIVATIONS[draw(st.integers(0, len(ACTIVATIONS) - 1))]())
        elif kind == "norm":
            pieces.append(Norm())
        elif kind == "max pool":
            pieces.append(Piece("max"))
        else:
            name = draw(st.sampled_from(tuple(FUNCTIONS) if unsupported else LEGAL))
            names.append(name)
            pieces.append(Piece(name))
    if draw(st.integers(0, 3)):
        pieces += [Piece("flatten"), Affine(3, 1, 1, True)]
    reads = [draw(st.integers(0, 3)) for _ in pieces]
    shape = draw(st.sampled_from(((4, 2, 4, 4), (3, 3, 5, 4), (4, 6), (2, 3, 6))))
    x = torch.rand(shape) * 2 - draw(st.sampled_from((0.0, 1.0)))
    net = Random(pieces, reads).eval()
    net.building = True
    try:
        with torch.no_grad():
            net(x)
        net.eval().building = False
        with torch.no_grad():
            net(x)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, UserWarning):
        hypothesis.assume(False)  # no network at all
    return net, x, all(name in LEGAL for name in names)


@hypothesis.settings(
    max_examples=FUZZ,
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much,
    ],
)  # fmt: skip
@hypothesis.given(
    drawn=networks(),
    T=st.sampled_from((1, 2, 7, 16, 64)),
    method=st.sampled_from(("opi", "opi", "opi", "opi", "qcfs")),
    threshold=st.sampled_from(("max", "max", None, "99%", 1.0)),
    maxpool=st.sampled_from(("cumulative", "cumulative", "pre_spike", "avg")),
    on_unsupported=st.sampled_from(("error", "error", "error", "mean", "keep")),
    normalize=st.sampled_from(("threshold", "weights")),
)
def test_random_networks(
    drawn: tuple[Random, Tensor, bool], T: int, threshold: Any, method: str, **how: str
) -> None:
    ann, x, legal = drawn
    before = {name: value.clone() for name, value in ann.state_dict().items()}
    try:
        snn = convert(ann, x, T=T, threshold=threshold, method=method, progress=False, **how)
    except ConversionError as error:
        snn, refusal = None, str(error)
    assert before.keys() == ann.state_dict().keys()
    for name, value in ann.state_dict().items():
        assert torch.equal(before[name], value), f"{name} of the ANN has changed"
    if snn is None:
        assert len(refusal) > 30, refusal
        return
    with torch.no_grad():
        answer = snn(x)
        plan = snnkernels.lower(snn)
        lowered = plan(x)
        try:
            proof = snn.certify(x)
        except ConversionError:
            return  # an operation that has no rule
    # Bounds are outward, so only the answer's own rounding needs room.
    room = 1e-5 * (1 + proof.low.abs().maximum(proof.high.abs()))
    for name, got in (("snn", answer), ("plan", lowered), ("quantised", proof.quantised)):
        inside = (got >= proof.low - room) & (got <= proof.high + room)
        assert bool(inside.all()), f"{name}: {got} is not in [{proof.low}, {proof.high}]"
    for layer in proof.layers:
        assert bool((layer.low <= layer.high).all())
    exact = legal and how["maxpool"] == "cumulative" and threshold == "max" and method == "opi"
    learned = any(isinstance(p, (ClipReLU, QCFS)) for p in ann.pieces)
    if exact and not learned and how["on_unsupported"] == "error":
        # Thresholds at the maximum clip nothing: what is left of the error is quantisation, which
        # goes with 1/T.
        with torch.no_grad():
            wanted = ann(x)
            many = snn.certify(x, T=1 << 14).quantised
        error = (many - wanted).abs().max().item() if wanted.numel() else 0.0
        assert error <= 2e-2 * (1 + wanted.abs().max().item()), f"{error} at 16,384 steps"


def test_most_networks_are_not_refused() -> None:
    """That the test above tests something: of plain pieces the converter takes nearly all."""
    taken = refused = 0

    @hypothesis.settings(
        max_examples=60, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck), derandomize=True,
    )  # fmt: skip
    @hypothesis.given(drawn=networks())
    def count(drawn: tuple[Random, Tensor, bool]) -> None:
        nonlocal taken, refused
        ann, x, legal = drawn
        hypothesis.assume(legal and any(isinstance(p, nn.ReLU) for p in ann.pieces))
        try:
            convert(ann, x, T=4, progress=False)
            taken += 1
        except ConversionError:
            refused += 1

    count()
    assert taken > 3 * refused, (taken, refused)
    assert PURE or taken > 30
