"""What this package offers for one input: every output, every way to save for the backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from cases import Call, Case, Entry, trained
from common import Skip

import snnkernels
from snnkernels import functional

NAME = "snnkernels"
THRESHOLD = 1.0
V_INIT = 0.5
SAVES = ("recompute", "trace", "bits")


def accepts(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function has that argument."""
    return argument in inspect.signature(function).parameters


def nbytes(result: Any) -> int:
    """Bytes of every tensor in a result."""
    if isinstance(result, torch.Tensor):
        return result.numel() * result.element_size()
    if isinstance(result, (tuple, list)):
        return sum(map(nbytes, result))
    slots = [getattr(result, name, None) for name in getattr(type(result), "__slots__", ())]
    return sum(map(nbytes, [*getattr(result, "__dict__", {}).values(), *slots]))


def _moved(case: Case, result: Any) -> float:
    # Read every current once, write every output once; the initial membrane is a number.
    return case.itemsize + nbytes(result) / (case.T * case.N)


def _spikes(case: Case) -> Call:
    return lambda x: functional.if_multi_step(x, V_INIT, THRESHOLD)[:2]


def _into(dtype: torch.dtype | None) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        out = torch.empty(case.T, case.N, dtype=dtype or case.torch_dtype, device=case.device)
        return lambda x: functional.if_multi_step(x, V_INIT, THRESHOLD, out=out, spike_dtype=dtype)[
            :2
        ]

    return make


def _uint8(case: Case) -> Call:
    return lambda x: functional.if_multi_step(x, V_INIT, THRESHOLD, spike_dtype=torch.uint8)[:2]


def _named(name: str) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        function = getattr(functional, name, None)
        if function is None:
            raise Skip(f"this snnkernels has no functional.{name}")
        return lambda x: function(x, V_INIT, THRESHOLD)

    return make


def _reference(case: Case) -> Call:
    def run(x: torch.Tensor) -> Any:
        with snnkernels.use_backend("reference"):
            return functional.if_multi_step(x, V_INIT, THRESHOLD)[:2]

    return run


def base() -> Entry:
    """What everything is compared with: fresh spikes in the input's dtype."""
    return Entry(NAME, _spikes, _moved, ours=True)


def reference() -> Entry:
    """The same in plain PyTorch, what runs where nothing is compiled."""
    return Entry(f"{NAME}, reference", _reference, ours=True)


def outputs() -> list[Entry]:
    """Every form of answer."""
    makes = {
        "out=": _into(None),
        "uint8": _uint8,
        "uint8, out=": _into(torch.uint8),
        "packed": _named("if_packed"),
        "count": _named("if_count"),
        "rate": _named("if_rate"),
    }
    found = [Entry(f"{NAME}, {name}", make, _moved, ours=True) for name, make in makes.items()]
    return [base(), *found]


def training() -> list[Entry]:
    """Forward and backward with each thing that may be saved in between."""
    plain = Entry(NAME, trained(_spikes), _counted_training("recompute"), ours=True)
    return [plain, *(_saving(save) for save in SAVES)]


def saving_forward(save: str) -> Callable[[Case], Call]:
    """The forward pass that keeps ``save`` for the backward pass."""

    def make(case: Case) -> Call:
        if not accepts(functional.if_multi_step, "save"):
            raise Skip("this snnkernels has no save=")
        try:
            _save(case.input()[:, :1].detach().requires_grad_(), save, None)
            surrogate = None
        except (ValueError, NotImplementedError, TypeError):
            # What fits into a bit is a derivative of two values.
            surrogate = "rectangle"
        return lambda x: _save(x, save, surrogate)

    return make


def _save(x: torch.Tensor, save: str, surrogate: str | None) -> Any:
    return functional.if_multi_step(x, V_INIT, THRESHOLD, surrogate_function=surrogate, save=save)[
        :2
    ]


def _saving(save: str) -> Entry:
    return Entry(
        f"{NAME}, save={save!r}",
        trained(saving_forward(save)),
        _counted_training(save),
        differs=lambda case: "rectangle surrogate" if save == "bits" else "",
        ours=True,
    )


def _counted_training(save: str) -> Callable[[Case, Any], float]:
    def counted(case: Case, result: Any) -> float:
        size = case.itemsize
        kept = {"recompute": 0.0, "trace": float(case.state_bytes), "bits": 0.125}[save]
        forward = 2 * size + kept + case.state_bytes / case.T
        # Back: the gradient in, the gradient out, and the current or what was kept of it.
        return forward + 2 * size + (kept or size)

    return counted
