"""Module by module: the way for networks that cannot be traced as a whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bound import takes_methods
from .calibration import SAMPLE, batches
from .errors import ConversionError
from .inputs import Inputs, as_given
from .network import ConvertedNetwork, _ends, _steps
from .pipeline import _device, convert
from .report import NodeReport, Report
from .spiking import SpikingActivation
from .trace import own_copy
from .verify import leaves, relative_error

__all__ = ["ConvertedModules", "convert_modules"]


def _run(network: nn.Module, x: Any) -> Any:
    return network(*x.args, **x.named) if isinstance(x, Inputs) else network(x)


class _Calls:
    """What a module is called with while the whole network runs on a loader, call by call.

    Can be iterated over again if the loader can. A batch is one call: a module that a loop calls
    three times gives three.
    """

    def __init__(self, net: nn.Module, path: str, loader: Any, inputs: Any) -> None:
        self.net, self.path, self.loader, self.inputs = net, path, loader, inputs
        self.first: Any = None  # the first item's inputs of the whole network
        self.calls = 0  # of the module, for the first item

    @torch.no_grad()
    def _of(self, x: Any, item: int) -> list[Inputs]:
        found: list[Inputs] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A copy: the module, or who called it, may write into its input.
            found.append(Inputs(args, dict(kwargs)).map(Tensor.clone))

        module = self.net.get_submodule(self.path)
        handle = module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            _run(self.net, x)
        except Exception as error:
            raise ConversionError(
                f"the network itself fails on item {item} of loader: {type(error).__name__}: "
                f"{error}; loader must yield inputs, [B, *], as tensors or (input, anything), or "
                "pass inputs=, a function from an item to the network's inputs"
            ) from error
        finally:
            handle.remove()
        return found

    def __iter__(self) -> Iterator[Inputs]:
        item, any_call = -1, False
        for item, x in enumerate(batches(self.loader, _device(self.net), self.inputs)):
            found = self._of(x, item)
            if item == 0:
                self.first, self.calls = x, len(found)
            any_call = any_call or bool(found)
            yield from (given for given in found if len(given) > 0)
        if not any_call:
            raise ConversionError(
                f"{self.path} was never called while the network ran on the loader's {item + 1} "
                "items: name a module whose forward the network calls (a ModuleList has none)"
                if item >= 0
                else "loader is empty: calibration needs at least one batch of inputs"
            )


@takes_methods
class ConvertedModules(nn.Module):
    """A network some modules of which are spiking; made by :func:`snnkernels.convert_modules`.

    A call runs the network's own Python; each call of a converted module starts from the initial
    potentials and answers after T steps, so a module that is called three times takes 3 T steps.
    Everything else is as it was, in evaluation mode.

    Attributes:
        network: the copy of the ANN with its converted modules.
        T: the number of steps the thresholds were made for, and the default of a call.
        report: the rows of all modules, ``module.node``, and the error of the whole answer.
    """

    def __init__(self, network: nn.Module, paths: Iterable[str], T: int, report: Report) -> None:
        super().__init__()
        self.network = network
        self.T = _steps(T)
        self.report = report
        self._paths = tuple(paths)
        self.eval()

    @property
    def converted(self) -> dict[str, ConvertedNetwork]:
        """The converted modules by their path."""
        found = {path: self.network.get_submodule(path) for path in self._paths}
        return {p: m for p, m in found.items() if isinstance(m, ConvertedNetwork)}

    def neurons(self) -> Iterator[tuple[str, SpikingActivation]]:
        """``(name in the ANN, layer)`` of every spiking layer, module by module."""
        for path, module in self.converted.items():
            for name, layer in module.neurons():
                yield f"{path}.{name}", layer

    def train(self, mode: bool = True) -> ConvertedModules:
        """Set the flag of this module only: the network stays in evaluation mode."""
        super().train(False)
        self.training = mode
        return self

    def forward(self, *inputs: Any, T: int | None = None, **named: Any) -> Any:
        """The network's output, its converted modules estimated in ``T`` steps.

        Args:
            inputs: what the ANN takes.
            T: number of steps of every call of a converted module, at least 1; default: those of
                the conversion.
            named: inputs by name.

        Raises:
            ValueError: T < 1 or not a whole number.
        """
        T = self.T if T is None else _steps(T)
        if len(inputs) == 1 and isinstance(inputs[0], Inputs) and not named:
            inputs, named = inputs[0].args, inputs[0].named
        modules = list(self.converted.values())
        before = [module.T for module in modules]
        try:
            for module in modules:
                module.T = T
            return self.network(*inputs, **named)
        finally:
            for module, steps in zip(modules, before, strict=True):
                module.T = steps

    def predict_curve(self, x: Any, steps: Iterable[int] = (1, 2, 4, 8, 16, 32)) -> dict[int, Any]:
        """The outputs after several numbers of steps, ``{T: output}``, each from its own run.

        What the network decides on the way may depend on T, so runs cannot be shared.

        Args:
            x: what the ANN takes; of several inputs a tuple by position or a dict by name.
            steps: numbers of steps; order and repetitions do not matter.

        Raises:
            ValueError: ``steps`` is empty, or one is not a whole number of at least 1.
            TypeError: ``steps`` is no iterable of numbers.
        """
        ends = _ends(steps)
        given = as_given(x)
        return {T: self(given, T=T) for T in ends}

    def extra_repr(self) -> str:
        """Show T and which modules spike."""
        return f"T={self.T}, spiking: {', '.join(self._paths)}"


def _own_options(net: nn.Module, modules: Any) -> dict[str, dict[str, Any]]:
    """Options by path, checked."""
    if isinstance(modules, str):
        modules = [modules]
    if isinstance(modules, Mapping):
        options = {path: dict(own or {}) for path, own in modules.items()}
    else:
        if not isinstance(modules, Iterable):
            raise TypeError(
                "modules must be paths such as ['backbone'], or {path: options}, got "
                f"{type(modules).__name__}"
            )
        options = {path: {} for path in modules}
    if not options:
        raise ValueError("modules is empty: name at least one module, such as ['backbone']")
    known = [name for name, _ in net.named_children()]
    for path, own in options.items():
        for name in ("T", "loader", "inputs"):
            if name in own:
                raise ValueError(
                    f"modules[{path!r}] has {name!r}, which is the same for all modules: give it "
                    "to convert_modules"
                )
        try:
            found = net.get_submodule(path) if path else None
        except AttributeError:
            found = None
        if found is None:
            raise ValueError(f"modules names {path!r}, which is not a module of it; it has {known}")
        inner = [other for other in options if other != path and other.startswith(f"{path}.")]
        if inner:
            raise ValueError(f"modules names {inner[0]!r} inside {path!r}: name one of the two")
    return options


def convert_modules(
    ann: nn.Module,
    modules: str | Iterable[str] | Mapping[str, Mapping[str, Any] | None],
    loader: Any = None,
    *,
    inputs: Callable[[Any], Any] | None = None,
    T: int = 16,
    progress: bool = True,
    **options: Any,
) -> ConvertedModules:
    """Convert modules of a network and leave the rest as it is; ``ann`` is not modified.

    For networks that cannot be converted whole, such as a loop that depends on the data around a
    backbone: each named module is converted by :func:`snnkernels.convert` by itself, calibrated on
    what it is called with while the whole ANN runs on the loader, and replaced in a copy. All
    modules are calibrated on the ANN, not on networks converted in part.

    Example::

        snn = snnkernels.convert_modules(ann, ["backbone", "head"], loader, T=16)
        answer = snn(images)
        print(snn.report)

    Args:
        ann: any module.
        modules: paths of modules (``ann.named_modules()``), or a dict from path to options of
            :func:`convert` for this module alone, such as ``{"backbone": {"method": "srp"}}``.
        loader: inputs of the whole ANN, as :func:`convert` takes them; it is read once for each
            module, and more often by some methods. Not needed where thresholds are learned.
        inputs: a function from an item of the loader to the ANN's inputs, as in :func:`convert`.
        T: number of steps.
        progress: show a tqdm bar while calibrating, if tqdm is installed.
        options: of :func:`convert`, for all modules.

    Raises:
        ConversionError: a module cannot be converted, or is never called; names it.
        ValueError, TypeError: an argument is not allowed; names it.
    """
    if not isinstance(ann, nn.Module):
        raise TypeError(f"ann must be a torch.nn.Module, got {type(ann).__name__}")
    T = _steps(T)
    if inputs is not None and not callable(inputs):
        raise TypeError(
            "inputs must be a function from an item of the loader to the network's inputs, got "
            f"{type(inputs).__name__}"
        )
    net, hooked = own_copy(ann)
    chosen = _own_options(net, modules)
    if "T" in inspect.signature(net.forward).parameters:
        raise ConversionError(
            f"{type(net).__name__}.forward has an input called T, which is the number of steps of "
            "a converted network: rename it"
        )
    if len(chosen) > 1 and isinstance(loader, Iterator):
        raise ValueError(
            "loader can be read only once, and each module takes a pass of its own: pass a list of "
            "batches or a DataLoader"
        )
    report = Report("", T)
    if hooked:
        report.notes.append(f"forward hooks of {', '.join(hooked)} were left out of the copy")
    done: dict[str, ConvertedNetwork] = {}
    calls: _Calls | None = None
    for path, own in chosen.items():
        given: dict[str, Any] = {}
        if loader is not None:
            calls = _Calls(net, path, loader, inputs)
            given = {"loader": calls, "inputs": lambda call: call}
        try:
            snn = convert(
                net.get_submodule(path), T=T, progress=progress, **given, **{**options, **own}
            )
        except ConversionError as error:
            raise ConversionError(f"module {path}: {error}") from error
        done[path] = snn
        if calls is not None and calls.calls != 1:
            report.notes.append(
                f"{path} was called {calls.calls} times for the loader's first item: so many times "
                "T steps"
            )
        _add(report, path, snn.report)
    expected: Any = None
    if calls is not None:
        sample = calls.first[:SAMPLE]
        with torch.no_grad():
            expected = _run(net, sample)
    _replace(net, done)
    whole = ConvertedModules(net, done, T, report)
    if calls is not None:
        _measure(whole, sample, expected)
    return whole


def _add(report: Report, path: str, own: Report) -> None:
    """The rows and notes of one module."""
    names = report.method.split(", ") if report.method else []
    report.method = ", ".join(dict.fromkeys([*names, own.method]))
    report.rows += [replace(row, name=f"{path}.{row.name}") for row in own.rows]
    report.notes += [f"{path}: {note}" for note in own.notes]
    silent = own.silent_channels.items()
    report.silent_channels.update({f"{path}.{name}": found for name, found in silent})


def _replace(net: nn.Module, done: dict[str, ConvertedNetwork]) -> None:
    """Put the converted modules wherever the originals are registered."""
    twins = {id(net.get_submodule(path)): snn for path, snn in done.items()}
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):  # named_children skips second names
            if id(child) in twins:
                parent.register_module(name, twins[id(child)])


@torch.no_grad()
def _measure(whole: ConvertedModules, sample: Any, expected: Any) -> None:
    """The error of the whole network's answer."""
    answers = dict(leaves(_run(whole, sample)))
    for name, value in leaves(expected):
        found = answers.get(name)
        error = float("inf") if found is None else relative_error(found, value)
        whole.report.rows.append(
            NodeReport(
                name,
                f"the whole network, {whole.T} steps a call; error against the ANN itself",
                error=error,
            )
        )
