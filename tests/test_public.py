"""The public surface: every name documented with its parameters and errors, and typed."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import support

import snnkernels
from snnkernels import (
    bound,
    compat,
    conversion,
    data,
    distributed,
    hub,
    interop,
    maps,
    metrics,
    models,
    plots,
)

MODULES: tuple[ModuleType, ...] = (
    snnkernels, snnkernels.functional, snnkernels.options, snnkernels.surrogate, conversion, data,
    maps, models, metrics, plots, hub, interop, compat.spikingjelly, distributed,
)  # fmt: skip


def public() -> Iterator[tuple[str, Any, str]]:
    """``(name, function, the docstrings that may speak of it)`` of everything public."""
    seen = set()
    for module in MODULES:
        names = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
        for name in names:
            thing = getattr(module, name)
            home = getattr(thing, "__module__", None) or ""
            if not home.startswith("snnkernels") or id(thing) in seen:
                continue
            seen.add(id(thing))
            if inspect.isclass(thing):
                yield from members(name, thing)
            elif inspect.isfunction(thing):
                yield name, thing, inspect.getdoc(thing) or ""


def members(name: str, cls: type) -> Iterator[tuple[str, Any, str]]:
    about = "\n".join(
        inspect.getdoc(c) or "" for c in cls.__mro__ if c.__module__[:10] == "snnkernels"
    )
    # What a function makes has a constructor that is no user's; fields document a dataclass.
    made = re.search(r"made by :func:", about)
    made = made or is_dataclass(cls) or issubclass(cls, Exception)
    if "__init__" in vars(cls) and not made:
        yield name, cls.__init__, about
    for key, value in vars(cls).items():
        if key.startswith("_") or not (value := getattr(value, "__func__", value)):
            continue
        if isinstance(value, bound._Bound):
            value = getattr(cls, key)
        function = value.fget if isinstance(value, property) else value
        if inspect.isfunction(function):
            own = inspect.getdoc(getattr(cls, key)) or ""
            yield f"{name}.{key}", function, f"{own}\n{about}"


FUNCTIONS = {name: (function, text) for name, function, text in public()}


def raised(function: Any) -> set[type[Exception]]:
    """The exceptions that the body of ``function`` itself raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            kind = function.__globals__.get(name, getattr(builtins, name, None))
            if inspect.isclass(kind):
                found.add(kind)
    return found - {AssertionError, NotImplementedError}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_and_errors_are_documented(name: str) -> None:
    function, text = FUNCTIONS[name]
    constructor = function.__name__ == "__init__"
    own = text if constructor else function.__doc__
    assert own, "no docstring"
    # "Arguments as in :func:`if_multi_step`": what is said there counts.
    for reference in re.findall(r":(?:func|class):`(?:[\w.]*\.)?(\w+)`", own):
        text += FUNCTIONS.get(reference, (None, ""))[1]
    words = set(re.findall(r"\w+", text))
    parameters = inspect.signature(function).parameters.values()
    wanted = {p.name for p in parameters if not p.name.startswith("_")} - {"self", "cls"}
    # Passed on to the function that the docstring names, or to the base class.
    wanted -= {p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    assert not wanted - words, "parameters that the docstring does not mention"
    for error in raised(function):
        kinds = {kind.__name__ for kind in error.__mro__} - {"Exception", "BaseException"}
        assert kinds & words, f"the docstring does not mention {error.__name__}"


def test_the_surface_is_seen() -> None:
    assert len(FUNCTIONS) > 100
    assert {
        "IFNode",
        "IFNode.reset",
        "if_multi_step",
        "convert",
        "ConvertedNetwork.certify",
    } <= set(FUNCTIONS)
    assert raised(FUNCTIONS["PackedSpikes.rate"][0]) == {ValueError}


# ---- types ---------------------------------------------------------------------------------------

SCRIPT = """
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import snnkernels
from snnkernels import (
    ConversionError, ConvertedNetwork, IFNode, LIFNode, PackedSpikes, Plan, SpikeMonitor,
    VoltageMonitor, convert, detach_net, functional, lower, maps, reset_net, set_step_mode,
    surrogate,
)
from snnkernels.options import Signed

node: IFNode = IFNode(v_threshold=1.0, v_init="half", surrogate_function=surrogate.ATan(2.0))
leaky: LIFNode = LIFNode(0.9, store_packed=True)
spikes, v, trace = functional.if_multi_step(torch.rand(4, 8))
kept: Tensor | None = trace
total: Tensor = spikes + v
packed, _ = functional.if_packed(torch.rand(4, 8))
whole: PackedSpikes = PackedSpikes.cat([packed, packed])
run = functional.if_run(torch.rand(4, 8), outputs="count", signed=Signed(high=3))
counts: Tensor | None = run.count
net: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
try:
    snn: ConvertedNetwork = convert(net, [torch.rand(4, 8)], method="opi", T=8)
except ConversionError as error:
    print(error)
curve = snn.predict_curve(torch.rand(4, 8), [1, 2])
first: object = curve[1]
text: str = str(snn.report)
page: str = snn.report.to_html("report.html", accuracy={1: 0.5}, ann=0.9)
folder = snn.save_pretrained("folder")
loaded: ConvertedNetwork = snnkernels.load_pretrained(folder, device="cpu")
program = snn.export(torch.rand(4, 8), T=4)
report: snnkernels.PatchReport = snnkernels.patch(net)
operations = snnkernels.metrics.synaptic_operations(snn, torch.rand(4, 8))
plan: Plan = lower(snn)
reset_net(net)
detach_net(net)
set_step_mode(net, "m")
with SpikeMonitor(snn) as monitor, VoltageMonitor(snn, at="charge") as volts:
    snn(torch.rand(4, 8))
records: Mapping[str, PackedSpikes | Tensor] = monitor.spikes
membrane: Tensor = volts.v["1"]
rates: dict[str, float] = monitor.rates()
level: Tensor = maps.qcfs(torch.rand(3), 1.0, 8)
snnkernels.set_backend("auto")
"""
WRONG = {
    'snn.save_pretrained(3)': "arg-type",
    'snn.report.to_html(titel="x")': "call-arg",
    'snnkernels.set_backend(3)': "arg-type",
    'set_step_mode(net, 1)': "arg-type",
    'IFNode(v_thresh=1.0)': "call-arg",
    'snnkernels.no_such_name': "attr-defined",
}  # fmt: skip


def test_bound_methods_are_declared_as_they_are() -> None:
    """What type checkers are told of a method from an upper floor is the function's signature."""
    declared: dict[tuple[str, str], ast.FunctionDef] = {}
    for path in (support.PACKAGE / "conversion").rglob("*.py"):
        for cls in ast.walk(ast.parse(path.read_text())):
            for block in cls.body if isinstance(cls, ast.ClassDef) else ():
                if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
                    for stub in block.body:
                        if isinstance(stub, ast.FunctionDef):
                            declared[cls.name, stub.name] = stub
    # Refused at run time: a type checker shall say so as well.
    never = {("ConvertedModules", "save_pretrained"), ("ConvertedModules", "push_to_hub")}
    there = {(c, name) for c, methods in bound.METHODS.items() for name in methods}
    assert set(declared) == there - never
    for (cls, name), stub in declared.items():
        module = importlib.import_module(f"snnkernels.{bound.METHODS[cls][name]}")
        function = getattr(module, name)
        (real,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        assert isinstance(real, ast.FunctionDef)
        real.args.args[0] = stub.args.args[0]  # self
        assert ast.unparse(real.args) == ast.unparse(stub.args), name
        assert ast.unparse(real.returns or stub) == ast.unparse(stub.returns or real), name


@pytest.mark.slow
def test_a_users_script_is_typed(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    support.optional("mypy")
    cache = getattr(request.config, "cache", None)
    home = support.PACKAGE.parent
    # An installed package is found by itself, and mypy refuses its folder as a path.
    where = {} if home.name == "site-packages" else {"MYPYPATH": str(home)}
    for name, text in (("right", SCRIPT), ("wrong", SCRIPT + "\n".join(WRONG) + "\n")):
        (tmp_path / f"{name}.py").write_text(text)
    done = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent",
            "--cache-dir", str(cache.mkdir("mypy") if cache else tmp_path), "right.py", "wrong.py",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, **where},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert done.returncode == 1, done.stdout + done.stderr
    assert [re.search(r"\[([\w-]+)\]$", line)[1] for line in lines] == list(WRONG.values()), lines
    assert all(line.startswith("wrong.py") for line in lines)
