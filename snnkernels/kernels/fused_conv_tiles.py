"""Which tile of :mod:`snnkernels.kernels.fused_conv` a shape gets: a table, nothing measured at run
time. Registers and instructions of every row are tested ahead of time; times are not."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Tile", "tile_for"]

PROCESSORS = 132  # of an H100 or H200, where the device is not asked


class Tile(NamedTuple):
    """What one thread block computes, powers of 2.

    Attributes:
        steps: time steps at once: 1, 2, 4 or 8; more steps are run in chunks.
        positions: of the output map; ``steps * positions`` are the rows of the product.
        channels: of the output.
        inner: input channels at a time.
        warps: 4 or 8.
        stages: of loads in flight.
        registers: most of a thread; 0: the compiler's choice.
        group: blocks of rows that run side by side, for the L2 cache.
    """

    steps: int
    positions: int
    channels: int
    inner: int
    warps: int
    stages: int
    registers: int = 0
    group: int = 8


# rows, channels, warps, and registers that leave room for two blocks a processor.
_TABLE = ((128, 128, 8, 128), (128, 64, 4, 0), (64, 64, 4, 0), (64, 32, 4, 0))


def steps_for(T: int) -> int:
    """Steps at once: as few of none as there can be, and more rather than fewer."""
    if T <= 2:
        return max(T, 1)
    return 4 if -(-T // 4) % 2 else 8


def inner_for(C: int, most: int, least: int) -> int:
    """Input channels at a time: as few of none as there can be, and more rather than fewer."""
    sizes = [most]
    while sizes[-1] > least:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda size: (-(-C // size) * size, -size))


def tile_for(
    M: int,
    N: int,
    C: int,
    T: int,
    dtype: torch.dtype,
    pool: int = 1,
    processors: int = PROCESSORS,
    major: int = 9,
) -> Tile:
    """The tile for M positions of N channels, C input channels and T steps.

    The first row of the table that fits N and gives every processor a block; else the last that
    fits. The bound on registers is for compute capability 9: where operands of the product are in
    registers as well, it would spill within the inner loop.
    """
    steps = steps_for(T)
    wide = dtype.itemsize == 1
    inner = inner_for(C, 128 if wide else 64, 32 if wide else 16)
    fitting = [row for row in _TABLE if row[1] < 2 * N] or [_TABLE[-1]]
    full = (row for row in fitting if -(-M * steps // row[0]) * -(-N // row[1]) >= processors)
    rows, channels, warps, registers = next(full, fitting[-1])
    if pool == 2:  # four values are read for each that is multiplied: one block a processor
        return Tile(steps, rows // steps, channels, inner, warps, 2)
    stages = 4 if channels < 128 else 3
    return Tile(
        steps, rows // steps, channels, inner, warps, stages, registers if major == 9 else 0
    )
