"""The others, each set up to compute the same neuron as nearly as it can.

Threshold 1, membrane 0.5 at the start, reset by subtraction, fire at >=. Where a library cannot do
that, ``differs`` says why; the benchmarks compare spikes before they time and state the difference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from cases import Call, Case, Entry, trained
from common import Skip

HALF = ("float16", "bfloat16")
_COMPILED_UP_TO = 32  # steps; beyond, compiling an unrolled loop takes minutes


def need(module: str) -> ModuleType:
    """Imports a rival, or says that it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Skip(f"{module.split('.')[0]} is not installed ({error})") from None


# ---- plain PyTorch -------------------------------------------------------------------------------


class _ATan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (u,) = ctx.saved_tensors
        return grad / (1 + (torch.pi * u) ** 2)  # alpha = 2


def _membrane(x: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if x.element_size() < 4 else x.dtype
    return torch.full_like(x[0], 0.5, dtype=dtype)


def stacking_loop(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What one writes first; indexing by unbind, whose backward pass is linear in T."""
    v, out = _membrane(x), []
    for current in x.unbind(0):
        v = v + current
        s = _ATan.apply(v - 1.0) if x.requires_grad else (v >= 1.0).to(v.dtype)
        v = v - s
        out.append(s.to(x.dtype))
    return torch.stack(out), v


def slice_loop(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes each step's spikes into their place."""
    v, out = _membrane(x), torch.empty_like(x)
    for t in range(x.shape[0]):
        v = v + x[t]
        s = (v >= 1.0).to(v.dtype)
        v = v - s
        out[t] = s
    return out, v


def inplace_loop(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Three in-place operations a step, no temporary: the quickest plain form."""
    v, out = _membrane(x), torch.empty_like(x)
    for t in range(x.shape[0]):
        v += x[t]
        torch.ge(v, 1.0, out=out[t])
        v -= out[t]
    return out, v


def _bytes_stacking(case: Case, result: Any) -> float:
    # v + x, compare, cast, subtract, stack (and a cast to half precision).
    state, size = case.state_bytes, case.itemsize
    loop = (2 * state + size) + (state + 1) + (1 + state) + 3 * state + 2 * size
    return loop + (state + size if size < 4 else 0)


def _bytes_inplace(case: Case, result: Any) -> float:
    state, size = case.state_bytes, case.itemsize
    return (2 * state + size) + (state + size) + (2 * state + size)


def _bytes_fused(case: Case, result: Any) -> float:
    return 2 * case.itemsize + case.state_bytes / case.T


# ---- torch.compile -------------------------------------------------------------------------------


def _compiled(function: Callable[..., Any]) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        return torch.compile(function, dynamic=False)

    return make


def _too_long(case: Case) -> str:
    if case.T <= _COMPILED_UP_TO:
        return ""
    return f"compiling {case.T} unrolled steps takes minutes; --all does it"


# ---- SpikingJelly --------------------------------------------------------------------------------


def _sj_function(case: Case) -> Call:
    sj = need("spikingjelly.activation_based.functional")
    atan = need("spikingjelly.activation_based.surrogate").ATan(alpha=2.0)

    def run(x: torch.Tensor) -> Any:
        return sj.if_multi_step(x, _membrane(x), 1.0, None, atan, False, False)[:2]

    return run


def _sj_compiled(case: Case) -> Call:
    return _compiled(_sj_function(case))(case)


def sj_node(case: Case | None = None, **options: Any) -> Any:
    """SpikingJelly's module with our neuron's settings."""
    neuron = need("spikingjelly.activation_based.neuron")
    surrogate = need("spikingjelly.activation_based.surrogate")
    options = {"step_mode": "m", "v_reset": None, **options}
    return neuron.IFNode(surrogate_function=surrogate.ATan(alpha=2.0), **options)


def _sj_module(case: Case) -> Call:
    node = sj_node()

    def run(x: torch.Tensor) -> Any:
        node.reset()
        node.v = torch.full_like(x[0], 0.5)
        return node(x), node.v

    return run


def _sj_half_threshold(case: Case) -> Call:
    neuron = need("spikingjelly.activation_based.neuron")
    surrogate = need("spikingjelly.activation_based.surrogate")
    node = neuron.HalfThresholdIFNode(surrogate_function=surrogate.ATan(alpha=2.0), step_mode="m")

    def run(x: torch.Tensor) -> Any:
        node.reset()
        return node(x), node.v

    return run


def _bytes_sj(case: Case, result: Any) -> float | None:
    # GPU: also stores the charged membrane, float32, and reads and writes v. CPU: an eager loop.
    return 2 * case.itemsize + 4 + 8 / case.T if case.device == "cuda" else None


def _bytes_sj_steps(case: Case, result: Any) -> float | None:
    # One launch a step: x, s, charged membrane, v in, v out; then the stack.
    return 4 * case.itemsize + 12 if case.device == "cuda" else None


# ---- snnTorch, Norse, Sinabs ---------------------------------------------------------------------


def _snntorch(case: Case) -> Call:
    leaky = need("snntorch").Leaky(
        beta=1.0, threshold=1.0, reset_mechanism="subtract", reset_delay=False
    )
    leaky = leaky.to(case.device)

    def run(x: torch.Tensor) -> Any:
        v, out = _membrane(x), []
        for current in x.unbind(0):
            spikes, v = leaky(current, v)
            out.append(spikes)
        return torch.stack(out), v

    return run


def _norse(case: Case) -> Call:
    node = need("norse.torch.module.iaf").IAF().to(case.device)
    state = need("norse.torch.functional.iaf").IAFFeedForwardState

    def run(x: torch.Tensor) -> Any:
        spikes, last = node(x, state(v=torch.full_like(x[0], 0.5)))
        return spikes, last.v

    return run


def _sinabs(case: Case) -> Call:
    layers, activation = need("sinabs.layers"), need("sinabs.activation")
    node = layers.IAF(
        spike_threshold=torch.tensor(1.0),
        spike_fn=activation.SingleSpike,
        reset_fn=activation.MembraneSubtract(),
    ).to(case.device)

    def run(x: torch.Tensor) -> Any:
        shape = (1, *x.shape[1:])
        if not node.is_state_initialised() or not node.state_has_shape(shape):
            node.init_state_with_shape(shape)
            node.to(case.device)
        node.v_mem = torch.full_like(x[:1], 0.5, requires_grad=False)
        return node(x.unsqueeze(0))[0], node.v_mem[0]

    return run


def _quadratic(case: Case) -> str:
    if case.training and case.T >= 64:
        return "its own loop indexes x[t]: a backward pass of T^2 N; --all does it"
    return ""


# ---- the lists -----------------------------------------------------------------------------------


def _half(reason: str) -> Callable[[Case], str]:
    return lambda case: reason if case.dtype in HALF else ""


def _always(reason: str) -> Callable[[Case], str]:
    return lambda case: reason


_IN_X_DTYPE = "membrane kept in the input's dtype"
_STRICT = "fires only above the threshold (strict >)"
_HARD = "resets to 0 (it has no reset by subtraction) and fires only above the threshold"


def forward() -> list[Entry]:
    """Everybody, without gradients."""
    return [
        Entry("PyTorch loop", _made(stacking_loop), _bytes_stacking),
        Entry("PyTorch loop, in place", _made(inplace_loop), _bytes_inplace),
        Entry(
            "torch.compile, slices", _compiled(slice_loop), _bytes_fused,
            skip=_too_long, compiles=True,
        ),
        Entry(
            "torch.compile, stack", _compiled(stacking_loop), _bytes_fused,
            skip=_too_long, compiles=True,
        ),
        Entry("SpikingJelly, function", _sj_function, _bytes_sj),
        Entry("SpikingJelly, IFNode", _sj_module, _bytes_sj, differs=_half(_IN_X_DTYPE)),
        Entry(
            "SpikingJelly, HalfThresholdIFNode", _sj_half_threshold, _bytes_sj_steps,
            differs=_half(_IN_X_DTYPE),
        ),
        Entry(
            "SpikingJelly, torch.compile", _sj_compiled, skip=_too_long, compiles=True,
        ),
        Entry("snnTorch, Leaky(beta=1)", _snntorch, differs=_always(_STRICT)),
        Entry("Norse, IAF", _norse, differs=_always(_HARD)),
        Entry("Sinabs, IAF", _sinabs, differs=_half(_IN_X_DTYPE)),
    ]  # fmt: skip


# Their own loops take x[t], whose backward pass fills a [T, N] tensor for every step.
_INDEXING = ("SpikingJelly, HalfThresholdIFNode", "Norse, IAF", "Sinabs, IAF")


def differentiable() -> list[Entry]:
    """Everybody who has gradients, as forward passes."""
    inference = ("PyTorch loop, in place", "torch.compile, slices")
    return [entry for entry in forward() if entry.name not in inference]


def training() -> list[Entry]:
    """Everybody who has gradients; ``differs`` is about gradients here."""
    unlike = {
        "snnTorch": _STRICT, "Norse": _HARD + ", its own surrogate",
        "Sinabs": "its own surrogate (exponential)",
    }  # fmt: skip
    found = []
    for entry in differentiable():
        reason = next((why for who, why in unlike.items() if who in entry.name), "")
        found.append(
            Entry(
                entry.name,
                trained(entry.make),
                skip=_quadratic if entry.name in _INDEXING else entry.skip,
                differs=_always(reason) if reason else entry.differs,
                compiles=entry.compiles,
            )
        )
    return found


def _made(function: Callable[..., Any]) -> Callable[[Case], Call]:
    return lambda case: function
