"""``patch``: the neurons of other libraries made fast where they stand, with the same numbers.

A library that is in a model is already imported, so its adapter is found by the module names of
the classes in the model, and nothing is imported for a library that is not there.

An adapter says what becomes of a neuron in one of two ways. A *class*: the module stays the very
same object and changes its class to a subclass that overrides the arithmetic, so that references,
hooks, state, device and training flag stay by construction (``torch.nn.utils.parametrize`` does
the same). Or a *module* that takes its place in every parent.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from .report import PatchedModule, PatchReport

__all__ = [
    "Adapter", "Change", "PatchError", "PatchReport", "PatchedModule", "Refused", "Swap", "patch",
    "patched", "register", "unpatch",
]  # fmt: skip

# Where a patched module keeps what unpatch needs.
_MARK = "_snnkernels_patch"
_ON_REFUSED = ("warn", "report", "error")


class Refused(Exception):
    """Raised by an adapter: the module stays as it is, for the reason given."""


class PatchError(RuntimeError):
    """``patch(..., on_refused="error")`` found a neuron that it must leave alone.

    Attributes:
        report: the :class:`PatchReport`; the model is untouched.
    """

    def __init__(self, message: str, report: PatchReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class Change:
    """What is to become of a module.

    Attributes:
        now: a subclass of the module's class (the module stays and changes its class), or a module
            to take its place.
        note: a remark for the report.
        attributes: for a class: what the module gets beside it until it is unpatched, not as
            submodules, parameters or buffers.
        helper: belongs to a neuron beside it: no line in the report, and not counted.
    """

    now: nn.Module | type[nn.Module]
    note: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    helper: bool = False


class Adapter:
    """What :func:`patch` knows about one library. See :func:`register`.

    Attributes:
        library: its name, also the top-level package of its classes.
        pip: what ``pip install`` is told.
    """

    library: str = ""
    pip: str = ""

    def recognises(self, module: nn.Module) -> bool:
        """Whether ``module`` is a neuron of the library, or of a class that derives from one.

        What is recognised gets a line in the report; nothing below it is looked at.
        """
        raise NotImplementedError

    def replace(self, module: nn.Module, path: str) -> Change | nn.Module | type[nn.Module]:
        """What becomes of a neuron. It must not change the neuron.

        Args:
            module: a module that ``recognises`` accepts.
            path: where it is in the model.

        Raises:
            Refused: with the reason, where the numbers would not be the same.
        """
        raise NotImplementedError

    def groups(self, model: nn.Module) -> Iterable[dict[nn.Module, Change]]:
        """Modules of ``model`` patched together, as classes, before ``replace`` sees any of them.

        Such a module need not be one that ``recognises`` accepts.
        """
        return ()

    def restore(self, module: nn.Module, ours: nn.Module) -> None:
        """Gives the original ``module``, for which ``ours`` stood, what changed: state, device.

        Not called where only the class was changed: there is nothing to carry.
        """
        module.train(ours.training)

    def hook(self) -> AbstractContextManager[Any]:
        """A context in which functions of the library are ours, for :func:`patched`."""
        raise NotImplementedError

    def in_tests(self) -> AbstractContextManager[Any]:
        """As :meth:`hook`, with classes swapped too, for the library's own tests."""
        return self.hook()


# Library -> the module here that has an ADAPTER; imported when a model or the user names it.
_BUILT_IN: dict[str, str] = {
    "spikingjelly": "spikingjelly", "sinabs": "sinabs", "norse": "norse",
}  # fmt: skip
_ADAPTERS: dict[str, Adapter] = {}


def register(adapter: Adapter) -> None:
    """Adds an adapter, or replaces the one for the same library.

    Args:
        adapter: an :class:`Adapter` with a ``library``.

    Raises:
        TypeError: not an adapter.
        ValueError: it names no library.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter={adapter!r} is not a snnkernels.interop.Adapter")
    if not adapter.library:
        raise ValueError(f"{type(adapter).__name__}.library names no library")
    _ADAPTERS[adapter.library] = adapter


def adapter_of(library: str) -> Adapter:
    """The adapter of a library.

    Raises:
        ValueError: there is none.
    """
    if library not in _ADAPTERS:
        if library not in _BUILT_IN:
            known = ", ".join(map(repr, sorted({*_BUILT_IN, *_ADAPTERS})))
            raise ValueError(f"library={library!r} is unknown; known are {known}")
        register(import_module(f"{__package__}.{_BUILT_IN[library]}").ADAPTER)
    return _ADAPTERS[library]


def _library(module: nn.Module) -> str | None:
    """The library a module's class comes from, or derives from."""
    for cls in type(module).__mro__:
        name = cls.__module__.partition(".")[0]
        if name in _BUILT_IN or name in _ADAPTERS:
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
    they are: spikes and membranes are the same bits. What cannot be done with the same numbers is
    refused, with a reason, and stays as it is. References to a patched module stay good, modules
    used in several places stay shared, and a second call changes nothing.

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
            stacklevel=2,
        )
    for plan in plans:
        if plan.change is not None:
            _apply(model, plan)
    return report


def _plan(model: nn.Module) -> tuple[list[_Plan], PatchReport]:
    """What is to be done, with nothing changed yet."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    libraries = {name for module in paths if (name := _library(module))}
    together: dict[nn.Module, Change] = {}
    for name in sorted(libraries):
        for group in adapter_of(name).groups(model):
            together.update(group)

    plans, report, inside = [], PatchReport(), set[nn.Module]()
    for module, at in paths.items():
        name = _library(module)
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
                found = adapter.replace(module, at[0])
                change = found if isinstance(found, Change) else Change(found)
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
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    done = 0
    for module, at in paths.items():
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


class Swap:
    """Attributes of other modules that are ours while the context is entered; may nest.

    One per library: the first to enter puts ours in place, the last to leave puts theirs back,
    whatever the order. Other threads see the swap too.

    Args:
        targets: gives ``(owner, name, make)`` when first entered; ``make(theirs)`` is ours.
    """

    def __init__(
        self, targets: Callable[[], Iterable[tuple[Any, str, Callable[[Any], Any]]]]
    ) -> None:
        self._targets = targets
        self._lock = threading.Lock()
        self._depth = 0
        self._theirs: list[tuple[Any, str, Any]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context."""
        with self._lock:
            if self._depth == 0:
                found = list(self._targets())
                self._theirs = [(owner, name, vars(owner)[name]) for owner, name, _ in found]
                for owner, name, make in found:
                    setattr(owner, name, make(vars(owner)[name]))
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    for owner, name, theirs in reversed(self._theirs):
                        setattr(owner, name, theirs)
                    self._theirs = []


@contextmanager
def patched(*libraries: str) -> Iterator[None]:
    """Inside this context the functions of other libraries run on our kernels.

    For code that builds its neurons itself or calls the functions directly; models that exist are
    better served by :func:`patch`. A call whose numbers would not be the same runs the library's
    own function. Contexts may nest and are left in any order; the functions are the library's own
    again after the last, also after an exception.

    The swap is of the process, not of the thread: other threads that call the library meanwhile
    run on our kernels too, with the same numbers.

    Args:
        libraries: names: ``"spikingjelly"``, ``"sinabs"``, ``"norse"``.

    Raises:
        ValueError: no name, or an unknown one.
        ImportError: the library is not installed.
    """
    if not libraries:
        raise ValueError("patched() names no library; for example patched('spikingjelly')")
    with ExitStack() as stack:
        for adapter in [adapter_of(name) for name in libraries]:
            stack.enter_context(adapter.hook())
        yield
