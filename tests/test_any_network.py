"""Any network: families beyond VGG and ResNet, several inputs, several outputs."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import any_networks as nets
import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import dyadic, images, make_dyadic, randomize, relative
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, Dataset

from snnkernels.conversion import QCFS, ConversionError, convert
from snnkernels.conversion.methods import Advanced, BitSerial
from snnkernels.conversion.trace import trace

L = 8


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def qcfs() -> nn.Module:
    return QCFS(L, 1.5)


# Network of an activation, what convert needs beside it, T, tolerance of the answer at T.
FAMILIES: dict[str, tuple[Callable[[nets.Act], nn.Module], dict[str, Any], int, float]] = {
    "densenet": (nets.DenseNet, {}, 512, 0.02),
    "mobilenet v2": (nets.MobileNetV2, {}, 1024, 0.02),
    "resnext": (nets.ResNeXt, {}, 256, 0.02),
    "mlp-mixer": (nets.Mixer, {}, 512, 0.02),
    "unet": (nets.UNet, {}, 512, 0.02),
    "unet, upsample": (lambda act: nets.UNet(act, "module"), {}, 512, 0.02),
    "unet, interpolate": (lambda act: nets.UNet(act, "size"), {}, 512, 0.02),
    "shared block": (nets.Shared, {}, 512, 0.02),
    "se": (nets.SENet, {"on_unsupported": "mean"}, 512, 0.02),
    "se, expand_as": (
        lambda act: nets.SENet(act, how="expand"),
        {"on_unsupported": "mean"},
        512,
        0.02,
    ),
    "se, hard sigmoid": (
        lambda act: nets.SENet(act, "hardsigmoid"),
        {"on_unsupported": "mean"},
        512,
        0.02,
    ),
    "attention": (nets.Attention, {"on_unsupported": "mean"}, 512, 0.02),
}


def build(name: str, act: nets.Act) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomize(FAMILIES[name][0](act)), images(6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_is_the_ann(name: str) -> None:
    net, x = build(name, relu)
    traced = trace(net, x)
    torch.testing.assert_close(fx.Interpreter(traced.net, graph=traced.graph).run(x), net(x))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_answer_approaches_the_ann(name: str) -> None:
    net, x = build(name, relu)
    _, options, T, tolerance = FAMILIES[name]
    snn = convert(net, x, threshold="max", T=T, **options)
    error = {t: relative(y, net(x)) for t, y in snn.predict_curve(x, [T // 16, T]).items()}
    assert error[T] < tolerance
    assert error[T] < error[T // 16]
    assert snn.report["output"].error == pytest.approx(error[T], rel=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_parallel_is_the_qcfs_network(name: str) -> None:
    net, x = build(name, qcfs)
    options = FAMILIES[name][1]
    snn = convert(net, x, method="parallel", T=L, fold=False, **options)
    torch.testing.assert_close(snn(x), net(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_report_names_every_operation(name: str) -> None:
    net, x = build(name, relu)
    snn = convert(net, x, **FAMILIES[name][1])
    rows = {row.name for row in snn.report.rows}
    for path, module in net.named_modules():
        if not list(module.children()) and not isinstance(module, (nn.Dropout, nn.Identity)):
            assert path in rows, f"{path} is missing"
    assert {label for label, _ in snn.neurons()} <= rows


def test_relu6_stays_at_six() -> None:
    torch.manual_seed(0)
    net, x = randomize(nets.MobileNetV2(nn.ReLU6)), 20 * images(4)
    with torch.no_grad():
        snn = convert(net, x, threshold="max", T=1024)
        assert snn.report["features.2"].threshold.max() <= 6
        assert "ReLU6" in snn.report["features.2"].action
        assert relative(snn(x), net(x)) < 0.03


# Gates: a product of two values that spike.


def test_a_gate_is_an_error_that_names_the_way() -> None:
    net, x = build("se", relu)
    with pytest.raises(ConversionError, match=r"gate cannot be converted: Sigmoid") as caught:
        convert(net, x)
    assert "on_unsupported='mean'" in str(caught.value)
    with pytest.raises(ConversionError, match=r"one\.gate cannot be converted"):
        convert(net, x, on_unsupported="error")


def test_gates_are_named_in_the_report() -> None:
    net, x = build("se", relu)
    report = convert(net, x, on_unsupported="mean").report
    assert report["one.gate"].action == (
        "Sigmoid: on running means, every step: Sigmoid is not affine"
    )
    assert "mul of two values that spike" in report["mul"].action
    assert "exact in the mean but not spiking: one.gate, mul, two.gate, mul_1" in str(report)


class Gate(nn.Module):
    """``relu(f(relu(a x), relu(b x)))``, without weights behind: dyadic in, dyadic out."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.function(F.relu(self.a(x)), F.relu(self.b(x))))


