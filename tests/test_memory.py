"""tune_malloc: what it changes, seen from outside."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from support import PACKAGE

import snnkernels

CODE = """
import resource, torch, snnkernels
if {tuned}:
    assert snnkernels.tune_malloc() is True

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(16 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(6):  # glibc settles after a few
    faults()
print(faults())
"""


def test_freed_memory_is_reused() -> None:
    """Five outputs of 64 MB: 80,000 page faults without, next to none with it."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the allocator is not glibc's")
    found = {}
    for tuned in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", CODE.format(tuned=tuned)],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": str(PACKAGE.parent), "PATH": ""},
        )
        found[tuned] = int(done.stdout)
    # Huge pages make fewer faults of the same memory, never none.
    assert found[True] < found[False] / 10


def test_another_allocator_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: object) -> object:
        raise OSError("no such library")

    monkeypatch.setattr("ctypes.CDLL", nothing)
    assert snnkernels.tune_malloc() is False
