"""The copy that bounds every kernel here, measured among them: how fast bytes can move at all."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).parent / "copy_limit.cpp"
_PARALLEL_FROM = 1 << 20
COPIES = ("copy, non-temporal stores", "copy, plain stores", "torch copy_")


@cache
def _library() -> ctypes.CDLL | None:
    """copy_limit.cpp, compiled for this very processor; None, with a note, where it cannot be."""
    folder = Path(tempfile.mkdtemp(prefix="snnkernels_copy_"))
    made = folder / "copy_limit.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
    try:
        subprocess.run(
            [*compiler, *flags, str(_SOURCE), "-o", str(made)], check=True, capture_output=True
        )
        # After torch, whose OpenMP it then shares.
        library = ctypes.CDLL(str(made))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"copy limit: torch's copy_ alone, {type(error).__name__} from {compiler[0]}")
        return None
    library.copy_limit.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64] + [
        ctypes.c_int
    ] * 2
    library.copy_limit.restype = None
    return library


def copies(nbytes: int, device: str) -> dict[str, Callable[[torch.Tensor], None]]:
    """Copies of ``nbytes`` read and as many written, between buffers of their own, kept."""
    if device == "cuda":
        # Small ones would fit the L2 cache, which is not the limit meant.
        nbytes = max(nbytes, 1 << 30)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    found: dict[str, Callable[[torch.Tensor], None]] = {}
    library = _library() if device == "cpu" else None
    if library is not None:
        # A team of threads costs more than a small copy.
        threads = torch.get_num_threads() if nbytes >= _PARALLEL_FROM else 1

        def run(streaming: int) -> Callable[[torch.Tensor], None]:
            def copy(_: torch.Tensor) -> None:
                library.copy_limit(target.data_ptr(), source.data_ptr(), nbytes, streaming, threads)

            return copy

        found[COPIES[0]], found[COPIES[1]] = run(1), run(0)
    found[COPIES[2]] = lambda _: target.copy_(source)
    return found


@cache
def gpu_copy() -> float:
    """Bytes per second, read and written, of the best of two large copies on the GPU."""
    from timing import measure

    best = 0.0
    for size in (1 << 30, 4 << 30):
        source = torch.ones(size, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        time = measure({"copy": lambda _, t=target, s=source: t.copy_(s)}, [source], rounds=9)
        best = max(best, 2 * size / time["copy"].median)
    return best
