"""The table of bad calls: what runs a row, and the page of the documentation made of it.

A row (:mod:`bad_calls_rows`) is a call that must fail with an error of ours that names what is bad
and what was given, and must change nothing. ``python tests/bad_calls.py`` writes
``docs/errors.md``; ``--check`` says whether it is up to date.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import bad_calls_disk as disk
import bad_calls_files
import bad_calls_networks
import bad_calls_ops
import torch
from bad_calls_rows import Row
from bad_calls_world import world
from torch import Tensor, nn

from snnkernels import get_backend

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
SECTIONS: dict[str, tuple[Row, ...]] = {
    "Neurons and kernels": bad_calls_ops.RAISES,
    "Conversion, converted networks, measuring": bad_calls_networks.RAISES,
    "Files, other libraries, the command line": bad_calls_files.RAISES,
}
ROWS = tuple(row for rows in SECTIONS.values() for row in rows)


@dataclass(frozen=True)
class Outcome:
    """What a call raised (None: nothing), and what it changed."""

    kind: type[BaseException] | None
    message: str
    changed: tuple[str, ...]


def missing(row: Row) -> str:
    """A package that the row needs and that is not there."""
    return next((m for m in row.needs.split() if importlib.util.find_spec(m) is None), "")


@lru_cache(maxsize=None)
def run(row: Row) -> Outcome:
    """The row's call, in a new folder."""
    names = world(f"{row.given}\n{row.call}")
    with _new_folder():
        if row.given:
            exec(row.given, names)
        before, kind, message = _state(names), None, ""
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                exec(row.call, names)
            except (Exception, KeyboardInterrupt) as raised:
                kind, message = type(raised), " ".join(str(raised).split())
        after = _state(names)
    changed = (k for k in {**before, **after} if not _same(before.get(k), after.get(k)))
    return Outcome(kind, message, tuple(changed))


@contextlib.contextmanager
def _new_folder() -> Iterator[None]:
    before = Path.cwd()
    # Not directly in the folder for temporary files: "../nowhere" is then nobody else's.
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "here"
        inside.mkdir()
        os.chdir(inside)
        try:
            yield
        finally:
            os.chdir(before)


def _state(names: dict[str, Any]) -> dict[str, Any]:
    """What a refused call may not change: arguments, modules with their membranes, files."""
    found: dict[str, Any] = {f"file {k}": v for k, v in disk.files("..").items()}
    found |= {"back end": get_backend(), "dtype": torch.get_default_dtype()}
    found |= {"gradients": torch.is_grad_enabled(), "threads": torch.get_num_threads()}
    for name, value in names.items():
        if isinstance(value, Tensor):
            found[name] = value.detach().clone()
        elif isinstance(value, nn.Module):
            for path, module in value.named_modules():
                at = f"{name}.{path}"
                state = {**module._parameters, **module._buffers, "v": getattr(module, "_v", None)}
                for key, tensor in state.items():
                    kept = isinstance(tensor, Tensor) and not tensor.is_meta
                    found[f"{at}.{key}"] = tensor.detach().clone() if kept else str(tensor)
                hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
                found[f"{at} itself"] = (type(module), module.training, vars(module).get("T"), hooks)
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return type(a) is type(b) and bool(a == b)


# ---- the page ------------------------------------------------------------------------------------

_HEAD = """# What bad calls say

Every public function, class and command is called with what it cannot take, and what it says is
below: the argument, the value, and what is allowed or what helps. No such call changes an argument,
a module, a membrane, a setting or a file, and none leaves a part of a file or folder behind: saves
are written beside the old one, flushed to the disk and renamed. Nothing in a file is run or
unpickled when it is read.

The page is written by `python tests/bad_calls.py`, which makes these {count} calls;
`tests/test_bad_calls.py` makes them as well, and checks that every public parameter is among them,
or in a list with the reason why not. Of a message that repeats another library's words only ours
are shown.
"""
_HOLE = "\0"


def page() -> str:
    """The text of ``docs/errors.md``; every row is run."""
    lines = [_HEAD.format(count=len(ROWS))]
    for title, rows in SECTIONS.items():
        lines += [f"## {title}\n", "| call | error |", "| --- | --- |"]
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(_shown(row), []).append(row)
        for (call, given, error, said), same in groups.items():
            others = ", ".join(_code(r.name) for r in same[1:])
            first = _code(call.replace(_HOLE, same[0].name.rpartition(".")[2]))
            before = f" after {_code(given)}" if given else ""
            also = f"; the same of {others}" if others else ""
            lines.append(f"| {first}{before}{also} | {_code(error)}: {_code(said)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(row: Row) -> tuple[str, str, str, str]:
    name = row.name.rpartition(".")[2]
    if row.foreign:
        kind = " or ".join(k.__name__ for k in row.kinds)
        said = f"... {row.names or row.parameter} ... {row.value} ..."
    else:
        found = run(row)
        kind, said = getattr(found.kind, "__name__", "nothing"), found.message
    return row.call.replace(f"{name}(", f"{_HOLE}("), row.given, kind, said


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", "\\|")


def main(words: list[str]) -> int:
    """Write the page, or say whether it is up to date."""
    text = page()
    if "--check" in words:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.name} is {'up to date' if fresh else 'old: python tests/bad_calls.py'}")
        return 0 if fresh else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"{len(ROWS)} bad calls in {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
