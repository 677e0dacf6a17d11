"""The convolution of packed spikes in plain PyTorch: what the kernel must give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .spike_maps import PANEL, Branch, Layer, SpikeMap

__all__ = ["reference"]


def _weight(branch: Branch, dtype: torch.dtype) -> Tensor:
    """``[panels * 64, used_words * 64, kh, kw]``, or ``[panels * 64, 1, kh, kw]`` for each."""
    branch = branch.wide()
    weights = branch.weights.to(dtype)
    if branch.each:
        return weights.transpose(1, 2).reshape(-1, 1, *branch.kernel)
    weights = weights[:, :, : branch.used_words * PANEL]  # those of the lowest digit
    return weights.permute(0, 3, 2, 1).reshape(
        len(weights) * PANEL, branch.used_words * PANEL, *branch.kernel
    )


def _linear(source: SpikeMap, branch: Branch, exact: bool) -> Tensor:
    """What a branch adds, ``[T, B, OH, OW, panels * 64]``."""
    part = source.words[..., branch.first_word : branch.first_word + branch.used_words]
    # Whole numbers have exact sums in float64.
    dtype = torch.float32 if branch.scale is None and not exact else torch.float64
    x = SpikeMap(part, branch.used_words * PANEL).dense(dtype).flatten(0, 1)
    if (branch.pool, branch.pool_stride) != ((1, 1), (1, 1)):
        if branch.either:
            x = F.max_pool2d(x, branch.pool, branch.pool_stride)
        else:
            x = F.avg_pool2d(x, branch.pool, branch.pool_stride, divisor_override=1)
    y = F.conv2d(
        x, _weight(branch, dtype), None, branch.stride, branch.padding, branch.dilation,
        x.shape[1] if branch.each else 1,
    )  # fmt: skip
    y = y.unflatten(0, (source.T, -1)).permute(0, 1, 3, 4, 2)
    return y.float() if branch.scale is None else y.float() * branch.scale.flatten()


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


def reference(
    sources: Sequence[tuple[SpikeMap, Branch]],
    layer: Layer,
    current: Tensor | None,
    spikes: bool,
    count_at: Sequence[int],
    currents: bool,
    T: int,
    size: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`spike_conv`; ``size`` is of the sum of the branches."""
    like = current if not sources else sources[0][0].words
    assert like is not None
    channels = layer.panels * PANEL
    x = torch.zeros(T, like.shape[0], *size, channels, dtype=torch.float32, device=like.device)
    if layer.bias is not None:
        x = x + layer.bias
    if current is not None:
        x = x + current
    for source, branch in sources:
        first = branch.first_panel * PANEL
        x[..., first : first + branch.panels * PANEL] += _linear(source, branch, layer.integers)
    if layer.pool > 1:
        x = _pooled(x, layer.pool)
    rows = x.contiguous() if currents else None
    if layer.threshold is None or layer.v_init is None:
        return None, None, rows
    v = layer.v_init.expand(x.shape[1:]).clone()
    fired = []
    for step in x.to(v.dtype):
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
