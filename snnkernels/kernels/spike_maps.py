"""What a layer of packed spikes is made of: maps, branches and neurons, as the kernel reads them.

Spikes of a map lie as words of 64 channels, ``[B, H, W, T, ceil(C / 64)]`` int64 (bit patterns):
bit ``c % 64`` of word ``c // 64`` is channel c; bits beyond C are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .maps.launching import pointer
from .maps_params import Record

__all__ = ["PANEL", "TIMES", "Branch", "Layer", "SpikeMap", "branches_of", "lanes_of"]

PANEL = 64  # kPanel: channels of a word
TIMES = 16  # kSpikeTimes
_WORDS = 256  # that a branch can read: a list names channels in 16 bits
_PLACES = 65536  # that 16 bits tell apart
_MOST = 10_000  # spikes whose sum is taken in 16 bits
_ANY_TO_ANY, _EACH_TO_ITSELF = 0, 1

BRANCH = Record(
    "SpikeBranch", ("Q", "words weights scale"),
    ("q", "H W row_words first_word used_words first_panel panels"),
    ("i", "kh kw sh sw ph pw dh dw pool_h pool_w pool_sh pool_sw kind either planes "
          "lanes sixteens pad"),
)  # fmt: skip
CONV = Record(
    "SpikeConv", ("Q", "bias current threshold v_init spikes counts currents"),
    ("q", "B T OH OW panels threshold_position v_init_position"),
    ("i", "pool strict times lanes integers pad"),
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
            channel goes to itself ``[panels, taps, 64]`` float32; see ``lanes`` as well.
        scale: ``[panels, 64]`` float32, what one unit of an int16 weighs; None for float32.
        first_word, used_words: the words of the input that it reads.
        first_panel: the first 64 output channels it adds to.
        kernel, stride, padding, dilation: of the convolution.
        pool, pool_stride: window whose spikes are added before; ``(1, 1)`` is none.
        either: a window has a spike where one of its positions has.
        each: each channel goes to itself.
        planes: a window's sum is read as so many binary digits, and the weights are there once for
            each digit, times 1, 2 and 4; 1: every spike adds the weights.
        channels: that its words can have; None: all.
        lanes: output channels that there are, 64 for all. Fewer, of a single panel: weights are
            ``[kh, planes * used_words * 64, kw, lanes]`` with the last column of the kernel first,
            so that what a spike adds to the outputs of a row lies together.
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
    channels: int | None = None
    lanes: int = PANEL

    @property
    def panels(self) -> int:
        """Output channels in groups of 64."""
        return len(self.weights) if self.lanes == PANEL else 1

    @property
    def most(self) -> int:
        """Most spikes of a channel in a window of the pool."""
        return 1 if self.either else math.prod(self.pool)

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
            first_panel=self.first_panel, panels=self.panels, kh=kh, kw=kw, sh=sh, sw=sw,
            ph=ph, pw=pw, dh=dh, dw=dw, pool_h=oh, pool_w=ow, pool_sh=oh_stride,
            pool_sw=ow_stride, kind=_EACH_TO_ITSELF if self.each else _ANY_TO_ANY,
            either=int(self.either), planes=self.planes, lanes=self.lanes,
            sixteens=4 if self.channels is None else min(4, -(-self.channels // 16)),
        )  # fmt: skip

    def narrow(self, lanes: int) -> Branch:
        """The same for so many output channels, of a layer without a max-pool."""
        if self.each or lanes == PANEL:
            return self
        kh, kw = self.kernel
        rows = self.weights[0, ..., :lanes].unflatten(0, (kh, kw)).flip(1)
        return replace(self, weights=rows.transpose(1, 2).contiguous(), lanes=lanes)

    def wide(self) -> Branch:
        """The inverse of :meth:`narrow`."""
        if self.lanes == PANEL:
            return self
        rows = self.weights.transpose(1, 2).flip(1).flatten(0, 1)[None]
        return replace(self, weights=F.pad(rows, (0, PANEL - self.lanes)), lanes=PANEL)


def lanes_of(channels: int, side: int, reads: Sequence[tuple[int, Branch]]) -> int:
    """Output channels that a kernel computes for a layer: all 64 of a panel, 32 or 16.

    Few channels are computed a row of outputs at a time: every spike is added to the outputs around
    it. That needs neurons without a max-pool before them, and inputs so narrow that a list of a
    row's spikes says the column in 16 bits.

    Args:
        channels: of the layer.
        side: of its cumulative max-pool.
        reads: columns of each map, and the branch that reads it.
    """
    if channels > PANEL // 2 or side > 1:
        return PANEL
    for W, branch in reads:
        columns = (W - branch.pool[1]) // branch.pool_stride[1] + 1
        if not branch.each and columns * branch.planes * branch.used_words * PANEL > _PLACES:
            return PANEL
    return PANEL // 2 if channels > PANEL // 4 else PANEL // 4


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
        lanes: as of its branches.

    Thresholds and starts of int32 (both): membranes are whole numbers too, and so must be weights,
    bias and currents, whose sums must stay below 2^24; padding needs a threshold of 2^31 - 1.
    """

    panels: int
    bias: Tensor | None = None
    threshold: Tensor | None = None
    v_init: Tensor | None = None
    pool: int = 1
    strict: bool = False
    lanes: int = PANEL

    @property
    def integers(self) -> bool:
        """Whether membranes are whole numbers."""
        return self.threshold is not None and self.threshold.dtype == torch.int32


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
    whole: bool = False,
) -> list[Branch]:
    """The branches of a convolution: one, or one for each run of panels with the same inputs.

    Args:
        weight: float32 ``[C_out, C_in / groups, kh, kw]``.
        pool, pool_stride: window whose spikes are added before the convolution (not divided).
        int16: weights in 16 bits where at most 10,000 spikes can meet; see :func:`_in_16_bits`.
        whole: weights are whole numbers: they stay what they are, in 16 bits where no sum can
            overflow.
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
        for word in range(low, high, _WORDS):
            words = min(_WORDS, high - word)
            part = block.narrow(2, (word - low) * PANEL, words * PANEL)
            branch = replace(
                about, weights=part.permute(0, 3, 2, 1).contiguous(), first_word=word,
                used_words=words, first_panel=start,
                channels=min(inner * groups - word * PANEL, words * PANEL),
            )  # fmt: skip
            if whole:
                branch = _whole_in_16_bits(branch)
            elif int16 and inner * kh * kw * about.most <= _MOST:
                branch = _in_16_bits(branch)
            found.append(_with_digits(branch))
        start = p
    return found


def _with_digits(branch: Branch) -> Branch:
    """Fewer rows to add for small windows: a channel with 3 spikes adds 2 rows, with 4 one."""
    if not 2 <= branch.most <= 7:
        return branch
    planes = branch.most.bit_length()
    digits = [branch.weights * 2**d for d in range(planes)]
    return replace(branch, weights=torch.cat(digits, 2).contiguous(), planes=planes)


def _largest_sums(branch: Branch) -> Tensor:
    """Largest size of a sum of a channel's weights, ``[panels, 64]`` float64."""
    w = branch.weights.double()
    return torch.maximum(w.clamp(min=0).sum((1, 2)), -w.clamp(max=0).sum((1, 2))) * branch.most


def _whole_in_16_bits(branch: Branch) -> Branch:
    bound = _largest_sums(branch)
    if float(bound.max()) > 32767:
        return branch
    return replace(
        branch, weights=branch.weights.to(torch.int16), scale=torch.ones_like(bound).float()
    )


def _in_16_bits(branch: Branch) -> Branch:
    """Weights as multiples of a 16-bit unit per output channel, so large that no sum overflows.

    A channel's unit is its largest possible sum over 32767: that of its positive or of its
    negative weights, times the spikes that a pooled window can add; half a unit for each weight is
    left for the roundings, which may add up as well. Each weight is rounded once, by at most half a
    unit.
    """
    w = branch.weights.double()
    bound = _largest_sums(branch)
    terms = (w != 0).sum((1, 2)) * branch.most
    unit = bound / (32767 - 0.5 * terms)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    whole = (w / unit[:, None, None]).round()
    return replace(branch, weights=whole.to(torch.int16), scale=unit.float().contiguous())
