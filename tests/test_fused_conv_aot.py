"""The fused convolution compiled for GPUs that are not there: instructions, registers, spills."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fused_conv_cases as cases
import pytest
import sass
import torch
from fused_conv_cases import Case
from support import PURE

from snnkernels.kernels import fused_conv
from snnkernels.kernels.fused_conv_layer import checked
from snnkernels.kernels.fused_conv_tiles import tile_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: the same with the extension"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="Triton is not installed (pip install triton)",
    ),
]

INT8, BF16, FP16, E4M3 = torch.int8, torch.bfloat16, torch.float16, torch.float8_e4m3fn


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton compiles; in others it may interpret."""
    folder = str(tmp_path_factory.mktemp("triton"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, sass.quiet_cache, (folder,)) as pool:
        yield pool


def compile_case(case: Case, arch: int, positions: int, folder: str) -> sass.Code:
    """What `fused_conv` would launch for a case with so many positions."""
    from snnkernels.kernels.fused_conv_triton import fused_conv_kernel

    spikes, layer, given = cases.made(case)
    residual, scale, v = (given.get(name) for name in ("residual", "residual_scale", "v"))
    call = checked(spikes, layer, residual, scale, v, case.output)
    everything = case.N == 1
    out = fused_conv._outputs(call, layer, case.output, everything, everything)
    tile = tile_for(positions, case.N, case.C, case.T, case.dtype, case.pool, major=arch // 10)
    launch = fused_conv._launch(call, layer, out, case.output, tile)
    return sass.compiled(fused_conv_kernel, launch, arch, Path(folder))


def wide(dtype: torch.dtype, **more: Any) -> Case:
    """A layer of 128 channels."""
    given = {"T": 8, "B": 1, "size": (4, 4), "C": 128, "N": 128, "output": torch.uint8, **more}
    return Case(dtype, **given)


def products(code: sass.Code) -> set[str]:
    return {word for word in code.all if word.endswith("MMA")}


KINDS = {
    (80, INT8): "IMMA", (80, BF16): "HMMA", (80, FP16): "HMMA",
    (90, INT8): "IGMMA", (90, BF16): "HGMMA", (90, FP16): "HGMMA", (90, E4M3): "QGMMA",
    # Triton 3.6 has no way from int8 to the tensor memory of 100; 3.9 has.
    (100, INT8): "UTCIMMA", (100, BF16): "UTCHMMA", (100, E4M3): "UTCQMMA",
    (120, INT8): "IMMA", (120, BF16): "HMMA", (120, E4M3): "QMMA",
}  # fmt: skip


@pytest.mark.parametrize(("arch", "dtype"), KINDS)
def test_kind_of_product_and_no_spills(
    compiler: ProcessPoolExecutor, tmp_path: Path, arch: int, dtype: torch.dtype
) -> None:
    output = E4M3 if dtype == E4M3 else torch.uint8
    code = compiler.submit(
        compile_case, wide(dtype, output=output), arch, 2**16, str(tmp_path)
    ).result()
    kind = KINDS[arch, dtype]
    (found,) = products(code)
    assert found == kind or (kind, found) == ("UTCIMMA", "IMMA")
    assert code.loop, "no inner loop was found"
    assert code.stack == 0
    assert code.all["LDL"] == code.all["STL"] == 0
    # Two blocks of 256 threads fit on a processor; not where the operands are in registers too.
    assert code.registers <= (255 if found in ("IMMA", "HMMA", "QMMA") else 128)
    assert code.shared <= 100 * 1024
    if arch == 90:
        # Currents cross the threads once, spikes not at all: stores of every step on their own
        # have three times as many.
        assert code.all["BAR"] <= 10


# Beyond the plain layer, on 90: what is added, and the largest stack outside of the inner loop.
VARIANTS: dict[str, tuple[Case, int, int]] = {
    "int8, packed": (wide(INT8, output="packed"), 2**16, 0),
    "int8, residual spikes": (wide(INT8, residual=torch.uint8), 2**16, 64),
    "int8, residual current, scaled": (
        wide(INT8, residual=torch.int32, scaled=True),
        2**16,
        160,
    ),
    "bf16 of uint8 spikes": (wide(BF16, spikes=torch.uint8), 2**16, 0),
    "bf16, residual spikes, scaled": (wide(BF16, residual=torch.uint8, scaled=True), 2**16, 160),
    "int8, pool": (wide(INT8, pool=2, size=(8, 8)), 2**16, 96),
    "bf16, pool": (wide(BF16, pool=2, size=(8, 8), output=BF16), 2**16, 512),
    "e4m3, pool": (wide(E4M3, pool=2, size=(8, 8), output=E4M3), 2**16, 512),
    "e4m3, T=32": (wide(E4M3, T=32, output=E4M3), 2**16, 512),
    "int8, T=32": (wide(INT8, T=32), 2**16, 512),
    "int8, T=12": (wide(INT8, T=12), 2**16, 512),
    "int8, T=13, packed": (wide(INT8, T=13, output="packed"), 2**16, 768),
    "bf16, T=32": (wide(BF16, T=32, output=BF16), 2**16, 512),
    "int8, T=4": (wide(INT8, T=4), 2**16, 64),
    "int8, T=1": (wide(INT8, T=1), 2**16, 384),
    "int8, 64 channels": (wide(INT8, C=64, N=64), 2**16, 0),
    "bf16, few positions": (wide(BF16, C=512, N=512), 16, 0),
    "int8, 10 channels": (wide(INT8, kernel=None, C=512, N=10), 64, 0),
    "int8, 48 input channels": (wide(INT8, C=48), 2**16, 64),
    "int8, 1x1": (wide(INT8, kernel=(1, 1), padding=(0, 0)), 2**16, 0),
}


def test_sizes_of_one_compile_too(compiler: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Triton takes a 1 for a constant."""
    case = Case(INT8, T=1, B=1, size=(1, 1), C=1, N=1, residual=torch.uint8, full_v=True)
    for changed in ({}, {"output": "packed"}, {"kernel": None, "T": 9}):
        compiler.submit(compile_case, replace(case, **changed), 90, 1, str(tmp_path)).result()


@pytest.mark.parametrize("name", VARIANTS)
def test_no_spills_in_the_inner_loop(
    compiler: ProcessPoolExecutor, tmp_path: Path, name: str
) -> None:
    case, positions, stack = VARIANTS[name]
    code = compiler.submit(compile_case, case, 90, positions, str(tmp_path)).result()
    kind = KINDS[90, case.dtype]
    assert products(code) == {kind}
    assert code.loop[kind] >= 1
    assert code.loop["LDL"] == code.loop["STL"] == 0
    assert code.stack <= stack, f"{code.stack} bytes"
    assert code.shared <= 227 * 1024
    # Loads of tiles go to shared memory behind the back of the threads.
    assert code.loop["LDGSTS"] >= 1
    assert code.loop["LDG"] == 0
