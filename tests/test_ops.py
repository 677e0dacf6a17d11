"""The torch operators: schemas and fakes hold, compile and export go through without a break."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import (
    Backend,
    assert_close,
    assert_same_bits,
    compiles,
    currents,
    dtype_id,
    dyadic,
    moved,
)
from torch import Tensor, nn

from snnkernels import IFNode, LIFNode, use_backend
from snnkernels.functional import if_count, if_multi_step, if_rate, if_step
from snnkernels.kernels import backward, double_backward, params, reference, run
from snnkernels.kernels.spec import Asked, Grads, Neuron, Saved

pytestmark = pytest.mark.filterwarnings(
    # torch's own, from tracing; nothing of ours.
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
    "ignore:.*torch.jit.script.*:DeprecationWarning",
)

FORWARD = torch.ops.snnkernels.if_forward.default
BACKWARD = torch.ops.snnkernels.if_backward.default


NEURON = Neuron(v_value=0.25)


def flat(*groups: Any) -> tuple[Any, ...]:
    """The operator's arguments in order."""
    return tuple(value for group in groups for value in group)


def forward_sample(x: Tensor, T: int | None = None, **given: Any) -> tuple[Any, ...]:
    asked = Asked(**{k: given.pop(k) for k in list(given) if k in Asked._fields})
    smooth = given.pop("smooth", -1)
    neuron = NEURON._replace(**{"spike_dtype": x.dtype, **given})
    return flat((x, T), neuron, asked, (smooth, 2.0, 1.0))


def forward_samples() -> dict[str, tuple[Any, ...]]:
    x = currents(5, 2, 3, 4)
    full = torch.full((2, 3, 4), 0.5)
    channel = torch.tensor([0.5, 1.0, 1.5]).view(3, 1)
    all_options = params.HARD_RESET | params.STRICT | params.INPUT_SCALE
    leaky = params.BETA | params.BIAS | params.FIRE_LEVEL
    samples = {
        "plain": forward_sample(x),
        "count": forward_sample(x, spikes=False, count=True),
        "packed": forward_sample(x, words=True, window=True),
        "counts": forward_sample(x, count_at=(1, 4)),
        "everything": forward_sample(x, count=True, words=True, v_seq=True, charge_seq=True),
        "nothing but v": forward_sample(x, spikes=False),
        "uint8": forward_sample(x, spike_dtype=torch.uint8),
        "constant": forward_sample(x[0], T=6),
        "operands": forward_sample(x, v=full, threshold=channel, amplitude=channel),
        "options": forward_sample(x, options=all_options, input_scale=channel, v_seq=True),
        "leaky": forward_sample(
            x, options=leaky, beta=channel / 2, bias_value=0.25, fire_level=full
        ),
        "burst": forward_sample(x, options=params.BURST, max_spikes=3, count=True),
        "masked": forward_sample(x, options=params.MASK, mask=full > 0, count=True),
        "strided v": forward_sample(x, v=torch.zeros(4, 3, 2).permute(2, 1, 0)),
        "expanded": forward_sample(x[:, :1].expand(5, 2, 3, 4)),
        "repeated": forward_sample(x[:1].expand(5, 2, 3, 4)),
        "batch first": forward_sample(x.transpose(0, 1).contiguous().transpose(0, 1), v_seq=True),
        "channels last": forward_sample(
            x.transpose(2, 3).contiguous().transpose(2, 3), words=True, count=True, v_seq=True
        ),
        "transposed": forward_sample(x.transpose(1, 3)),
        "step 2": forward_sample(x[..., ::2]),
        "slice": forward_sample(x[..., :2], count=True),
        "no steps": forward_sample(x[:0], v=full),
        "no neurons": forward_sample(x[:, :0]),
        "one neuron": forward_sample(x[:, 0, 0, 0]),
        "double": forward_sample(x.double(), v=full.double(), v_seq=True),
        "smooth": forward_sample(x.double(), smooth=0, v_seq=True, charge_seq=True),
    }
    for dtype in (torch.float16, torch.bfloat16):
        samples[str(dtype)] = forward_sample(x.to(dtype), v=full, v_seq=True)
    return samples