@torch.no_grad()
def test_a_product_of_spikes_is_exact_in_the_mean_at_every_step() -> None:
    # What the last neurons integrate up to step t is t times the product of the rates so far.
    net, x, T = make_dyadic(Gate(lambda a, b: a * b)), dyadic(5, 4), 16
    snn = convert(net, x, threshold=1.0, v_init=0.0, T=T, on_unsupported="mean")
    seen: dict[str, Tensor] = {}
    layers = dict(snn.neurons())
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda m, args, name=name: seen.__setitem__(name, args[0].clone())
        )
        layer.register_forward_hook(
            lambda m, args, out, name=name: seen.__setitem__(f"{name} out", out.clone())
        )
    snn(x)
    spikes = [seen[f"{name} out"].view(T, 5, 6) for name in list(layers)[:2]]
    current = seen["relu_2"].view(T, 5, 6)
    for t in range(1, T + 1):
        a, b = (s[:t].double().mean(0) for s in spikes)
        torch.testing.assert_close(current[:t].double().sum(0), t * a * b, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a * torch.sigmoid(b),
        lambda a, b: a * F.relu6(b + 3) / 6,  # hard swish by hand: relu6 becomes neurons
        lambda a, b: F.hardswish(a - b),
        lambda a, b: a / (1 + b),
        lambda a, b: torch.maximum(a, b),
        lambda a, b: a - (a * b).softmax(-1),
        lambda a, b: a.max(1, keepdim=True).values - b,
        lambda a, b: a.sort(1)[0] - b,
        lambda a, b: a.gather(1, b.topk(6, 1)[1]) - b,
    ],
)
@torch.no_grad()
def test_any_function_converges_on_means(function: Callable) -> None:
    torch.manual_seed(0)
    net, x = Gate(function), torch.rand(16, 4, generator=torch.Generator().manual_seed(1))
    snn = convert(net, x, threshold="max", T=1024, on_unsupported="mean")
    curve = snn.predict_curve(x, [16, 1024])
    assert (curve[1024] - net(x)).abs().max() < 0.01
    assert (curve[16] - net(x)).abs().max() < 0.3
    assert torch.equal(curve[16], snn(x, T=16))  # cut into pieces, the same bits


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.cat(torch.var_mean(a - b, 1, keepdim=True), 1),
        lambda a, b: torch.stack(torch.aminmax(a * 2 - b, dim=1), 1),
        lambda a, b: torch.cat(torch.broadcast_tensors(a, b * b), 1),
    ],
)
@torch.no_grad()
def test_all_results_of_an_operation_on_means(function: Callable) -> None:
    """Affine operations that read a tuple get the currents of every part of it."""
    torch.manual_seed(0)
    net, x = Gate(function), torch.rand(16, 4, generator=torch.Generator().manual_seed(1))
    snn = convert(net, x, threshold="max", T=512, on_unsupported="mean")
    got = snn(x)
    assert (got - net(x)).abs().max() < 0.02
    assert torch.equal(snn(x), got)  # nothing is left from the call before
    curve = snn.predict_curve(x, [3, 512])  # in pieces
    assert torch.equal(curve[512], got)
    assert torch.equal(curve[3], snn(x, T=3))
    parallel = convert(net, x, method="parallel", T=512, on_unsupported="mean")
    assert (parallel(x) - net(x)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda a, b: a + b.argmax(1, keepdim=True), r"argmax on running means gives torch\.int64"),
        (lambda a, b: a + (b > 0.5), r"gt on running means gives torch\.bool"),
        (lambda a, b: torch.cat(torch.max(a - b, 1, keepdim=True), 1), r"max_1 on .*torch\.int64"),
    ],
)
def test_choices_have_no_mean_in_time(function: Callable, words: str) -> None:
    x = torch.rand(16, 4)
    with pytest.raises(ConversionError, match=words):
        convert(Gate(function), x, threshold="max", T=4, on_unsupported="mean")


