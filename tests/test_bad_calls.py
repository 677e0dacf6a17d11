"""Bad input: each call of the table fails clearly and changes nothing; the table is complete."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module

import bad_calls
import bad_calls_world
import pytest
import support
import test_public
from bad_calls import ROWS, missing, run
from bad_calls_rows import Row
from test_cli import COMMANDS

from snnkernels import options

# Says what is allowed or what helps, or names the state in which the call cannot be done.
REMEDY = re.compile(
    r"\b(must|allowed|offered|expected|needs?|takes?|use|give|pass|name|names|only|at least|but|"
    r"at most|cannot|exclude|convert|broadcast|is empty|missing|damaged|within|does not|known|ask|"
    r"holds|choose|invalid|unrecognized|No space|killed|there is|is no|is not|outside|Replace|"
    r"has no|not in|is for|below|No such|Check|shares memory|disk is gone|is a file|is a folder)\b",
)


def named(row: Row) -> str:
    return f"{row.name}-{row.parameter}-{row.value}"


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_bad_call_says_what_is_wrong_and_changes_nothing(row: Row) -> None:
    if package := missing(row):
        support.optional(package)
    found = run(row)
    assert found.kind is not None, "nothing was raised"
    assert issubclass(found.kind, row.kinds), f"{found.kind.__name__}: {found.message}"
    said, name = found.message, re.escape(row.names or row.parameter)
    assert re.search(rf"(?<!\w){name}(?!\w)", said), f"{said!r} does not name {name}"
    assert row.value.lower() in said.lower(), f"{said!r} does not show {row.value}"
    assert REMEDY.search(said), f"{said!r} says nothing of what is allowed"
    assert found.changed == (), "a refused call changed something"


def test_the_table_is_large() -> None:
    assert len({row.call + row.given for row in ROWS}) >= 300


def test_changes_are_seen() -> None:
    """That the test above can fail."""
    for call in ("x.add_(1)", "node(x)", "open('new', 'w').write('x')"):
        found = run(Row("x", "x", "x", call, ValueError))
        assert found.kind is None
        assert found.changed, call
    bad_calls_world._made.clear()


# ---- completeness --------------------------------------------------------------------------------

# Parameters that no value of is bad, or whose values are another library's to refuse.
ANYWHERE = {
    "read as a truth value, as Python does": (
        "detach_reset store_v_seq store_charge_seq store_count learn_threshold learn_v_init "
        "learn_beta planes round ceil_mode progress fold split mode shared input_every_step merged "
        "fold_thresholds dynamic_batch strict train group unrolled potentials spiking_output private "
        "create_pr"
    ),
    "handed to huggingface_hub as it is": "token revision cache_dir commit_message",
    "drawn or printed as it is": "title settings classes metadata",
    "axes of matplotlib, used as they are": "ax",
}
_MODULE = "a layer, whose input torch checks as it does that of nn.ReLU"
_ADAPTER = "of the base class that an adapter overrides; patch calls it"
_MADE = "made by from_snntorch"
HERE: dict[str, str] = {
    **{f"{name}.forward x": _MODULE for name in (
        "QCFS", "ClipReLU", "RateNorm", "ThresholdReLU", "VGG", "BasicBlock", "ResNet", "SmallCNN",
    )},
    **{f"Adapter.{rest}": _ADAPTER for rest in (
        "recognises module", "replace module", "replace path", "groups model", "restore module",
        "restore ours",
    )},
    **{f"SnnTorchNetwork{rest}": _MADE for rest in (" net", " steps", ".forward x_seq")},
    "ConvertedModules.forward named": "handed to the network's own forward",
    "ConvertedModules.forward inputs": "handed to the network's own forward",
    "PackedSpikes.cuda device": "torch refuses what is no device, as for Tensor.cuda",
    "from_snntorch stateless": "classes to isinstance, which refuses others",
    "is_plain kind": "any number has an answer",
    "is_plain scale": "any number has an answer",
    "ImageSet name": "printed as it is",
    "rate_activation ceiling": "a line drawn where it is told",
    "compat.IFNode backend": "kept and without effect, as SpikingJelly's scripts pass it",
}  # fmt: skip


def parameters() -> Iterator[tuple[str, str]]:
    """``(name, parameter)`` of everything public."""
    first: dict[str, object] = {}
    for name, function, _ in test_public.public():
        if first.setdefault(name, function) is not function:
            name = f"compat.{name}"
        names = list(inspect.signature(function).parameters)
        if "." in name.removeprefix("compat.") or function.__name__ == "__init__":
            names = names[1:]
        yield from ((name, parameter) for parameter in names)
    methods = import_module("snnkernels.conversion.methods")
    for name in methods.__all__:
        cls = getattr(methods, name)
        if is_dataclass(cls):
            yield from ((f"methods.{name}", f.name) for f in fields(cls))
    for cls in (options.Signed, options.Probe):
        yield from ((f"{cls.__name__}.check", field) for field in cls._fields)


def test_every_public_parameter_is_in_the_table() -> None:
    known = dict.fromkeys(parameters())
    assert len(known) > 450
    there = {(row.name, row.parameter) for row in ROWS}
    excused = {p for words in ANYWHERE.values() for p in words.split()}
    left = [
        f"{name} {parameter}"
        for name, parameter in known
        if (name, parameter) not in there
        and parameter not in excused
        and f"{name} {parameter}" not in HERE
    ]
    assert left == []
    assert {tuple(e.split()) for e in HERE} <= set(known), "an exception for what is not there"
    assert not {tuple(e.split()) for e in HERE} & there, "an exception for what is in the table"


def test_every_command_is_in_the_table() -> None:
    found = {row.name for row in ROWS if row.name.startswith("cli ")}
    assert found == {f"cli {c}" for c in COMMANDS}


def test_the_page_is_up_to_date() -> None:
    if any(missing(row) for row in ROWS):
        pytest.skip("a row of the page needs a package that is not installed")
    assert bad_calls.PAGE.read_text(encoding="utf-8") == bad_calls.page(), (
        "docs/errors.md is old: python tests/bad_calls.py"
    )