def backward_sample(x: Tensor | None, T: int | None = None, **given: Any) -> tuple[Any, ...]:
    like = x if x is not None else given.get("charges", given.get("window"))
    steps = given.pop("steps", T or len(like))
    saved = Saved(
        x, given.pop("charges", None), given.pop("window", None), given.pop("words", None),
        T is not None, steps, like.dtype if like.dtype.is_floating_point else torch.float32,
    )  # fmt: skip
    grads = Grads(
        given.pop("grad_spikes", None), given.pop("rate", False),
        *(given.pop(f"grad_{name}", None) for name in Grads._fields[2:]),
    )  # fmt: skip
    needs = [True] + [False] * 7
    how = {
        "surrogate": 0, "alpha": 2.0, "scale": 1.0, "detach_reset": False, "smooth": False,
        "needs": needs,
    }  # fmt: skip
    how |= {k: given.pop(k) for k in list(given) if k in how}
    neuron = NEURON._replace(**{"spike_dtype": saved.dtype, **given})
    return flat(saved, neuron, grads, how.values())


def backward_samples() -> dict[str, tuple[Any, ...]]:
    x, g = currents(9, 2, 3, 4), currents(9, 2, 3, 4, seed=1)
    across = g.transpose(1, 3).contiguous().transpose(1, 3)
    full = torch.full((2, 3, 4), 0.5)
    channel = torch.tensor([0.5, 1.0, 1.5]).view(3, 1)
    plain = {"v": full, "threshold": channel, "amplitude": channel}
    scaled = {**plain, "input_scale": channel}
    leaky = {**scaled, "beta": channel / 2, "bias": channel / 8, "fire_level": full}
    options = params.INPUT_SCALE | params.BETA | params.BIAS | params.FIRE_LEVEL
    first, all_of = [True] * 4 + [False] * 4, [True] * 8
    bits = reference.pack(g > 0)
    samples = {
        "plain": backward_sample(x, grad_spikes=g),
        "strided grad": backward_sample(x, grad_spikes=across),
        "expanded grad": backward_sample(x, grad_spikes=torch.ones(()).expand(9, 2, 3, 4)),
        "repeated grad": backward_sample(x, grad_spikes=g[:1].expand(9, 2, 3, 4)),
        "strided x": backward_sample(x.transpose(1, 3), grad_spikes=g.transpose(1, 3)),
        "threshold": backward_sample(x, grad_spikes=g, grad_v=full, needs=first, **plain),
        "everything": backward_sample(
            x, grad_spikes=g, grad_v=full, grad_v_seq=g, needs=[True] * 5 + [False] * 3,
            options=params.INPUT_SCALE, **scaled,
        ),
        "leaky": backward_sample(
            x, grad_spikes=g, grad_v=full, grad_v_seq=g, needs=all_of, options=options, **leaky
        ),
        "burst": backward_sample(
            x, grad_spikes=g, grad_v=full, needs=all_of, options=options ^ params.FIRE_LEVEL
            | params.BURST, max_spikes=3, surrogate=7, scale=0.5, **leaky,
        ),
        "hard": backward_sample(
            x, grad_spikes=g, grad_charge_seq=g, needs=[True] * 5 + [False] * 3,
            options=params.INPUT_SCALE | params.HARD_RESET, **scaled,
        ),
        "rate": backward_sample(x, grad_spikes=g[0], rate=True),
        "constant": backward_sample(x[0], T=9, grad_spikes=g),
        "v only": backward_sample(x, grad_v=full, v=full, needs=[False, True] + [False] * 6),
        "trace": backward_sample(None, charges=x, grad_spikes=g, needs=first, **plain),
        "bits": backward_sample(
            None, window=bits, words=bits, steps=9, grad_spikes=g, surrogate=3, needs=first, **plain
        ),
        "no steps": backward_sample(
            x[:0], grad_spikes=g[:0], grad_v=full, v=full, needs=[True, True] + [False] * 6
        ),
        "no neurons": backward_sample(x[:, :0], grad_spikes=g[:, :0]),
        "double": backward_sample(x.double(), grad_spikes=g.double(), surrogate=2),
    }  # fmt: skip
    for dtype in (torch.float16, torch.bfloat16):
        samples[str(dtype)] = backward_sample(x.to(dtype), grad_spikes=g.to(dtype))
    return samples


# Autograd comes from the Function around the operators, so there is no registration to check.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", forward_samples())
def test_opcheck_forward(backend: Backend, name: str) -> None:
    sample = tuple(moved(a, backend.device) for a in forward_samples()[name])
    torch.library.opcheck(FORWARD, sample, test_utils=CHECKS)