@torch.no_grad()
def test_kept_products_stay_wrong_where_means_are_right() -> None:
    torch.manual_seed(0)  # spikes of 0 and θ have squares of mean θ a, not a^2
    net, x = Gate(lambda a, b: a * a), torch.rand(16, 4, generator=torch.Generator().manual_seed(1))
    error = {}
    for how in ("keep", "mean"):
        snn = convert(net, x, threshold="max", T=1024, on_unsupported=how)
        error[how] = relative(snn(x), net(x))
    assert error["mean"] < 0.01
    assert error["keep"] > 0.1


@pytest.mark.parametrize("with_data", [True, False])
@torch.no_grad()
def test_attention_of_torch_on_means(with_data: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = F.relu(self.fc1(x))
            a, weights = self.attention(h, h, h)
            return self.fc3(F.relu(self.fc2(a) + h)), weights

    net, x = Net().eval(), torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    rest = {"loader": x, "threshold": "max"} if with_data else {"threshold": 2.0}
    snn = convert(net, T=512, on_unsupported="mean", **rest)
    assert "on running means" in snn.report["attention"].action
    assert "on running means" in snn.report["getitem"].action
    for got, want in zip(snn(x), net(x), strict=True):
        assert relative(got, want) < 0.01


@pytest.mark.parametrize("method", ["srp", "cos", "parallel", "burst", "signed"])
@torch.no_grad()
def test_gates_with_every_kind_of_step(method: str) -> None:
    net, x = build("se", relu)
    snn = convert(net, x, method=method, T=64, on_unsupported="mean")
    assert relative(snn(x), net(x)) < 0.3
    for t, y in snn.predict_curve(x, [4, 64]).items():
        torch.testing.assert_close(y, snn(x, T=t), atol=1e-4, rtol=1e-4)


@pytest.mark.converted_only
def test_gradients_pass_gates() -> None:
    net, x = build("se", relu)
    snn = convert(net, x, T=4, on_unsupported="mean")
    snn(x).sum().backward()
    grads = {name: p.grad for name, p in snn.named_parameters() if p.requires_grad}
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads.values())
    assert relative(snn(x), snn(x)) == 0  # nothing is kept between calls


def test_what_mixes_the_batch_has_no_mean_either() -> None:
    net = Gate(lambda a, b: a * b.mean(0))
    with pytest.raises(ConversionError, match="on means either: mean over dimension 0 mixes"):
        convert(net, torch.rand(4, 4), on_unsupported="mean")


# Several inputs.


