"""Which dimension of a value holds its channels, and how many there are."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .fold import ChannelAffine
from .graphs import first_input, module_of
from .ops import PRODUCTS, QUOTIENTS, SUMS, Activation

__all__ = ["channels_of"]

Channels = tuple[int, int | None]


def channels_of(
    net: nn.Module, node: object, memo: dict[fx.Node, Channels] | None = None
) -> Channels:
    """``(dimension, number or None if not known)`` of the channels of ``node``'s value.

    Features of a linear layer are its last dimension (-1); everything else has channels in
    dimension 1. For ``[B, C]`` the two are the same.
    """
    memo = {} if memo is None else memo
    if not isinstance(node, fx.Node):
        return 1, None
    if node not in memo:
        memo[node] = _find(net, node, memo)
    return memo[node]


def _find(net: nn.Module, node: fx.Node, memo: dict[fx.Node, Channels]) -> Channels:
    module = module_of(net, node)
    if isinstance(module, nn.Linear):
        return -1, module.out_features
    if isinstance(module, _ConvNd):
        return 1, module.out_channels
    if isinstance(module, ChannelAffine):
        return 1, module.scale.numel()
    if isinstance(module, _BatchNorm):
        return 1, module.num_features
    if isinstance(module, Activation):
        return channels_of(net, first_input(node), memo)
    name = str(getattr(node.target, "__name__", node.target))
    if name in ("linear", "matmul", "__matmul__"):
        return -1, None
    if name in SUMS | PRODUCTS | QUOTIENTS - {"bilinear"}:
        found = [channels_of(net, n, memo) for n in node.all_input_nodes if n.op != "get_attr"]
        dims = {dim for dim, _ in found}
        if len(dims) == 1:
            sizes = {size for _, size in found if size is not None}
            # Sizes that differ broadcast against each other.
            return dims.pop(), sizes.pop() if len(sizes) == 1 else None
    return 1, None
