"""What training with sharded parameters asks of a network."""

from __future__ import annotations

from torch import nn

__all__ = ["shardable"]


def shardable(network: nn.Module) -> nn.Module:
    """Make every scalar parameter a vector of one element, in place: what ``fully_shard`` takes.

    Learned thresholds and ceilings (``IFNode(learn_threshold=True)``, ``QCFS``, ``ClipReLU``,
    ``RateNorm``) are scalars unless they are per channel, and FSDP2 shards along dimension 0. The
    network computes the same, with the same gradients. A state dict of it loads into a network with
    scalars as it is. Call it before ``fully_shard`` and before the optimizer is made::

        for layer in snnkernels.distributed.shardable(net):
            fully_shard(layer)
        fully_shard(net)

    DistributedDataParallel takes scalars as they are.

    Returns:
        ``network``.

    Raises:
        TypeError: ``network`` is not a module.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    changed: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is None or (value.dim() > 0 and id(value) not in changed):
                continue
            if id(value) not in changed:
                changed[id(value)] = nn.Parameter(value.detach().reshape(1), value.requires_grad)
            module._parameters[name] = changed[id(value)]  # tied ones stay tied
    return network
