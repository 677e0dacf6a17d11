"""Other libraries' own tests on our neurons.

In a checkout of a library, with it and snnkernels installed::

    pytest -p snnkernels.interop.pytest_plugin --snnkernels=spikingjelly test/

For the whole run the library's functions are ours, as inside :func:`snnkernels.patched`, and where
its neurons are made by class, the classes are our fused ones. The end of the run says how many
calls our kernels answered, so that nobody takes a run of the library alone for one of ours.
"""

from __future__ import annotations

from contextlib import ExitStack
from importlib import metadata
from typing import Any

import pytest

from ..kernels import call
from .adapters import adapter_of

__all__ = ["pytest_addoption", "pytest_configure", "pytest_terminal_summary", "pytest_unconfigure"]


class _Run:
    """What the plug-in holds while it runs."""

    def __init__(self, libraries: list[str]) -> None:
        self.libraries = libraries
        self.calls = 0
        self.stack = ExitStack()

    def begin(self) -> None:
        inner = call.run

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return inner(*args, **kwargs)

        call.run = counted
        self.stack.callback(setattr, call, "run", inner)
        for library in self.libraries:
            self.stack.enter_context(adapter_of(library).in_tests())


_KEY: pytest.StashKey[_Run] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--snnkernels``, once for each library."""
    parser.addoption(
        "--snnkernels",
        action="append",
        default=[],
        metavar="LIBRARY",
        help="run this library's neurons on snnkernels (may be given several times)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Swaps before any test module is imported."""
    libraries = config.getoption("--snnkernels")
    if not libraries:
        raise pytest.UsageError("name the library whose neurons are ours: --snnkernels=LIBRARY")
    run = config.stash[_KEY] = _Run(libraries)
    try:
        run.begin()
    except (ImportError, ValueError) as error:
        run.stack.close()
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> str:
    """Which library, of which release, runs on which of ours."""
    names = ", ".join(f"{name} {_version(name)}" for name in config.stash[_KEY].libraries)
    return f"snnkernels {_version('snnkernels')}: the neurons of {names}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How much ran on our kernels."""
    terminalreporter.write_line(f"snnkernels: {config.stash[_KEY].calls} calls on its kernels")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Everything is the library's own again."""
    run = config.stash.get(_KEY, None)
    if run is not None:
        run.stack.close()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(from a folder)"
