"""Checks on data: the graph computes what the ANN computes, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import ConversionError
from .graphs import name_of
from .inputs import Inputs, tree_map
from .inputs import leaves as everything
from .kinds import Kind, before_neurons, is_activation

__all__ = [
    "answer_of",
    "check_independent",
    "check_same",
    "leaves",
    "note_shapes",
    "relative_error",
]


def leaves(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output (tensor, tuple, list, mapping, dataclass), each with its name."""
    return ((key, part) for key, part in everything(value, name) if isinstance(part, Tensor))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Root mean square of ``value - reference`` over that of ``reference``."""
    if value.shape != reference.shape:
        return float("inf")
    difference, size = (value.double() - reference.double()).norm(), reference.double().norm()
    if not bool(size > 0):
        return 0.0 if not bool(difference > 0) else float("inf")
    return float(difference / size)


def _rounding(dtype: torch.dtype) -> float:
    """How far two ways to compute a network may be apart, relative: rounding, amplified."""
    return {torch.float16: 0.03, torch.bfloat16: 0.1}.get(dtype, 2e-3)


@torch.no_grad()
def answer_of(
    ann: nn.Module,
    batch: Tensor | Inputs,
    sample: Tensor | Inputs,
    call: Callable[[nn.Module, Any], Any] = lambda ann, x: ann(x),
) -> Any:
    """The ANN's own output on ``sample``, the first inputs of ``batch``; ``call`` calls it.

    Raises:
        ConversionError: the ANN fails on it; says whether the loader or a fixed batch size is why.
    """
    try:
        return call(ann, sample)
    except Exception as error:
        why = (
            "loader must yield batches of inputs, [B, *], as tensors or (input, anything), of the "
            "shape and dtype the network takes"
        )
        if len(sample) < len(batch):
            try:
                call(ann, batch)
            except Exception:
                pass
            else:
                why = (
                    f"it runs on {len(batch)} inputs, so it assumes its batch size. Write "
                    "view(x.shape[0], ...), or flatten(1), in its forward"
                )
        devices = sorted({str(t.device) for t in (*ann.parameters(), *ann.buffers())})
        if len(devices) > 1:
            why = f"ann has tensors on {' and '.join(devices)}: move all of it, ann.to(device)"
        raise ConversionError(
            f"the network itself fails on inputs of shape {tuple(sample.shape)}, {sample.dtype}, "
            f"from the loader's first item: {type(error).__name__}: {error}; {why}"
        ) from error


class _Shapes(fx.Interpreter):
    """Runs a graph once and notes the shape of every tensor."""

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n`` and keep its shape in ``n.meta``; several tensors are noted as such."""
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["shape"] = tuple(out.shape)
        elif isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out):
            n.meta["tensor_list"] = True
        return out


@torch.no_grad()
def note_shapes(net: nn.Module, graph: fx.Graph, sample: Tensor | Inputs) -> Any:
    """Run ``graph`` on ``sample``; shapes go to ``node.meta["shape"]``. Returns the output."""
    return _Shapes(net, graph=graph).run(sample)


def check_same(expected: Any, got: Any) -> str | None:
    """Compare the graph's output with the ANN's; returns a note if rounding is amplified.

    Raises:
        ConversionError: they differ by more than rounding explains.
    """
    found = dict(leaves(got))
    note = None
    for name, value in leaves(expected):
        error = relative_error(found[name], value) if name in found else float("inf")
        allowed = _rounding(value.dtype)
        if error > 5 * allowed:
            raise ConversionError(
                f"the traced and normalised network does not compute what the network computes: "
                f"{name} differs by {error:.2%} on the loader's first inputs. Its forward does "
                "something tracing cannot see (a value computed from the data, a number drawn at "
                "random, a hook or a patched method); move that into plain operations"
            )
        if error > allowed:
            note = (
                f"{name} of the normalised network differs from the ANN's by {error:.2%} before "
                "any neuron is placed: rounding, amplified by the network"
            )
    return note


def _part(value: Any, samples: int, first: int, last: int) -> Any:
    """Samples ``first`` to ``last`` of a value computed from ``samples``."""

    def rows(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] % samples:
            return t
        each = t.shape[0] // samples
        return t[first * each : last * each]

    return tree_map(value, rows)


def _two(value: Any) -> Any:
    """A second sample beside the only one there is."""

    def two(t: Tensor) -> Tensor:
        if t.dim() == 0:
            return t
        return torch.cat([t, t / 2 if t.is_floating_point() else t])

    return tree_map(value, two)


@torch.no_grad()
def check_independent(
    net: nn.Module, graph: fx.Graph, kinds: dict[fx.Node, Kind], sample: Tensor | Inputs
) -> None:
    """Check that what lies between neurons treats the samples of a batch one by one.

    There it runs on ``[T * B, *]``, so it has to. What runs once, before or after the neurons,
    sees the batch as the ANN does and is free.

    Raises:
        ConversionError: two samples together give something else than one at a time, or fail;
            names the first operation where that is so.
    """
    needed = before_neurons(net, graph) | {n for n in graph.nodes if is_activation(net, n)}
    whole = fx.Interpreter(net, graph=graph, garbage_collect_values=False)
    whole.run(sample)
    samples = len(sample)
    still = {n: whole.env[n] for n, kind in kinds.items() if kind is Kind.STATIC and n in needed}
    if samples == 1:
        still, samples = {n: _two(v) for n, v in still.items()}, 2

    def run(first: int, last: int) -> dict[fx.Node, Any]:
        runner = fx.Interpreter(net, graph=graph, garbage_collect_values=False)
        for node in graph.nodes:
            if node in still:
                runner.env[node] = _part(still[node], samples, first, last)
            elif node in needed:
                try:
                    runner.env[node] = runner.run_node(node)
                except Exception as error:
                    raise ConversionError(
                        f"{name_of(node)} fails on a batch of {last - first}: {error}. It assumes "
                        "its batch size, but between neurons it runs on all time steps at once. "
                        "Write view(x.shape[0], ...), or flatten(1)"
                    ) from error
        return runner.env

    both, one, other = run(0, 2), run(0, 1), run(1, 2)
    differing = [
        node
        for node in graph.nodes
        if node in needed and kinds[node] is Kind.TIME and isinstance(both[node], Tensor)
        if _differ(both[node], one[node], other[node])
    ]
    if any(is_activation(net, node) for node in differing):
        raise ConversionError(
            f"{name_of(differing[0])} mixes the samples of a batch: for two samples together it "
            "gives something else than for one at a time, and spiking neurons follow it. Between "
            "neurons dimension 0 must stay the batch; let it act on the other dimensions"
        )


def _differ(both: Tensor, one: Tensor, other: Tensor) -> bool:
    if both.dim() == 0 or one.shape[1:] != both.shape[1:] or other.shape[1:] != both.shape[1:]:
        return True
    if not both.is_floating_point():
        return not torch.equal(both, torch.cat([one, other]))
    return relative_error(torch.cat([one, other]), both) > 5 * _rounding(both.dtype)
