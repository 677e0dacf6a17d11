"""How many neurons a GPU thread gets: 1, or as many as one 16-byte transaction holds.

Wide threads ask for whole, aligned groups of neurons everywhere, and pay only where there are
enough of them to fill the device: below that time is latency, and more threads hide more of it.
"""

from __future__ import annotations

from torch import Tensor

from .layouts import Layout, Rows

THREADS = 256
# Bytes of a transaction, and what the addresses of a wide thread are multiples of.
ALIGNED = 16
# Blocks that fill the largest device twice: 2 for each of 132 multiprocessors.
FULL = 264


def _fits(vec: int, layout: Layout, N: int, rows: tuple[Rows, ...], *arrays: Tensor | None) -> bool:
    split = layout.inner != N
    return not (
        N % vec
        or layout.inner % vec
        or any(r.step % vec or (split and r.outer % vec) for r in rows)
        or any(t is not None and t.data_ptr() % ALIGNED for t in arrays)
    )


def _fills(vec: int, N: int) -> bool:
    return FULL * THREADS * vec <= N


def dense(element_bytes: int, N: int) -> int:
    """Neurons per thread where all arrays are contiguous and aligned."""
    vec = ALIGNED // element_bytes
    return vec if _fills(vec, N) and N % vec == 0 else 1


def forward(x: Tensor, layout: Layout, N: int, *outputs: Tensor | None) -> int:
    """Neurons per thread of a plain forward call that writes ``outputs``."""
    vec = ALIGNED // x.element_size()
    rows = (layout.x, layout.out)
    return vec if _fills(vec, N) and _fits(vec, layout, N, rows, x, *outputs) else 1


def backward(
    state_bytes: int, layout: Layout, N: int, rows: tuple[Rows, ...], *arrays: Tensor | None
) -> int:
    """Neurons per thread of a plain backward call over ``arrays`` with these ``rows``."""
    # 16 bytes of state: the chunk's membranes for each of 8 halves would not fit the registers.
    vec = ALIGNED // state_bytes
    return vec if _fills(vec, N) and _fits(vec, layout, N, rows, *arrays) else 1
