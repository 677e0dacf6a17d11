"""Python entries: objects of the user's code by name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["object_of", "said"]


@contextmanager
def _path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def object_of(entry: str) -> Any:
    """The object that ``package.module:name`` or ``path/to/file.py:name`` names.

    This runs the module's code: an entry is code of the user's.

    Raises:
        ValueError: ``entry`` is no such text, or the module fails or lacks the name.
    """
    module, colon, name = entry.rpartition(":")
    if not colon or not module or not name:
        raise ValueError(
            f"{entry!r} is no entry: expected package.module:name or path/to/file.py:name"
        )
    try:
        if module.endswith(".py"):
            found = _from_file(Path(module))
        else:
            with _path(os.getcwd()):  # as python -m has it
                found = importlib.import_module(module)
    except FileNotFoundError:
        raise
    except Exception as e:
        raise ValueError(f"{entry!r}: {module} cannot be imported: {said(e)}") from e
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{entry!r}: {module} has no {name!r}")
        found = getattr(found, part)
    return found


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"_snnkernels_entry_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _path(str(path.resolve().parent)):
        spec.loader.exec_module(module)
    return module


def said(error: BaseException) -> str:
    """An error as part of another's message."""
    return f"{type(error).__name__}: {error}"
