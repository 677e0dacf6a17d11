"""Folders that are whole at every moment, and JSON that is checked field by field.

A save writes all files into ``.partial``, renames that to ``.complete`` (from here on the new save
is there: readers look there first), and moves file by file to its place. Killed before the rename
the folder is what it was; killed after it, the new save is read from both places together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files import unwritten, usual_mode
from .values import FormatError

__all__ = ["CONFIG", "GRAPH", "README", "WEIGHTS", "Checked", "digest", "find", "load_json", "put"]

CONFIG, GRAPH, WEIGHTS, README = "config.json", "graph.json", "model.safetensors", "README.md"
_PARTIAL, _COMPLETE = ".snnkernels-partial", ".snnkernels-complete"
_MOST_JSON = 2**28


def find(folder: Path, name: str) -> Path:
    """Where a file of a saved network is."""
    pending = folder / _COMPLETE / name
    return pending if pending.is_file() else folder / name


def put(folder: Path, write: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files into a folder, all or none; ``write`` is given where each goes.

    Raises:
        OSError: the folder cannot be written; what was there is still there.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _finish(folder)
    partial, complete = folder / _PARTIAL, folder / _COMPLETE
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with unwritten(folder):
            partial.mkdir()
            for name, into in write.items():
                into(partial / name)
                usual_mode(partial / name)
                _sync(partial / name)
            _sync(partial)
            os.replace(partial, complete)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # somebody else has put something into it
                folder.rmdir()
        raise
    _sync(folder)
    _finish(folder)


def _finish(folder: Path) -> None:
    """Move the files of a save that is complete to their places."""
    complete = folder / _COMPLETE
    if not complete.is_dir():
        return
    for path in sorted(complete.iterdir()):
        os.replace(path, folder / path.name)
    _sync(folder)
    complete.rmdir()


def _sync(path: Path) -> None:
    """Have the disk hold what was written."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        found = (
            hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _slow(file)
        )
    return {"bytes": path.stat().st_size, "sha256": found.hexdigest()}


def _slow(file: Any) -> Any:
    found = hashlib.sha256()  # Python 3.10
    while block := file.read(2**20):
        found.update(block)
    return found


def load_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        FormatError: it is none.
    """
    try:
        if path.stat().st_size > _MOST_JSON:
            raise FormatError(f"{path}: {path.stat().st_size} bytes; at most {_MOST_JSON} are read")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, _Constant) as error:
        raise FormatError(f"{path}: no JSON: {error}") from error


class _Constant(ValueError):
    pass


def _no_constant(name: str) -> Any:
    raise _Constant(f"{name} is not allowed")


class Checked:
    """An object of a JSON file whose fields are checked when they are read."""

    def __init__(self, given: Any, where: str) -> None:
        if not isinstance(given, dict):
            raise FormatError(f"{where}: got {str(given)[:80]!r}; allowed: an object")
        self.given, self.where = given, where

    def fail(self, field: str, allowed: str) -> FormatError:
        """The error for a field."""
        value = self.given.get(field, "nothing")
        return FormatError(f"{self.where}: {field}: got {str(value)[:80]!r}; allowed: {allowed}")

    def text(self, field: str) -> str:
        """A string."""
        value = self.given.get(field)
        if not isinstance(value, str):
            raise self.fail(field, "a string")
        return value

    def integer(self, field: str, least: int, most: int = 2**31 - 1) -> int:
        """A whole number in a range."""
        value = self.given.get(field)
        if type(value) is not int or not least <= value <= most:
            raise self.fail(field, f"a whole number from {least} to {most}")
        return value

    def flag(self, field: str) -> bool:
        """True or false."""
        value = self.given.get(field)
        if not isinstance(value, bool):
            raise self.fail(field, "true or false")
        return value

    def items(self, field: str) -> list[Any]:
        """A list."""
        value = self.given.get(field)
        if not isinstance(value, list):
            raise self.fail(field, "a list")
        return value

    def texts(self, field: str) -> list[str]:
        """A list of strings."""
        value = self.items(field)
        if not all(isinstance(v, str) for v in value):
            raise self.fail(field, "a list of strings")
        return value

    def inner(self, field: str) -> Checked:
        """An object."""
        return Checked(self.given.get(field), f"{self.where}: {field}")