@pytest.mark.parametrize("name", backward_samples())
def test_opcheck_backward(backend: Backend, name: str) -> None:
    sample = tuple(moved(a, backend.device) for a in backward_samples()[name])
    torch.library.opcheck(BACKWARD, sample, test_utils=CHECKS)


@pytest.mark.parametrize("name", forward_samples())
def test_operator_is_the_plain_function(backend: Backend, name: str) -> None:
    sample = tuple(moved(a, backend.device) for a in forward_samples()[name])
    n, a = 2 + len(Neuron._fields), 2 + len(Neuron._fields) + len(Asked._fields)
    neuron, asked = Neuron(*sample[2:n]), Asked(*sample[n:a])
    plain = run.if_forward(*sample[:2], neuron, asked, *sample[a:])
    for got, want in zip(FORWARD(*sample), plain, strict=True):
        if want is None:
            assert got.numel() == 0
        else:
            assert_same_bits(got, want)


@pytest.mark.parametrize("name", backward_samples())
def test_backward_operator_is_autograd(backend: Backend, name: str) -> None:
    """The operator, where autograd cannot run inside, against autograd through the reference."""
    sample = backward_samples()[name]
    a, b = len(Saved._fields), len(Saved._fields) + len(Neuron._fields)
    c = b + len(Grads._fields)
    saved, neuron, given = Saved(*sample[:a]), Neuron(*sample[a:b]), Grads(*sample[b:c])
    if saved.x is None:
        # Autograd cannot start from charges or bits: test_saves_agree holds these to the others.
        with use_backend("reference"):
            want = backward.if_backward(saved, neuron, given, *sample[c:])
    else:
        want = double_backward.if_backward(saved, neuron, given, *sample[c:])
    # Also below no_grad and in a compiled graph, where the dispatcher has left autograd behind.
    call = torch.compile(BACKWARD, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    there = tuple(moved(a, backend.device) for a in sample)
    with torch.no_grad():
        results = [BACKWARD(*there), call(*there)]
    results.append(BACKWARD(*there))
    rtol = {torch.float64: 1e-12, torch.float32: 1e-6}.get(saved.dtype, 1e-2)
    for got in results:
        for g, w in zip(got, want, strict=True):
            assert not g.requires_grad
            if w is None:
                assert g.numel() == 0
            else:
                assert g.dtype == w.dtype
                assert_close(g, w, rtol)


def test_fake_shapes() -> None:
    """On the meta device: shapes and dtypes without data."""
    for samples, op in ((forward_samples(), FORWARD), (backward_samples(), BACKWARD)):
        for name, sample in samples.items():
            real = op(*sample)
            fake = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in sample))
            for r, f in zip(real, fake, strict=True):
                assert (r.shape, r.dtype) == (f.shape, f.dtype), name


def test_a_bare_operator_does_not_pretend_to_have_gradients(backend: Backend) -> None:
    x = moved(currents(4, 3), backend.device).requires_grad_()
    spikes = FORWARD(*forward_sample(x))[0]
    # Either nothing hangs on it, or using it raises: never a silent zero.
    with pytest.raises(RuntimeError, match=r"does not require grad|not implemented|autograd"):
        spikes.sum().backward()
    assert x.grad is None


# ---- torch.compile -------------------------------------------------------------------------------


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def everything(x: Tensor, v: Tensor, th: Tensor, amplitude: Tensor) -> tuple[Tensor, ...]:
    """Each public function once."""
    spikes, last, v_seq = if_multi_step(
        x, v, th, channel_dim=1, amplitude=amplitude, store_v_seq=True
    )
    rate, _ = if_rate(x, "half", th, channel_dim=1)
    count, counted = if_count(x, v, 0.9)
    step, _ = if_step(x[0], 0.25, surrogate_function="sigmoid")
    return spikes, last, v_seq, rate, count, counted, step


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
def test_compiled_functions_equal_eager_ones(backend: Backend, dtype: torch.dtype) -> None:
    state = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [dyadic(5, 2, 3, 4, seed=i).to(backend.device) for i in range(7)]

    def results(function: Any) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [
            dyadic(5, 2, 3, 4, seed=1).to(dtype),
            (dyadic(2, 3, 4, seed=2) / 8).to(state),
            (1 + dyadic(3, seed=3) / 8).to(state),
            (1 + dyadic(1, seed=4) / 8).to(state),
        ]
        leaves = [t.to(backend.device).requires_grad_() for t in leaves]
        outputs = function(*leaves)
        loss = sum(
            (o.double() * (w if o.dim() == 4 else w[0])).sum()
            for o, w in zip(outputs, weights, strict=True)
            if o.requires_grad
        )
        return list(outputs), list(torch.autograd.grad(loss, leaves))

    want, want_grads = results(everything)
    got, got_grads = results(compiled(everything))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert_close(a, b, 1e-12 if dtype == torch.float64 else 1e-6 if dtype == state else 1e-2)


