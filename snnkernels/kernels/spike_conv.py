"""Convolution of packed spikes with the neurons behind it: Python's side of csrc/spike_conv.h.

Spikes of a map lie as words of 64 channels, ``[B, H, W, T, ceil(C / 64)]`` int64 (bit patterns):
bit ``c % 64`` of word ``c // 64`` is channel c; bits beyond C are 0. On CPUs a compiled kernel runs
on them; elsewhere, and where it is not there, the reference at the end of this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .maps.launching import pointer
from .maps_params import Record

__all__ = ["PANEL", "Branch", "Layer", "SpikeMap", "branches_of", "spike_conv"]

PANEL = 64  # kPanel: channels of a word
TIMES = 16  # kSpikeTimes
_ANY_TO_ANY, _EACH_TO_ITSELF = 0, 1

BRANCH = Record(
    "SpikeBranch", ("Q", "words weights scale"),
    ("q", "H W row_words first_word used_words first_panel panels"),
    ("i", "kh kw sh sw ph pw dh dw pool_h pool_w pool_sh pool_sw kind either planes pad"),
)  # fmt: skip
CONV = Record(
    "SpikeConv", ("Q", "bias current threshold v_init spikes counts currents"),
    ("q", "B T OH OW panels threshold_position v_init_position"), ("i", "pool strict times pad"),
    ("q", " ".join(f"count_at{i}" for i in range(TIMES))),
)  # fmt: skip


@dataclass(frozen=True)
class SpikeMap:
    """Spikes of a map of neurons.

    Attributes:
        words: int64 ``[B, H, W, T, ceil(channels / 64)]``, contiguous.
        channels: C.
    """

    words: Tensor
    channels: int

    @property
    def T(self) -> int:
        """Number of steps."""
        return self.words.shape[3]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Spikes as 0 and 1, ``[T, B, C, H, W]`` with channels innermost in memory."""
        shifts = torch.arange(PANEL, device=self.words.device)
        bits = (self.words.permute(3, 0, 1, 2, 4).unsqueeze(-1) >> shifts) & 1
        return bits.flatten(-2)[..., : self.channels].to(dtype).permute(0, 1, 4, 2, 3)

    @classmethod
    def of(cls, spikes: Tensor) -> SpikeMap:
        """Pack spikes ``[T, B, C, H, W]``: what is not 0 is a spike."""
        C = spikes.shape[2]
        bits = (spikes != 0).permute(1, 3, 4, 0, 2)
        bits = F.pad(bits, (0, -C % PANEL)).unflatten(-1, (-(-C // PANEL), PANEL)).to(torch.int64)
        shifts = torch.arange(PANEL, device=spikes.device)
        return cls((bits << shifts).sum(-1).contiguous(), C)


@dataclass(frozen=True)
class Branch:
    """One linear map of spikes, as a kernel reads it; made by :func:`branches_of`.

    Attributes:
        weights: ``[panels, taps, planes * used_words * 64, 64]`` float32 or int16; where each
            channel goes to itself ``[panels, taps, 64]`` float32.
        scale: ``[panels, 64]`` float32, what one unit of an int16 weighs; None for float32.
        first_word, used_words: the words of the input that it reads.
        first_panel: the first 64 output channels it adds to.
        kernel, stride, padding, dilation: of the convolution.
        pool, pool_stride: window whose spikes are added before; ``(1, 1)`` is none.
        either: a window has a spike where one of its positions has.
        each: each channel goes to itself.
        planes: a window's sum is read as so many binary digits, and the weights are there once for
            each digit, times 1, 2 and 4; 1: every spike adds the weights.
    """

    weights: Tensor
    scale: Tensor | None = None
    first_word: int = 0
    used_words: int = 1
    first_panel: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    pool: tuple[int, int] = (1, 1)
    pool_stride: tuple[int, int] = (1, 1)
    either: bool = False
    each: bool = False
    planes: int = 1

    def size(self, H: int, W: int) -> tuple[int, int]:
        """Rows and columns of its output for a map of H x W."""
        pooled = [
            (n - k) // s + 1 for n, k, s in zip((H, W), self.pool, self.pool_stride, strict=True)
        ]
        geometry = zip(pooled, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry)
        return rows, columns

    def pack(self, words: Tensor) -> bytes:
        """The struct of this branch on the words of a map."""
        _, H, W, _, row_words = words.shape
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        (dh, dw), (oh, ow), (oh_stride, ow_stride) = self.dilation, self.pool, self.pool_stride
        return BRANCH.pack(
            words=words.data_ptr(), weights=self.weights.data_ptr(), scale=pointer(self.scale),
            H=H, W=W, row_words=row_words, first_word=self.first_word, used_words=self.used_words,
            first_panel=self.first_panel, panels=len(self.weights), kh=kh, kw=kw, sh=sh, sw=sw,
            ph=ph, pw=pw, dh=dh, dw=dw, pool_h=oh, pool_w=ow, pool_sh=oh_stride,
            pool_sw=ow_stride, kind=_EACH_TO_ITSELF if self.each else _ANY_TO_ANY,
            either=int(self.either), planes=self.planes,
        )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """What follows the sum of the branches.

    Attributes:
        panels: output channels in groups of 64.
        bias: float32 ``[panels * 64]``, added at every step.
        threshold, v_init: float32 ``[panels * 64]``, or ``[rows, columns, panels * 64]``; None: no
            neurons. Channels that are only padding need a threshold of infinity.
        pool: side (and stride) of a cumulative max-pool between the sum and the neurons.
        strict: neurons fire above the threshold, not at it.
    """

    panels: int
    bias: Tensor | None = None
    threshold: Tensor | None = None
    v_init: Tensor | None = None
    pool: int = 1
    strict: bool = False


def branches_of(
    weight: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    pool: tuple[int, int] = (1, 1),
    pool_stride: tuple[int, int] | None = None,
    either: bool = False,
    int16: bool = False,
) -> list[Branch]:
    """The branches of a convolution: one, or one for each run of panels with the same inputs.

    Args:
        weight: float32 ``[C_out, C_in / groups, kh, kw]``.
        pool, pool_stride: window whose spikes are added before the convolution (not divided).
        int16: weights in 16 bits; see :func:`_in_16_bits`.
    """
    out, inner, kh, kw = weight.shape
    panels = -(-out // PANEL)
    about = Branch(
        weight, kernel=(kh, kw), stride=stride, padding=padding, dilation=dilation, pool=pool,
        pool_stride=pool if pool_stride is None else pool_stride, either=either,
    )  # fmt: skip
    if inner == 1 and groups == out:
        flat = F.pad(weight.reshape(out, kh * kw), (0, 0, 0, panels * PANEL - out))
        each = flat.reshape(panels, PANEL, kh * kw).transpose(1, 2).contiguous()
        return [replace(about, weights=each, used_words=panels, each=True)]
    per_group = out // groups
    found: list[Branch] = []
    ranges = []
    for p in range(panels):
        first, last = p * PANEL // per_group, (min((p + 1) * PANEL, out) - 1) // per_group
        ranges.append((first * inner // PANEL, -(-(last + 1) * inner // PANEL)))
    start = 0
    for p in range(1, panels + 1):
        if p < panels and ranges[p] == ranges[start]:
            continue
        low, high = ranges[start]
        rows = (high - low) * PANEL
        block = weight.new_zeros(p - start, PANEL, rows, kh * kw)
        flat = block.view(-1, rows, kh * kw)
        for c in range(start * PANEL, min(p * PANEL, out)):
            at = c // per_group * inner - low * PANEL
            flat[c - start * PANEL, at : at + inner] = weight[c].reshape(inner, kh * kw)
        branch = replace(
            about, weights=block.permute(0, 3, 2, 1).contiguous(), first_word=low,
            used_words=high - low, first_panel=start,
        )  # fmt: skip
        found.append(_with_digits(_in_16_bits(branch) if int16 else branch))
        start = p
    return found


def _with_digits(branch: Branch) -> Branch:
    """Fewer rows to add for small windows: a channel with 3 spikes adds 2 rows, with 4 one."""
    most = math.prod(branch.pool)
    if branch.either or not 2 <= most <= 7:
        return branch
    planes = most.bit_length()
    digits = [branch.weights * 2**d for d in range(planes)]
    return replace(branch, weights=torch.cat(digits, 2).contiguous(), planes=planes)


def _in_16_bits(branch: Branch) -> Branch:
    """Weights as multiples of a 16-bit unit per output channel, so large that no sum overflows.

    A channel's unit is its largest possible sum over 32767: that of its positive or of its
    negative weights, times the spikes that a pooled window can add. Each weight is rounded once, by
    at most half a unit.
    """
    w = branch.weights.double()
    most = 1 if branch.either else math.prod(branch.pool)
    bound = torch.maximum(w.clamp(min=0).sum((1, 2)), -w.clamp(max=0).sum((1, 2))) * most
    # Roundings add up as well: half a unit for each weight.
    terms = w.shape[1] * w.shape[2] * most
    unit = bound / max(32767 - terms // 2, 1024)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    whole = (w / unit[:, None, None]).round()
    # With more weights than units the rounding may lean one way: grow the unit until it fits.
    sums = torch.maximum(whole.clamp(min=0).sum((1, 2)), -whole.clamp(max=0).sum((1, 2))) * most
    while bool((sums > 32767).any()):
        unit = torch.where(sums > 32767, unit * 1.01, unit)
        whole = (w / unit[:, None, None]).round()
        sums = torch.maximum(whole.clamp(min=0).sum((1, 2)), -whole.clamp(max=0).sum((1, 2))) * most
    return replace(branch, weights=whole.to(torch.int16), scale=unit.float().contiguous())


def spike_conv(
    sources: Sequence[tuple[SpikeMap, Branch]],
    layer: Layer,
    *,
    current: Tensor | None = None,
    spikes: bool | Tensor = True,
    count_at: Sequence[int] = (),
    currents: bool = False,
    T: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """All steps of one layer.

    Args:
        sources: maps of one batch and number of steps, and what each adds.
        layer: bias, pool and neurons.
        current: float32 ``[B, OH, OW, panels * 64]``, added at every step.
        spikes: return the neurons' spikes; a tensor is where they go.
        count_at: numbers of steps after which counts are wanted, rising, at most 16.
        currents: return what the neurons got.
        T: number of steps; needed without sources.

    Returns:
        ``(words, counts, currents)``: int64 ``[B, rows, columns, T, panels]``; int32
        ``[times, B, rows, columns, panels * 64]``; float32 ``[T, B, rows, columns, panels * 64]``;
        each None where not asked for.
    """
    if sources:
        first = sources[0][0].words
        T, (OH, OW) = first.shape[3], sources[0][1].size(*first.shape[1:3])
    else:
        assert current is not None
        first, (OH, OW) = current, current.shape[1:3]
    assert T is not None
    B, panels = first.shape[0], layer.panels
    shape = (B, OH // layer.pool, OW // layer.pool)
    kernels = backends.choose(first.device)
    if kernels is None or kernels.spike_conv is None:
        wanted = spikes is not False
        words, counts, rows = _reference(
            sources, layer, current, wanted, count_at, currents, T, (OH, OW)
        )
        if isinstance(spikes, Tensor) and words is not None:
            words = spikes.copy_(words)
        return words, counts, rows
    new = first.new_empty
    words = spikes if isinstance(spikes, Tensor) else None
    if words is None and spikes is not False:
        words = new((*shape, T, panels), dtype=torch.int64)
    counts = new((len(count_at), *shape, panels * PANEL), dtype=torch.int32) if count_at else None
    rows = new((T, *shape, panels * PANEL), dtype=torch.float32) if currents else None
    positions = {
        f"{name}_position": panels * PANEL if value is not None and value.dim() == 3 else 0
        for name, value in (("threshold", layer.threshold), ("v_init", layer.v_init))
    }
    packed = CONV.pack(
        bias=pointer(layer.bias), current=pointer(current), threshold=pointer(layer.threshold),
        v_init=pointer(layer.v_init), spikes=pointer(words), counts=pointer(counts),
        currents=pointer(rows), B=B, T=T, OH=OH, OW=OW, panels=panels, pool=layer.pool,
        strict=int(layer.strict), times=len(count_at), **positions,
        **{f"count_at{i}": t for i, t in enumerate(count_at)},
    )  # fmt: skip
    kernels.spike_conv(packed, b"".join(b.pack(m.words) for m, b in sources))
    return words, counts, rows


# ---- the same in plain PyTorch


def _weight(branch: Branch, dtype: torch.dtype) -> Tensor:
    """``[panels * 64, used_words * 64, kh, kw]``, or ``[panels * 64, 1, kh, kw]`` for each."""
    weights = branch.weights.to(dtype)
    if branch.planes > 1:
        weights = weights[:, :, : branch.used_words * PANEL]
    if branch.each:
        return weights.transpose(1, 2).reshape(-1, 1, *branch.kernel)
    return weights.permute(0, 3, 2, 1).reshape(
        len(weights) * PANEL, branch.used_words * PANEL, *branch.kernel
    )


def _linear(source: SpikeMap, branch: Branch) -> Tensor:
    """What a branch adds, ``[T, B, OH, OW, panels * 64]``."""
    part = source.words[..., branch.first_word : branch.first_word + branch.used_words]
    # Whole numbers have exact sums in float64.
    dtype = torch.float32 if branch.scale is None else torch.float64
    x = SpikeMap(part, branch.used_words * PANEL).dense(dtype).flatten(0, 1)
    if branch.pool != (1, 1):
        if branch.either:
            x = F.max_pool2d(x, branch.pool, branch.pool_stride)
        else:
            x = F.avg_pool2d(x, branch.pool, branch.pool_stride, divisor_override=1)
    y = F.conv2d(
        x, _weight(branch, dtype), None, branch.stride, branch.padding, branch.dilation,
        x.shape[1] if branch.each else 1,
    )  # fmt: skip
    y = y.unflatten(0, (source.T, -1)).permute(0, 1, 3, 4, 2)
    return y if branch.scale is None else y.float() * branch.scale.flatten()


def _pooled(x: Tensor, side: int) -> Tensor:
    """Increments of the largest running sum of each window of ``[T, B, OH, OW, C]``."""
    T, B, OH, OW, C = x.shape
    totals, total = [], torch.zeros_like(x[0])
    for step in x:
        total = total + step
        totals.append(total)
    rows, columns = OH // side, OW // side
    windows = torch.stack(totals)[:, :, : rows * side, : columns * side]
    peaks = windows.reshape(T, B, rows, side, columns, side, C).amax((3, 5))
    return torch.diff(peaks, dim=0, prepend=torch.zeros_like(peaks[:1]))


def _reference(
    sources: Sequence[tuple[SpikeMap, Branch]],
    layer: Layer,
    current: Tensor | None,
    spikes: bool,
    count_at: Sequence[int],
    currents: bool,
    T: int,
    size: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    like = current if not sources else sources[0][0].words
    assert like is not None
    channels = layer.panels * PANEL
    x = torch.zeros(T, like.shape[0], *size, channels, device=like.device)
    if layer.bias is not None:
        x = x + layer.bias
    if current is not None:
        x = x + current
    for source, branch in sources:
        first = branch.first_panel * PANEL
        x[..., first : first + len(branch.weights) * PANEL] += _linear(source, branch)
    if layer.pool > 1:
        x = _pooled(x, layer.pool)
    rows = x.contiguous() if currents else None
    if layer.threshold is None or layer.v_init is None:
        return None, None, rows
    v = layer.v_init.expand(x.shape[1:]).clone()
    fired = []
    for step in x:
        v = v + step
        s = v > layer.threshold if layer.strict else v >= layer.threshold
        v = torch.where(s, v - layer.threshold, v)
        fired.append(s)
    out = torch.stack(fired) if fired else x.new_zeros(x.shape, dtype=torch.bool)
    words = SpikeMap.of(out.permute(0, 1, 4, 2, 3)).words if spikes else None
    counts = None
    if count_at:
        counts = torch.stack([out[:t].sum(0, dtype=torch.int32) for t in count_at])
    return words, counts, rows
