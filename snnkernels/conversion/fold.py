"""Batch normalisation into the layer before it, or into a fixed scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .errors import ConversionError
from .graphs import first_input, module_of, place_module

__all__ = ["ChannelAffine", "fold_batch_norm", "with_weights"]


class ChannelAffine(nn.Module):
    """``x * scale + shift`` per channel (dim 1): batch normalisation that nothing absorbs.

    Args:
        scale: ``[C]``.
        shift: ``[C]``, same dtype.

    Shape: ``[B, C, *]`` to the same shape.
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift channel by channel."""
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.scale.view(shape) + self.shift.view(shape)


def _scale_and_shift(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """``bn`` in eval mode as float64 ``(scale, shift)``, each ``[C]``, with its own eps."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    with torch.no_grad():
        scale = torch.rsqrt(bn.running_var.double() + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.double()
        shift = -bn.running_mean.double() * scale
        if bn.bias is not None:
            shift = shift + bn.bias.double()
    return scale, shift


def with_weights(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A plain copy of a convolution or linear layer that holds ``weight`` and ``bias``."""
    device, dtype = weight.device, weight.dtype
    if isinstance(layer, nn.Linear):
        new: nn.Module = nn.Linear(
            layer.in_features, layer.out_features, bias is not None, device=device, dtype=dtype
        )
    else:
        assert isinstance(layer, _ConvNd)
        # The class in torch.nn, also when the layer is a parametrised or user's subclass.
        base = next(c for c in type(layer).__mro__ if c.__module__ == "torch.nn.modules.conv")
        extra = (
            {"output_padding": layer.output_padding} if isinstance(layer, _ConvTransposeNd) else {}
        )
        new = base(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=bias is not None,
            padding_mode=layer.padding_mode,
            device=device,
            dtype=dtype,
            **extra,
        )
    new.weight = nn.Parameter(weight)
    new.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
    return new.eval()


def scale_outputs(layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """``weight`` of ``layer`` with output channel c multiplied by ``scale[c]``; float64."""
    weight = weight.double()
    if isinstance(layer, _ConvTransposeNd):  # [in, out / groups, *kernel]
        groups = layer.groups
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        factor = scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
        return (split * factor).reshape(weight.shape)
    return weight * scale.view(-1, *(1,) * (weight.dim() - 1))


def _folded(layer: nn.Linear | _ConvNd, bn: _BatchNorm) -> nn.Module:
    scale, shift = _scale_and_shift(bn)
    with torch.no_grad():
        old = layer.weight.detach()
        weight = scale_outputs(layer, old, scale).to(old.dtype)
        bias = shift if layer.bias is None else layer.bias.double() * scale + shift
    return with_weights(layer, weight, bias.detach().to(old.dtype))


def fold_batch_norm(net: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Fold every batch normalisation of ``graph``; returns what was done, by module path.

    After a convolution or linear layer that feeds nothing else it goes into that layer's weights
    (computed in float64, per call site, so a layer used twice folds twice); elsewhere it becomes
    a :class:`ChannelAffine`. Into a linear layer only where ``node.meta["shape"]`` says ``[B, C]``:
    with more dimensions, batch normalisation acts on dimension 1 and the features are the last.
    One without running statistics is left for later stages to judge.
    """
    done: dict[str, str] = {}
    for node in list(graph.nodes):
        bn = module_of(net, node)
        if not isinstance(bn, _BatchNorm) or bn.running_mean is None:
            continue
        before = first_input(node)
        if not isinstance(before, fx.Node):
            raise ConversionError(f"{node.target}: batch normalisation of something not a tensor")
        layer = module_of(net, before)
        if isinstance(layer, nn.Linear) and len(before.meta.get("shape", ())) != 2:
            layer = None  # it may normalise another dimension than the features
        if isinstance(layer, (nn.Linear, _ConvNd)) and len(before.users) == 1:
            path = place_module(net, graph, before, _folded(layer, bn))
            before.target = path
            done[str(node.target)] = f"folded into {path}"
            node.replace_all_uses_with(before)
            graph.erase_node(node)
        else:
            scale, shift = _scale_and_shift(bn)
            dtype = bn.running_mean.dtype
            affine = ChannelAffine(scale.to(dtype), shift.to(dtype))
            node.target = place_module(net, graph, node, affine)
            done[str(node.target)] = "kept as scale and shift"
    return done
