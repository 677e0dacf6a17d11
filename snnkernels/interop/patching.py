"""``patch``: the neurons of other libraries made fast where they stand, with the same numbers.

A library that is in a model is already imported, so its adapter (``adapters.py``) is found by the
module names of the classes in the model, and nothing is imported for a library that is not there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..kernels.backends import outside
from .adapters import Adapter, Change, Refused, adapter_of, known, register
from .report import PatchedModule, PatchReport
from .swaps import patched

__all__ = [
    "Adapter", "Change", "PatchError", "PatchReport", "PatchedModule", "Refused", "patch",
    "patched", "register", "unpatch",
]  # fmt: skip

# Where a patched module keeps what unpatch needs.
_MARK = "_snnkernels_patch"
_ON_REFUSED = ("warn", "report", "error")


class PatchError(RuntimeError):
    """``patch(..., on_refused="error")`` found a neuron that it must leave alone.

    Attributes:
        report: the :class:`PatchReport`; the model is untouched.
    """

    def __init__(self, message: str, report: PatchReport) -> None:
        super().__init__(message)
        self.report = report


def _paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All paths of each module."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return paths


def _library(module: nn.Module, libraries: set[str]) -> str | None:
    """Which of the libraries a module's class comes from, or derives from."""
    for cls in type(module).__mro__:
        name = cls.__module__.partition(".")[0]
        if name in libraries:
            return name
    return None


def _class_name(cls: type) -> str:
    top = cls.__module__.partition(".")[0]
    return cls.__qualname__ if top == "__main__" else f"{top}.{cls.__qualname__}"


@dataclass
class _Plan:
    """A module, all its paths, and what becomes of it."""

    module: nn.Module
    paths: list[str]
    library: str
    change: Change | None


def _line(plan: _Plan, reason: str) -> PatchedModule:
    was, change = _class_name(type(plan.module)), plan.change
    also = tuple(plan.paths[1:])
    if change is None:
        return PatchedModule(plan.paths[0], plan.library, was, None, "refused", reason, also)
    cls = change.now if isinstance(change.now, type) else type(change.now)
    now = _class_name(cls)
    return PatchedModule(plan.paths[0], plan.library, was, now, "fused", change.note, also)


def patch(model: nn.Module, *, on_refused: str = "warn") -> PatchReport:
    """Replaces the neurons of other libraries by fused ones, in place, with the same numbers.

    Tie rule, kind of reset, surrogate and its width, ``detach_reset``, dtypes and state stay as
    they are: for finite currents spikes and membranes are the same bits (zeros of Sinabs and Norse
    but for their sign; behind an infinite current SpikingJelly's hard reset leaves NaN, ours not).
    What cannot be done with the same numbers is refused, with a reason, and stays as it is.
    References to a patched module stay good, modules used in several places stay shared, and a
    second call changes nothing.

    Args:
        model: any module; itself or modules in it are neurons of SpikingJelly (0.0.0.0.14 or
            2.0.0), Sinabs (IAF, LIF, their Squeeze forms) or Norse (IAF, IAFCell). snnTorch's have
            :func:`snnkernels.from_snntorch`.
        on_refused: ``"warn"`` (one warning that names the reasons), ``"report"`` (only the
            report tells) or ``"error"`` (raise, and leave the model untouched).

    Returns:
        A :class:`PatchReport`: a line per neuron, printable.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an unknown ``on_refused``.
        PatchError: a neuron was refused and ``on_refused`` is ``"error"``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module")
    if on_refused not in _ON_REFUSED:
        raise ValueError(
            f"on_refused={on_refused!r} is unknown; allowed are "
            + ", ".join(map(repr, _ON_REFUSED))
        )
    plans, report = _plan(model)
    if report.refused and on_refused != "report":
        reasons = "; ".join(
            f"{line.path or '(the model)'} ({line.was}): {line.reason}" for line in report.refused
        )
        if on_refused == "error":
            raise PatchError(f"patch: refused, and nothing was changed: {reasons}", report)
        warnings.warn(
            f"patch left {len(report.refused)} of {len(report)} neurons as they are: {reasons}. "
            'on_refused="report" makes this silent',
            stacklevel=outside(),
        )
    for plan in plans:
        if plan.change is not None:
            _apply(model, plan)
    return report


def _plan(model: nn.Module) -> tuple[list[_Plan], PatchReport]:
    """What is to be done, with nothing changed yet."""
    paths = _paths(model)
    all_known = known()
    found = {module: _library(module, all_known) for module in paths}
    libraries = set(filter(None, found.values()))
    together: dict[nn.Module, Change] = {}
    for library in sorted(libraries):
        for group in adapter_of(library).groups(model):
            together.update(group)

    plans, report, inside = [], PatchReport(), set[nn.Module]()
    for module, at in paths.items():
        name = found[module]
        if module in inside:
            continue
        if _MARK in module.__dict__:
            mark = module.__dict__[_MARK]
            inside.update(module.modules())
            if mark.helper:
                continue
            was = _class_name(mark.was if isinstance(mark.was, type) else type(mark.was))
            now = _class_name(type(module))
            line = PatchedModule(at[0], mark.library, was, now, "already", "", tuple(at[1:]))
            report.modules.append(line)
            continue
        if name is None:
            continue
        adapter = adapter_of(name)
        change, reason = together.get(module), ""
        if change is None:
            if not adapter.recognises(module):
                continue
            inside.update(module.modules())
            try:
                answer = adapter.replace(module, at[0])
                change = answer if isinstance(answer, Change) else Change(answer)
                if isinstance(change.now, nn.Module) and "" in at:
                    raise Refused("the model itself is the neuron, and has no parent to hold ours")
            except Refused as refused:
                change, reason = None, str(refused)
        plans.append(_Plan(module, at, name, change))
        if change is None or not change.helper:
            report.modules.append(_line(plans[-1], reason))
    return plans, report


@dataclass
class _Mark:
    """What a patched module was: a class, or a module (in a tuple: no submodule of ours)."""

    library: str
    was: Any
    attributes: tuple[str, ...] = ()
    helper: bool = False


def _apply(model: nn.Module, plan: _Plan) -> None:
    module, change = plan.module, plan.change
    assert change is not None
    if isinstance(change.now, type):
        mark = _Mark(plan.library, type(module), tuple(change.attributes), change.helper)
        module.__class__ = change.now
        # Past nn.Module.__setattr__: neither submodules nor buffers.
        module.__dict__.update({_MARK: mark, **change.attributes})
    else:
        change.now.train(module.training)
        change.now.__dict__[_MARK] = _Mark(plan.library, module)
        _put(model, plan.paths, change.now)


def _put(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    for path in paths:
        parent, _, name = path.rpartition(".")
        # A dict entry: nn.Sequential and GraphModule have names that are no identifiers.
        model.get_submodule(parent)._modules[name] = module


def unpatch(model: nn.Module) -> int:
    """Undoes :func:`patch`: the very same modules as before, with the state of now.

    Args:
        model: a model with patched modules, or a part or copy of one; others are left alone.

    Returns:
        How many neurons were put back.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module")
    done = 0
    for module, at in _paths(model).items():
        mark = module.__dict__.get(_MARK)
        if mark is None:
            continue
        if isinstance(mark.was, type):
            for name in (_MARK, *mark.attributes):
                module.__dict__.pop(name, None)
            module.__class__ = mark.was
        else:
            adapter_of(mark.library).restore(mark.was, module)
            _put(model, at, mark.was)
        done += not mark.helper
    return done
