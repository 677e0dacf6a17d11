"""The lowering passes, each small: what it looks for, what it puts in its place.

A pass changes a :class:`~.network.Network` and says what it did, a line for each place. The order
of :data:`PASSES` is that in which they run; each can be left out, and what it would have brought
together stays apart and runs as the converted network runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .network import Network, Node, Term

__all__ = ["PASSES", "Pass"]

Pass = Callable[[Network], list[str]]
_SPIKING = ("neurons", "layer", "dense")


def _identity(source: Node) -> Term:
    """A value as a term: every channel to itself."""
    ones = torch.ones(source.size[0], 1, 1, 1, dtype=torch.float64)
    return Term(source.name, ones, groups=source.size[0])


def _column(scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1, 1)


def _bias(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def constant_prefix(net: Network) -> list[str]:
    """Neurons whose current is constant in time take it once, not once for every step."""
    done = []
    for node in net:
        if node.op != "neurons" or (node.neurons and node.neurons.plain):
            continue
        source = net.origin_of(node.inputs[0])
        if source.op == "static" and source.size == node.size:
            node.op, node.inputs, node.statics = "layer", [], [source.name]
            done.append(f"{node.name}: the current {source.name} is constant in time")
    return done


def fold_affine(net: Network) -> list[str]:
    """Batch norms, scales and shifts go into the weights and the bias before them.

    One with nothing linear before it becomes a linear map of its own, each channel to itself.
    """
    done = []
    for node in net:
        if node.op != "affine":
            continue
        assert node.scale is not None
        before = net.origin_of(node.inputs[0])
        linear = before.op == "linear" and before.side == 1 and not before.statics
        if linear and _read_once(net, node.inputs[0], before):
            terms = [replace(t, weight=t.weight * _column(node.scale)) for t in before.terms]
            bias = None if before.bias is None else before.bias * node.scale
            done.append(f"{node.name}: folded into {before.name}")
        elif before.op in (*_SPIKING, "cat", "avg_pool", "affine"):
            terms = [replace(_identity(before), weight=_column(node.scale))]
            bias = None
            done.append(f"{node.name}: a map of its own")
        else:
            continue
        node.op, node.inputs, node.terms = "linear", [], terms
        node.bias = _bias(bias, node.shift)
    net.drop_unread()
    return done


def _read_once(net: Network, name: str, before: Node) -> bool:
    """Whether ``before`` is read once, by ``name`` through nodes that only pass it on."""
    while True:
        if not net.only_user(name):
            return False
        if name == before.name:
            return True
        name = net[name].inputs[0]


def merge_scalers(net: Network) -> list[str]:
    """Scale, neurons, scale: one layer of neurons with another threshold and another weight.

    Networks that other converters made divide by a scale before neurons of threshold 1 and multiply
    by it behind.
    """
    done = []
    for node in net:
        if node.op not in ("neurons", "layer") or node.neurons is None or node.neurons.plain:
            continue
        done += _scale_before(net, node)
        done += _scale_behind(net, node)
    net.drop_unread()
    return done


def _pure(node: Node) -> bool:
    """Whether a node multiplies by positive numbers and does nothing else."""
    if node.op != "affine" or node.scale is None or node.shift is None:
        return False
    return bool((node.scale > 0).all()) and not bool(node.shift.any())


def _scale_before(net: Network, node: Node) -> list[str]:
    if node.op != "neurons":
        return []
    scaler = net.origin_of(node.inputs[0])
    neurons = node.neurons
    if not _pure(scaler) or neurons is None or neurons.bias is not None:
        return []
    if neurons.threshold.dim() > 1 or neurons.v_init.dim() > 1:
        return []
    assert scaler.scale is not None
    scale = scaler.scale
    node.neurons = replace(
        neurons, threshold=(neurons.threshold / scale).float(),
        v_init=(neurons.v_init / scale).float(), amplitude=neurons.amplitude,
    )  # fmt: skip
    node.inputs = [scaler.inputs[0]]
    return [f"{scaler.name}: into the threshold of {node.name}"]


def _scale_behind(net: Network, node: Node) -> list[str]:
    scalers = [user for user in net.users(node.name) if _pure(user)]
    if len(scalers) != 1 or len(net.users(node.name)) != 1:
        return []
    scaler, neurons = scalers[0], node.neurons
    assert scaler.scale is not None
    assert neurons is not None
    node.neurons = replace(neurons, amplitude=(neurons.amplitude * scaler.scale).float())
    _reconnect(net, scaler.name, node.name)
    return [f"{scaler.name}: into the weight of the spikes of {node.name}"]


def _reconnect(net: Network, old: str, new: str) -> None:
    """Whoever reads ``old`` reads ``new``."""
    for node in net:
        node.inputs = [new if name == old else name for name in node.inputs]
        node.statics = [new if name == old else name for name in node.statics]
        node.terms = [replace(t, source=new) if t.source == old else t for t in node.terms]
    net.aliases[old] = new


def merge_residuals(net: Network) -> list[str]:
    """Sums of linear maps, spikes and constant values become one linear node of all their terms."""
    done = []
    for node in net:
        if node.op != "add":
            continue
        terms: list[Term] = []
        statics: list[str] = []
        bias: Tensor | None = None
        for name in node.inputs:
            part = net.origin_of(name)
            mine = part.op == "linear" and part.side == 1
            if mine and (_read_once(net, name, part) or all(t.in_place for t in part.terms)):
                terms += part.terms
                statics += part.statics
                bias = _bias(bias, part.bias)
            elif part.op == "static" and part.size == node.size:
                statics.append(part.name)
            elif part.op in (*_SPIKING, "avg_pool", "cat") and part.size == node.size:
                terms.append(_identity(part))
            else:
                break
        else:
            node.op, node.inputs, node.bias = "linear", [], bias
            node.terms, node.statics = terms, statics
            done.append(f"{node.name}: a sum of {len(terms)} maps of spikes in one layer")
    net.drop_unread()
    return done


def split_concats(net: Network) -> list[str]:
    """A map of concatenated values becomes the sum of maps of each."""
    done = []
    for node in net:
        if node.op != "linear":
            continue
        again = True
        while again:
            again = False
            terms: list[Term] = []
            for term in node.terms:
                cat = net.origin_of(term.source)
                parts = _split(net, term, cat) if cat.op == "cat" else None
                if parts is None:
                    terms.append(term)
                    continue
                terms += parts
                again = True
                done.append(f"{node.name}: reads the {len(parts)} parts of {cat.name} in place")
            node.terms = terms
    net.drop_unread()
    return done


def _split(net: Network, term: Term, cat: Node) -> list[Term] | None:
    sizes = [net[name].size for name in cat.inputs]
    if any(size[1:] != sizes[0][1:] for size in sizes):
        return None
    weight = term.weight
    if term.each and term.groups > 1:
        # A channel goes to itself: of a part, to itself behind the parts before.
        weight = torch.diag(weight.flatten())[:, :, None, None]
    elif term.groups > 1:
        return None
    counts = [size[0] for size in sizes]
    pieces = weight.split(counts, 1)
    return [
        replace(term, source=name, weight=piece, groups=1)
        for name, piece in zip(cat.inputs, pieces, strict=True)
    ]


def merge_pools(net: Network) -> list[str]:
    """Average pools before a linear map become windows of it; max-pools behind one, its side.

    The spikes of a window are added as whole numbers; what divides them is in the weights, or in
    the thresholds of neurons that follow at once.
    """
    done = []
    for node in net:
        if node.op == "max_pool":
            before = net.origin_of(node.inputs[0])
            if (
                before.op == "linear"
                and before.side == 1
                and _read_once(net, node.inputs[0], before)
            ):
                node.op, node.inputs, node.side = "linear", [], node.window[0][0]
                node.terms, node.bias, node.statics = before.terms, before.bias, before.statics
                done.append(f"{node.name}: the neurons behind see its running maxima")
    net.drop_unread()
    for node in net:
        if node.op == "neurons" and net.origin_of(node.inputs[0]).op == "avg_pool":
            # Neurons right behind a pool: the same as behind a map of each channel to itself.
            pool = net.origin_of(node.inputs[0])
            name = f"{pool.name}_of_{node.name}"
            _insert(net, node.name, Node(name, "linear", [], pool.size, terms=[_identity(pool)]))
            node.inputs = [name]
        if node.op != "linear":
            continue
        for i, term in enumerate(node.terms):
            pool = net.origin_of(term.source)
            if pool.op != "avg_pool" or term.pool != (1, 1) or term.pool_stride != (1, 1):
                continue
            kernel, stride = pool.window
            node.terms[i] = replace(
                term, source=pool.inputs[0], weight=term.weight / (kernel[0] * kernel[1]),
                pool=kernel, pool_stride=stride,
            )  # fmt: skip
            done.append(f"{node.name}: adds the spikes of the windows of {pool.name}")
    net.drop_unread()
    return done


def _insert(net: Network, before: str, node: Node) -> None:
    """Put a node right before another in the order of execution."""
    nodes = {}
    for name, other in net.nodes.items():
        if name == before:
            nodes[node.name] = node
        nodes[name] = other
    net.nodes = nodes


def fold_amplitudes(net: Network) -> list[str]:
    """What a spike weighs goes into the weights that read it: spikes count 0 and 1."""
    done = []
    for node in net:
        if node.op != "linear":
            continue
        for i, term in enumerate(node.terms):
            source = net.origin_of(term.source)
            if source.neurons is None or source.neurons.plain or term.binary:
                continue
            amplitude = source.neurons.amplitude.double()
            weight = term.weight
            if amplitude.dim() == 0 or amplitude.numel() == 1:
                weight = weight * amplitude.reshape(())
            elif term.groups == 1:
                weight = weight * amplitude.view(1, -1, 1, 1)
            else:
                per_group = term.weight.shape[0] // term.groups
                mine = amplitude.view(term.groups, 1, -1).expand(-1, per_group, -1)
                weight = weight * mine.reshape(*weight.shape[:2], 1, 1)
            node.terms[i] = replace(term, source=source.name, weight=weight, binary=True)
            done.append(f"{node.name}: weights times the thresholds of {source.name}")
    return done


def fuse_neurons(net: Network) -> list[str]:
    """A linear map of spikes and the neurons behind it become one layer.

    A map whose spikes weigh 1 needs no folding first.
    """
    done = []
    for node in net:
        if node.op != "neurons" or node.neurons is None:
            continue
        if node.neurons.plain:
            node.why = node.neurons.plain
            continue
        before = net.origin_of(node.inputs[0])
        if before.op != "linear":
            node.why = f"what lies before, {before.name}, is no linear map of spikes ({before.op})"
            continue
        terms = [_as_binary(net, term) for term in before.terms]
        bad = [t.source for t, found in zip(before.terms, terms, strict=True) if found is None]
        if bad:
            node.why = f"{before.name} reads {bad[0]}, which is no spikes of 0 and 1"
            continue
        node.op, node.inputs, node.why = "layer", [], ""
        node.terms = [t for t in terms if t is not None]
        node.bias, node.statics, node.side = before.bias, before.statics, before.side
        done.append(f"{node.name}: with {before.name}")
    net.drop_unread()
    return done


def _as_binary(net: Network, term: Term) -> Term | None:
    source = net.origin_of(term.source)
    if source.neurons is None or source.neurons.plain:
        return None
    ones = bool((source.neurons.amplitude == 1).all())
    return replace(term, source=source.name, binary=True) if term.binary or ones else None


def count_at_end(net: Network) -> list[str]:
    """Layers that only the answer reads count their spikes and write none."""
    done = []
    for node in net:
        users = net.users(node.name)
        if (
            node.op == "layer"
            and node.spikes
            and users
            and all(user.op == "count" for user in users)
        ):
            node.spikes = False
            done.append(f"{node.name}: counts only")
    return done


PASSES: dict[str, Pass] = {
    "constant_prefix": constant_prefix,
    "merge_scalers": merge_scalers,
    "fold_affine": fold_affine,
    "merge_residuals": merge_residuals,
    "split_concats": split_concats,
    "merge_pools": merge_pools,
    "fold_amplitudes": fold_amplitudes,
    "fuse_neurons": fuse_neurons,
    "count_at_end": count_at_end,
}