class TwoInputs(nn.Module):
    """An image, and a vector of what else is known; how much it counts is an option."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(2, 6)
        self.mix, self.out = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(
        self, image: Tensor, known: Tensor, bias: Tensor | None = None, gain: float = 1.0
    ) -> Tensor:
        h = F.relu(self.conv(image)).mean((2, 3))
        h = self.mix(torch.cat([h, gain * F.relu(self.fc(known))], 1))
        if bias is not None:
            h = h + bias
        return self.out(F.relu(h))


def two(batch: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return images(batch, seed=seed), torch.randn(batch, 2, generator=g)


@torch.no_grad()
def test_two_inputs_by_position_and_by_name() -> None:
    net, (image, known) = TwoInputs().eval(), two()
    for loader, inputs in [
        ([(image, known, torch.arange(8))], lambda item: item[:2]),
        ([{"x": image, "k": known}], lambda item: {"known": item["k"], "image": item["x"]}),
        ([(image, known)], lambda item: item),
    ]:
        snn = convert(net, loader, inputs=inputs, threshold="max", T=512, progress=False)
        assert snn.inputs == ("image", "known")
        answer = snn(image, known)
        assert relative(answer, net(image, known)) < 0.02
        assert torch.equal(snn(image, known=known), answer)
        assert torch.equal(snn(known=known, image=image), answer)
        assert torch.equal(snn.predict_curve((image, known), [512])[512], answer)
        named = {"image": image, "known": known}
        assert torch.equal(snn.predict_curve(named, [512])[512], answer)
        assert relative(snn(image[:3], known[:3], T=400), net(image[:3], known[:3])) < 0.02
        rows = [row.name for row in snn.report.rows]
        assert "image" in rows
        assert "known" in rows
        assert torch.equal(pickle.loads(pickle.dumps(snn))(image, known), answer)


@pytest.mark.parametrize("method", ["light", "advanced", "ptl", "datta", "ltb"])
def test_two_inputs_by_methods_that_use_data_or_silence(method: str) -> None:
    net, batches = TwoInputs().eval(), [two(6, seed=i) for i in range(3)]
    given: Any = Advanced(iterations=2) if method == "advanced" else method
    snn = convert(net, batches, inputs=lambda item: item, method=given, T=8, progress=False)
    with torch.no_grad():
        assert torch.isfinite(snn(*batches[0])).all()
        assert torch.equal(pickle.loads(pickle.dumps(snn))(*batches[0]), snn(*batches[0]))
    if method in ("light", "advanced"):
        assert "18 images" in str(snn.report)
        whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
        at_once = convert(net, [whole], inputs=lambda i: i, method=given, T=8, progress=False)
        with torch.no_grad():
            assert relative(snn(*whole), at_once(*whole)) < 0.05


def test_two_inputs_with_fitted_starts_and_a_certificate() -> None:
    net, batch = TwoInputs().eval(), two()
    snn = convert(net, [batch, batch], inputs=lambda item: item, v_init="mse", T=4, progress=False)
    with torch.no_grad():
        answer = snn(*batch)
    for given in (batch, {"known": batch[1], "image": batch[0]}):
        certificate = snn.certify(given)
        assert bool((certificate.low <= answer.double() + 1e-5).all())
        assert bool((certificate.high >= answer.double() - 1e-5).all())
    with pytest.raises(TypeError, match="takes image, known; known missing"):
        snn.certify(batch[0])


@torch.no_grad()
def test_optional_inputs_and_constants() -> None:
    net, (image, known) = TwoInputs().eval(), two()
    bias = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    item = {"image": image, "known": known, "bias": bias, "gain": 0.5}
    snn = convert(net, [item], inputs=lambda i: i, threshold="max", T=512)
    assert snn.inputs == ("image", "known", "bias")
    assert relative(snn(image, known, bias), net(image, known, bias, 0.5)) < 0.02
    assert torch.equal(snn(image, known, bias, 0.5), snn(image, known, bias))
    with pytest.raises(ValueError, match=r"converted with gain=0\.5 .*: got 1\.0"):
        snn(image, known, bias, gain=1.0)
    with pytest.raises(TypeError, match="takes image, known, bias; bias missing"):
        snn(image, known)
    plain = convert(net, [item], inputs=lambda i: (i["image"], i["known"]), T=4)
    with pytest.raises(ValueError, match=r"converted with bias=None .*tensor of shape \(8, 8\)"):
        plain(image, known, bias)
    plain(image, known, None)


@torch.no_grad()
def test_two_inputs_without_data_and_by_parallel() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 2)
            self.act1, self.act2 = QCFS(L, 2.0), QCFS(L, 2.0)

        def forward(self, x: Tensor, *, z: Tensor, scale: float = 2.0) -> Tensor:
            return self.c(self.act2(scale * self.act1(self.a(x)) + self.b(z)))

    net, x, z = Net(), torch.randn(5, 6), torch.randn(5, 3)
    snn = convert(net, method="parallel", T=L)
    assert snn.inputs == ("x", "z")
    torch.testing.assert_close(snn(x, z=z), net(x, z=z))
    with pytest.raises(TypeError, match="takes x, z"):
        snn(x, z)  # z is keyword-only, as in the ANN
    weights = convert(net, [(x, z)], inputs=lambda i: {"x": i[0], "z": i[1]}, normalize="threshold")
    assert weights.inputs == ("x", "z")


@torch.no_grad()
def test_thresholds_fold_into_weights_with_two_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return F.relu(self.c(F.relu(self.a(x) + self.b(z))))

    net, x, z = Net(), torch.randn(9, 6), torch.randn(9, 3)
    snn = convert(net, [(x, z)], inputs=lambda i: i, normalize="weights", threshold="max", T=512)
    assert relative(snn(x, z), net(x, z)) < 0.02


@torch.no_grad()
def test_token_ids_with_a_mask() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.fc1 = nn.Embedding(11, 8), nn.Linear(8, 12)
            self.fc2, self.fc3 = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            h = F.relu(self.fc1(self.words(ids))) * mask[:, :, None]
            return self.fc3(F.relu(self.fc2(h)).masked_fill(~mask[:, :, None], 0.0).sum(1))

    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(11, (6, 7), generator=g), torch.rand(6, 7, generator=g) > 0.3
    net = Text()
    data = [(ids[i : i + 2], {"mask": mask[i : i + 2]}) for i in (0, 2, 4)]
    snn = convert(
        net, data, inputs=lambda i: {"ids": i[0], **i[1]}, threshold="max", T=512, progress=False
    )
    assert relative(snn(ids, mask), net(ids, mask)) < 0.02
    assert relative(snn(ids[:1], mask=mask[:1]), net(ids[:1], mask[:1])) < 0.05


@torch.no_grad()
def test_inputs_in_a_list_or_a_dict() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, levels: Any) -> Tensor:
            first, second = (levels[k] for k in self.keys)
            return self.c(F.relu(self.a(first)) + F.relu(self.b(second)))

    x, z = torch.randn(9, 6), torch.randn(9, 3)
    for levels, keys in [([x, z], (0, 1)), ({"fine": x, "coarse": z}, ("fine", "coarse"))]:
        net = Pyramid()
        net.keys = keys
        snn = convert(net, [levels], inputs=lambda i: (i,), threshold="max", T=512)
        assert snn.inputs == ("levels",)
        assert relative(snn(levels), net(levels)) < 0.02


class Pairs(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        image, known = two(1, seed=i)
        return {"image": image[0], "known": known[0], "label": torch.tensor(i)}


@torch.no_grad()
def test_a_dataloader_of_dicts_in_several_batches() -> None:
    net = TwoInputs().eval()
    loader = DataLoader(Pairs(), batch_size=5)

    def inputs(item: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return item["image"], item["known"]

    snn = convert(net, loader, inputs=inputs, threshold="max", T=512, progress=False)
    image, known = two()
    assert relative(snn(image, known), net(image, known)) < 0.05


IMAGE, KNOWN = two()


@pytest.mark.parametrize(
    ("loader", "inputs", "error", "words"),
    [
        ([(IMAGE, KNOWN)], None, ConversionError, r"2 required inputs.*inputs=lambda item: item"),
        ([{"a": IMAGE}], None, TypeError, "got dict.*pass inputs="),
        (
            [(IMAGE, KNOWN)],
            lambda i: i[:1],
            ConversionError,
            "missing a required argument: 'known'",
        ),
        ([(IMAGE, KNOWN)], lambda i: {"image": i[0], "x": i[1]}, ConversionError, "do not suit"),
        ([(IMAGE, KNOWN[:3])], lambda i: i, ValueError, "batch, but the inputs have .*: 8.*: 3"),
        ([(IMAGE, KNOWN)], lambda i: 5, TypeError, "inputs must give a tensor, .*; got int"),
        ([(IMAGE, KNOWN)], "image", TypeError, "inputs must be a function .* got str"),
        ([(IMAGE, [KNOWN, 3])], lambda i: i, ValueError, r"known\.1 is 3; inputs must be tensors"),
    ],
)
def test_inputs_that_are_none(loader: Any, inputs: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        convert(TwoInputs(), loader, inputs=inputs)


def test_an_input_called_T_is_refused() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, T: Tensor) -> Tensor:
            return F.relu(x + T)

    with pytest.raises(ConversionError, match="an input called T"):
        convert(Net(), threshold=1.0)


# Several outputs.


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclasses.dataclass
class Answer:
    logits: Tensor
    features: Tensor
    loss: Tensor | None = None


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "namedtuple", "dataclass", "nested"])
@torch.no_grad()
def test_several_outputs(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            h = F.relu(self.fc2(F.relu(self.fc1(x))))
            y = self.fc3(h)
            return {
                "tuple": lambda: (y, h),
                "list": lambda: [y, h],
                "dict": lambda: {"logits": y, "features": h},
                "namedtuple": lambda: Pair(y, h),
                "dataclass": lambda: Answer(y, h),
                "nested": lambda: {"a": [y, (h, None)], "x": x},
            }[kind]()

    net, x = Net(), torch.randn(9, 6)
    snn = convert(net, x, threshold="max", T=512)
    answer, expected = snn(x), net(x)
    assert type(answer) is type(expected)
    if kind == "dataclass":
        answer, expected = (dataclasses.asdict(a) for a in (answer, expected))
    if kind == "nested":
        assert torch.equal(answer["x"], x)
        assert answer["a"][1][1] is None
        answer, expected = ([a["a"][0], a["a"][1][0]] for a in (answer, expected))
    names = {
        "tuple": ["output.0", "output.1"],
        "list": ["output.0", "output.1"],
        "namedtuple": ["output.0", "output.1"],
        "dict": ["output.logits", "output.features"],
        "dataclass": ["output.logits", "output.features"],
        "nested": ["output.a.0", "output.a.1.0", "output.x"],
    }[kind]
    for name in names:
        assert snn.report[name].error < 0.02
    values = answer.values() if isinstance(answer, dict) else answer
    wanted = expected.values() if isinstance(expected, dict) else expected
    for got, want in zip(values, wanted, strict=True):
        if want is not None:
            assert relative(got, want) < 0.02
    assert "analog" not in str(snn.report)


# Operations.


class Middle(nn.Module):
    """linear -> relu -> a function of (module, tensor) -> relu -> linear, on ``[B, 5, 6]``."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("keep", torch.rand(5, 6) > 0.3)
        self.register_buffer("order", torch.tensor([3, 0, 5, 1, 4, 2]))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.function(self, F.relu(self.fc1(x)))))