class Net(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.neuron = IFNode(0.5, v_init="half", **arguments)
        self.out = IFNode(0.5, output="rate")

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.neuron(self.first(x))))


@compiles
@pytest.mark.parametrize(
    "arguments",
    [{}, {"learn_threshold": True}, {"amplitude": "threshold"}, {"v_reset": 0.0, "tie": ">"}],
    ids=str,
)
def test_compiled_module(backend: Backend, arguments: dict[str, Any]) -> None:
    x = moved(currents(4, 5, 6), backend.device)
    eager, other = (Net(**arguments).to(backend.device) for _ in range(2))
    fast = compiled(other)
    # The first call starts at v_init, the second at the membranes of the first.
    for _ in range(2):
        want, got = eager(x), fast(x)
        assert_close(got, want, 1e-6)
        want.sum().backward()
        got.sum().backward()
        for a, b in zip(other.parameters(), eager.parameters(), strict=True):
            assert_close(a.grad, b.grad, 1e-5)
        for net in (eager, other):
            for node in (net.neuron, net.out):
                node.detach()
    assert_close(other.neuron.v, eager.neuron.v, 1e-6)


@compiles
def test_compiled_lif(backend: Backend) -> None:
    torch._dynamo.reset()
    x = moved(currents(5, 3, 4), backend.device)
    node = LIFNode(0.8, learn_beta=True, input_scale=0.5).to(backend.device)
    want = node(x)
    node.reset()
    got = torch.compile(node, fullgraph=True, backend="aot_eager")(x)
    assert_same_bits(got, want)
    (a,) = torch.autograd.grad(want.sum(), node.beta)
    (b,) = torch.autograd.grad(got.sum(), node.beta)
    assert_close(a, b, 1e-6)


@compiles
def test_no_graph_breaks(backend: Backend) -> None:
    torch._dynamo.reset()
    x = moved(currents(4, 5, 6), backend.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch._dynamo.explain(Net().to(backend.device))(x)
    assert found.graph_break_count == 0
    assert found.graph_count == 1


@compiles
def test_compiled_for_any_batch(backend: Backend) -> None:
    torch._dynamo.reset()
    net = Net().to(backend.device)
    fast = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (3, 4, 7):
            x = moved(currents(4, batch, 6), backend.device)
            got = fast(x)
            for node in (net.neuron, net.out):
                node.reset()
            assert_close(got, net(x), 1e-6)
            for node in (net.neuron, net.out):
                node.reset()


# ---- torch.export --------------------------------------------------------------------------------


class Stateless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.tensor([0.5, 1.0, 1.5]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spikes, v, _ = if_multi_step(x, "half", self.threshold, channel_dim=1)
        return spikes, v


@compiles
def test_export(backend: Backend) -> None:
    module = Stateless().to(backend.device)
    x = moved(currents(4, 2, 3), backend.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module, (x,), dynamic_shapes=({1: torch.export.Dim("batch")},)
        )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert FORWARD in targets
    for batch in (2, 5):
        x = moved(currents(4, batch, 3), backend.device)
        for got, want in zip(program.module()(x), module(x), strict=True):
            assert_same_bits(got, want)


def test_tensor_subclasses_and_modes_see_the_operator(backend: Backend) -> None:
    """Where something listens, the call goes through the operator instead of past it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listener(TorchDispatchMode):
        heard: list[Any]

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.heard.append(func)
            return func(*args, **(kwargs or {}))

    x = moved(currents(4, 3), backend.device)
    Listener.heard = []
    with Listener():
        if_multi_step(x)
        if_multi_step(x.clone().requires_grad_())[0].sum().backward()
    assert Listener.heard.count(FORWARD) == 2
    assert Listener.heard.count(BACKWARD) == 1


def test_plain_subclasses(backend: Backend) -> None:
    x = moved(currents(4, 3), backend.device)
    kind = type("Kind", (torch.Tensor,), {})
    assert_same_bits(if_multi_step(x.as_subclass(kind))[0].as_subclass(Tensor), if_multi_step(x)[0])
