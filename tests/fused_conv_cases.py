"""Cases of the fused convolution, and their checks where Triton interprets instead of compiling.

Triton decides that when it is imported, so `start` and `check` run in a process of their own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snnkernels.kernels.fused_conv import (
    FusedConv,
    FusedOutput,
    fused_conv,
    fused_conv_reference,
)
from snnkernels.kernels.fused_conv_tiles import Tile


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    T: int
    B: int = 2
    size: tuple[int, int] = (6, 5)
    C: int = 20
    N: int = 24
    kernel: tuple[int, int] | None = (3, 3)  # None: a linear layer
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pool: int = 1
    bias: bool = True
    residual: torch.dtype | None = None
    constant: bool = False  # the residual
    scaled: bool = False
    full_v: bool = False
    strict: bool = False
    spikes: torch.dtype | None = None  # those of the weights otherwise
    output: torch.dtype | str | None = torch.uint8
    tile: tuple[int, int, int, int] | None = (8, 16, 16, 32)  # None: the table's
    seed: int = 0


def sampled(dtype: torch.dtype, T: int, seed: int) -> Case:
    """A case of few positions with everything else drawn."""
    rng = random.Random(seed)
    C = rng.choice([3, 16, 20, 32, 40])
    whole = dtype == torch.int8
    kernel = rng.choice([None, (1, 1), (3, 3), (3, 3), (1, 3), (2, 2)])
    pool = rng.choice([1, 1, 2]) if kernel else 1
    kinds = [torch.uint8, torch.int8, torch.int32 if whole else torch.float32]
    residual = rng.choice([None, *kinds, *([] if whole else [torch.float16])])
    steps = rng.choice([s for s in (1, 2, 4, 8) if s < 2 * T and 5 * s >= T])
    return Case(
        dtype, T, B=rng.choice([1, 2]),
        size=(rng.randint(5, 6) * pool, rng.randint(5, 6) * pool + rng.randint(0, 1)),
        C=C, N=rng.choice([5, 16, 40]), kernel=kernel,
        stride=rng.choice([(1, 1), (2, 2), (1, 2)]) if kernel else (1, 1),
        padding=rng.choice([(0, 0), (1, 1), (2, 0)]) if kernel else (0, 0),
        dilation=rng.choice([(1, 1), (1, 1), (2, 1)]) if kernel in ((3, 3), (1, 3)) else (1, 1),
        pool=pool, bias=rng.random() < 0.7, residual=residual, constant=rng.random() < 0.3,
        scaled=residual is not None and rng.random() < 0.5, full_v=rng.random() < 0.3,
        strict=rng.random() < 0.3, spikes=rng.choice([None, torch.uint8, torch.bool]),
        output=rng.choice([torch.uint8, torch.float16, torch.int8, "packed", "packed", None]),
        tile=(steps, rng.choice([16, 32]), rng.choice([16, 32]), 32 if C > 16 else 16), seed=seed,
    )  # fmt: skip


def made(case: Case) -> tuple[Tensor, FusedConv, dict[str, Any]]:
    """Spikes, layer and the other arguments of a call."""
    g = torch.Generator().manual_seed(case.seed)
    whole, N, C = case.dtype == torch.int8, case.N, case.C

    def near(scale: float, *shape: int) -> Tensor:
        """Around 0; whole numbers of 16ths of the scale where those are wanted."""
        x = torch.randn(shape, generator=g)
        return (x * 16).round().int() if whole else x * scale

    def ones(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g) < 0.3

    weight = near(0.25, N, C, *(case.kernel or ()))
    theta = torch.rand(N, generator=g) + 0.5
    theta = (theta * 64).int() if whole else theta
    layer = FusedConv.of(
        weight.clamp(-127, 127).to(case.dtype), theta, v_init=theta // 2 if whole else theta / 2,
        bias=near(0.25, N) if case.bias else None, strict=case.strict,
        **({} if case.kernel is None else {
            "stride": case.stride, "padding": case.padding, "dilation": case.dilation,
            "pool": case.pool,
        }),
    )  # fmt: skip
    T, B = case.T, case.B
    if case.kernel is None:
        spikes, flat = ones(T, B, C), (B, N)
    else:
        spikes, flat = ones(T, B, *case.size, C), (B, *layer.size(*case.size), N)
    given: dict[str, Any] = {}
    if case.residual is not None:
        shape = flat if case.constant else (T, *flat)
        spiking = case.residual in (torch.uint8, torch.int8)
        given["residual"] = (ones(*shape) if spiking else near(0.25, *shape)).to(case.residual)
    if case.scaled:
        given["residual_scale"] = near(0.5, N)
    if case.full_v:
        given["v"] = near(0.5, *flat)
    return spikes.to(case.spikes or case.dtype), layer, given


# ---- in a process of its own


def start() -> None:
    """Have Triton interpret, and memory be poisoned as in the other tests."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    from triton.runtime import interpreter

    # Bounds of loops are arrays of one element there, which NumPy 2.4 no longer takes for numbers.
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def guarded(tensor: Tensor) -> Tensor:
    """The same at the end of a page before one that may not be read: what reads on dies."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    page = mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0) == 0
    placed = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return placed.view(tensor.shape).copy_(tensor)


def check(case: Case, place: Callable[[Tensor], Tensor] = guarded, u: float = 2.0**-24) -> int:
    """Run a case and compare it; how many spikes differ from the reference's.

    Args:
        place: takes tensors to where they are read.
        u: the most that an addition of the product is off by, relatively.
    """
    spikes, layer, given = made(case)
    tile = None if case.tile is None else Tile(*case.tile, warps=4, stages=1)
    told = {**given, "output": case.output, "count": True, "v_out": True}
    held = ("weight", "threshold", "v_init", "bias")
    there = {name: getattr(layer, name) for name in held if getattr(layer, name) is not None}
    placed = replace(layer, **{name: place(value) for name, value in there.items()})

    def run(**told: Any) -> FusedOutput:
        told = {n: place(t) if isinstance(t, Tensor) else t for n, t in told.items()}
        found = fused_conv(place(spikes), placed, tile=tile, **told)
        return FusedOutput(*(None if t is None else t.cpu() for t in found))

    got = run(**told)
    want = fused_conv_reference(spikes, layer, **told)
    if case.dtype == torch.int8:
        for name, a, b in zip(got._fields, got, want, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                assert a.dtype == b.dtype, f"{name}: {a.dtype}, not {b.dtype}"
                assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} differ"
        return 0
    dense = run(**given).spikes
    assert dense is not None
    assert torch.equal(got.count, dense.sum(0, dtype=torch.int32))
    _decisions_are_right(case, spikes, layer, given, dense, got.v, u)
    if case.output == "packed":
        from snnkernels.kernels import reference

        assert torch.equal(got.spikes, reference.pack(dense.bool()))
    elif case.output is not None:
        assert torch.equal(got.spikes, dense.to(case.output))
    return int((dense != fused_conv_reference(spikes, layer, **given).spikes).sum())


def _decisions_are_right(
    case: Case,
    spikes: Tensor,
    layer: FusedConv,
    given: dict[str, Any],
    fired: Tensor,
    last: Tensor,
    u: float,
) -> None:
    """Every spike, and every one that is not there, is that of a membrane within its rounding.

    Followed along the spikes that the kernel itself emitted, in float64 (exact beside float32). A
    sum of n float32 terms in any order is off by at most n u of the sum of their sizes (u = 2**-24
    where additions are rounded); the charge by u of itself, the reset by u of its result. What was
    off at one step is off at the next.
    """
    x = spikes.double()
    x = x[:, :, None, None] if case.kernel is None else x
    T = len(x)
    x = x.flatten(0, 1).permute(0, 3, 1, 2)
    x = F.avg_pool2d(x, 2) * 4 if layer.pool == 2 else x
    weight = layer.weight.double().permute(0, 3, 1, 2)
    geometry = (None, layer.stride, layer.padding, layer.dilation)
    total, size = F.conv2d(x, weight, *geometry), F.conv2d(x, weight.abs(), *geometry)
    total, size = (t.permute(0, 2, 3, 1).reshape(fired.shape) for t in (total, size))
    if layer.bias is not None:
        total, size = total + layer.bias, size + layer.bias.abs()
    if "residual" in given:
        added = given["residual"].double() * given.get("residual_scale", torch.ones(())).double()
        total, size = total + added, size + added.abs()
    n = weight[0].numel() + 3  # and bias, residual, its product
    theta = layer.threshold.double()
    v = given.get("v", layer.v_init).double().expand(fired.shape[1:])
    off = torch.zeros_like(v)
    for t in range(T):
        m = v + total[t]
        off = off + n * u * size[t]
        off = off + u * (m.abs() + off)
        s = fired[t].bool()
        wrong = torch.where(s, m < theta - off, m > theta + off)
        assert not bool(wrong.any()), f"step {t}: {int(wrong.sum())} decisions outside the band"
        v = torch.where(s, m - theta, m)
        off = off + u * (v.abs() + off)
    assert bool(((last - v).abs() <= off).all())