AFFINE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "expand": lambda n, h: n.fc2(h).mean(1, keepdim=True).expand(-1, 5, -1) - h,
    "expand_as": lambda n, h: n.fc2(h).mean(1, keepdim=True).expand_as(h) - h,
    "token": lambda n, h: torch.cat([n.token.expand(h.shape[0], -1, -1), n.fc2(h)], 1),
    "repeat": lambda n, h: n.fc2(h).repeat(1, 2, 1),
    "repeat_interleave": lambda n, h: n.fc2(h).repeat_interleave(2, dim=1),
    "roll": lambda n, h: n.fc2(h) - torch.roll(h, 1, dims=1),
    "cumsum": lambda n, h: n.fc2(h).cumsum(1),
    "index_select": lambda n, h: n.fc2(h).index_select(2, n.order),
    "unbind": lambda n, h: torch.stack(n.fc2(h).unbind(1), 1) - h.unbind(1)[2][:, None],
    "tensor_split": lambda n, h: torch.cat(n.fc2(h).tensor_split(3, dim=2)[::-1], 2),
    "masked_fill": lambda n, h: n.fc2(h).masked_fill(n.keep, 0.0),
    "where": lambda n, h: torch.where(n.keep, n.fc2(h), h),
    "zeros_like": lambda n, h: torch.cat([n.fc2(h), torch.zeros_like(h)], 1),
    "new_ones": lambda n, h: n.fc2(h) - h.new_ones(5, 6),
    "einsum": lambda n, h: torch.einsum("bnc,dc->bnd", h, n.fc2.weight),
    "mT": lambda n, h: n.fc2(h).mT.mT,
    "bmm": lambda n, h: torch.matmul(n.fc2.weight[:5, :5], n.fc2(h)),
    "view_as": lambda n, h: n.fc2(h).flatten(1).view_as(h),
}


