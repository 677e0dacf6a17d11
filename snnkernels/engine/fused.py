"""A layer of a plan as the GPU kernel of :mod:`snnkernels.kernels.fused_conv` runs it.

One convolution of spikes is fused with the neurons. Whatever else their current is a sum of is
added in the same kernel: spikes that pass by it as they are, read as spikes, or everything else
(the convolution of a shortcut, values constant in time) as one tensor of currents.

Maps of spikes are uint8 ``[T, B, H, W, C]``, those of layers without positions ``[T, B, 1, 1, C]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.fused_conv import (
    FusedConv,
    NotFusible,
    fused_conv,
    fused_conv_reference,
    why_not,
)
from .layers import Run, as_counted, constant_current
from .network import Network, Node, Term

__all__ = ["FusedLayer", "current_of"]

# And how many spikes one value of a map may count, exact in each.
_DTYPES = {torch.float16: 255, torch.bfloat16: 255, torch.int8: 127}


class FusedLayer(nn.Module):
    """Neurons and the linear maps of spikes before them, one of them in one kernel with them.

    Runs on the device that the weights of its terms are on; :func:`fused_conv` where that can,
    else its plain PyTorch form.

    Attributes:
        layer: what is fused.
        sources: names of the values that are read, in the order of the call.
    """

    def __init__(self, net: Network, node: Node, run: Run, dtype: torch.dtype) -> None:
        """Choose what is fused.

        Args:
            net, node: a layer that :func:`snnkernels.engine.passes.fuse_neurons` made.
            dtype: of the weights, float16 or bfloat16: rounded once; int8 for a layer in whole
                numbers (:mod:`.integers`).

        Raises:
            NotFusible: says why the layer has to run as a convolution and neurons.
            ValueError: the dtype is none of these.
        """
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype} must be one of {', '.join(map(str, _DTYPES))}")
        neurons = node.neurons
        assert neurons is not None
        if node.side != 1:
            raise NotFusible("a cumulative max-pool lies between the sum and the neurons")
        many = [term for term in node.terms if not term.each]
        if not many:
            raise NotFusible("it has no convolution")
        main = max(many, key=lambda term: term.weight.numel() * (term.groups == 1))
        if math.prod(main.pool) > _DTYPES[dtype] and not main.either:
            raise NotFusible(f"windows of {main.pool} hold more spikes than one value counts")
        weight = main.weight.to(dtype)
        if not bool(weight.isfinite().all()):
            raise NotFusible(f"a weight is beyond {dtype}")
        bias = node.whole_bias()
        self._in_kernel = (main.pool, main.pool_stride) == ((2, 2), (2, 2)) and not main.either
        self.layer = FusedConv.of(
            weight,
            neurons.threshold,
            v_init=neurons.v_init,
            bias=bias,
            stride=main.stride,
            padding=main.padding,
            dilation=main.dilation,
            groups=main.groups,
            pool=2 if self._in_kernel else 1,
            strict=neurons.strict,
        )
        others = [term for term in node.terms if term is not main]
        self.sources = [net.origin_of(term.source).name for term in (main, *others)]
        self.size, self.spikes = node.size, node.spikes
        self.counted = any(user.op == "count" for user in net.users(node.name))
        self._main = main
        # Whole numbers have exact sums in float64.
        wide = torch.float64 if dtype == torch.int8 else torch.float32
        self._others = [replace(term, weight=term.weight.to(wide)) for term in others]
        self._run = (run,)

    def place(self, device: torch.device) -> FusedLayer:
        """Move what it holds."""
        self.layer = self.layer.to(device)
        self._others = [replace(term, weight=term.weight.to(device)) for term in self._others]
        return self

    def forward(
        self, maps: Sequence[Tensor], statics: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run all steps.

        Args:
            maps: spikes of each source.
            statics: currents constant in time, ``[B, C]`` or ``[B, C, H, W]``.

        Returns:
            Spikes and counts ``[times, B, *size]`` int32, each None where nobody reads it.
        """
        run = self._run[0]
        ends = run.ends if self.counted else ()
        x = maps[0] if self._in_kernel else _pooled(maps[0], self._main)
        residual, scale = self._added(maps[1:], statics)
        # Counts of several times come from the spikes.
        rows = self.spikes or len(ends) > 1
        call = fused_conv_reference if why_not(x.device, self.layer.weight.dtype) else fused_conv
        out = call(
            x, self.layer, residual=residual, residual_scale=scale,
            output=torch.uint8 if rows else None, count=len(ends) == 1,
        )  # fmt: skip
        counts = None if out.count is None else out.count[None]
        if len(ends) > 1:
            assert out.spikes is not None
            counts = torch.stack([out.spikes[:end].sum(0, dtype=torch.int32) for end in ends])
        if counts is not None:
            counts = as_counted(counts, self.size)
        return out.spikes if self.spikes else None, counts

    def _added(
        self, maps: Sequence[Tensor], statics: Sequence[Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The residual of the call, and what one of it weighs."""
        if len(maps) == 1 and self._others[0].in_place and not statics:
            scale = self._others[0].weight.flatten()
            return maps[0], scale.to(self.layer.state)
        total = constant_current(statics)
        for spikes, term in zip(maps, self._others, strict=True):
            current = current_of(spikes, term)
            total = current if total is None else current + total
        if total is None:
            return None, None
        return total.movedim(-3, -1).to(self.layer.state).contiguous(), None

    def extra_repr(self) -> str:
        """Show what it is made of."""
        return f"size={self.size}, reads={self.sources}"


def _pooled(spikes: Tensor, term: Term) -> Tensor:
    """Sums of the windows (or whether there is a spike) as uint8, ``[T, B, H, W, C]``."""
    if (term.pool, term.pool_stride) == ((1, 1), (1, 1)):
        return spikes
    x = _pool(spikes.flatten(0, 1).permute(0, 3, 1, 2).float(), term)
    x = x.permute(0, 2, 3, 1).to(torch.uint8)
    return x.unflatten(0, spikes.shape[:2]).contiguous()


def _pool(x: Tensor, term: Term) -> Tensor:
    if term.either:
        return F.max_pool2d(x, term.pool, term.pool_stride)
    return F.avg_pool2d(x, term.pool, term.pool_stride, divisor_override=1)


def current_of(spikes: Tensor, term: Term) -> Tensor:
    """What a term adds, ``[T, B, C, H, W]`` in channels_last, in the dtype of its weights."""
    x = spikes.flatten(0, 1).permute(0, 3, 1, 2).to(term.weight.dtype)
    if (term.pool, term.pool_stride) != ((1, 1), (1, 1)):
        x = _pool(x, term)
    if term.in_place:
        x = x * term.weight.view(1, -1, 1, 1)
    else:
        x = F.conv2d(x, term.weight, None, term.stride, term.padding, term.dilation, term.groups)
    return x.unflatten(0, spikes.shape[:2])
