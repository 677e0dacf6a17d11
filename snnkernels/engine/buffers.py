"""Where the packed spikes of a plan lie: one arena, whose places are used again."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from .layers import SpikingLayer, panels_of

__all__ = ["Buffers", "plan_buffers"]


@dataclass(frozen=True)
class Buffers:
    """Memory of a plan for one image.

    Attributes:
        offsets: of each layer's spikes in the arena, in int64 words.
        words: size of the arena.
        apart: what the same spikes would take if every layer kept its own place.
    """

    offsets: dict[str, int]
    words: int
    apart: int


def _lives(graph: fx.Graph) -> list[tuple[str, SpikingLayer, int, int]]:
    """Layers, and the first and last place in the order where their spikes are needed."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    module = graph.owning_module
    assert module is not None
    found = []
    for node, start in order.items():
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, SpikingLayer) or not layer.spikes:
            continue
        readers = [reader for item in node.users for reader in item.users]
        found.append((layer.name, layer, start, max((order[r] for r in readers), default=start)))
    return found


def plan_buffers(graph: fx.Graph, T: int) -> Buffers:
    """Places in one arena: the largest first, each where nothing alive at the same time lies."""
    sizes = {}
    lives = {}
    for name, layer, start, end in _lives(graph):
        sizes[name] = math.prod(layer.size[1:]) * T * panels_of(layer.channels)
        lives[name] = (start, end)
    offsets: dict[str, int] = {}
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        start, end = lives[name]
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if lives[other][0] <= end and start <= lives[other][1]
        )
        at = 0
        for low, high in taken:
            if at + sizes[name] <= low:
                break
            at = max(at, high)
        offsets[name] = at
    words = max((offsets[n] + sizes[n] for n in offsets), default=0)
    return Buffers(offsets, words, sum(sizes.values()))