@pytest.mark.parametrize("name", AFFINE)
@torch.no_grad()
def test_affine_operations_between_neurons(name: str) -> None:
    net = Middle(AFFINE[name])
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    snn = convert(net, x, threshold="max", T=512)
    for batch in (1, 4):
        assert relative(snn(x[:batch]), net(x[:batch])) < 0.03


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda n, h: n.fc2(h).roll(1, 0), "roll over dimension 0 mixes the batch"),
        (lambda n, h: n.fc2(h).roll(1), "roll over all dimensions mixes the batch"),
        (lambda n, h: n.fc2(h).repeat(2, 1, 1), "repeat along dimension 0 mixes the batch"),
        (lambda n, h: n.fc2(h).repeat(1, 2, 1, 1), "repeat along dimension 0 mixes the batch"),
        (lambda n, h: n.fc2(h).cumsum(0), "cumsum over dimension 0"),
        (lambda n, h: torch.stack(n.fc2(h).unbind(0)), "unbind over dimension 0"),
        (lambda n, h: torch.where(h > 0.5, h, n.fc2(h)), "gt is not affine"),
        (lambda n, h: torch.einsum("bnc,bmc->bnm", h, n.fc2(h)), "einsum of two values"),
        (lambda n, h: torch.einsum("bnc,ab->anc", h, n.fc2.weight[:4, :4]), "einsum .* batch"),
    ],
)
def test_operations_that_are_not(function: Callable, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        convert(Middle(function), torch.rand(4, 5, 6))


def test_thresholds_do_not_fold_through_gates() -> None:
    net, x = build("se", relu)
    with pytest.raises(ConversionError, match="Use normalize='threshold'"):
        convert(net, x, on_unsupported="mean", normalize="weights")


@pytest.mark.parametrize("how", ["mean", "keep"])
@pytest.mark.parametrize("method", ["st_bif", BitSerial(unrolled=True), "ptl"])
def test_methods_that_time_the_constant_terms_take_affine_operations(method, how):
    """Between neurons only: no value of a squeeze-excite says what of it is constant."""
    net, x = nets.SENet(nn.ReLU), torch.randn(4, 3, 16, 16)
    with pytest.raises(ConversionError, match=f"on_unsupported='{how}' cannot be combined"):
        convert(net, x, method=method, on_unsupported=how)
