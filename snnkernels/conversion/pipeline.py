"""The pipeline: trace, normalise, find activations, calibrate, place neurons, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..distributed.dealing import check_call
from ..distributed.team import Team
from .balancing import Balancing, balance
from .calibration import SAMPLE, Statistics, collect
from .channels import channels_of
from .context import Context
from .describe import describe
from .errors import ConversionError
from .fit import fit_starts
from .fold import fold_batch_norm
from .graphs import add_module, copy_graph, first_input
from .kinds import check_supported, is_activation, kinds_of
from .marks import mark
from .methods import METHODS, Method, find_method
from .methods.base import check_steps
from .network import ConvertedNetwork, _steps
from .ops import Activation
from .parts import cut
from .place import place
from .pools import MAXPOOL_MODES, average_instead, check_pools, pools_first
from .report import Report, measure
from .scale import Scale, fold_thresholds
from .source import Source
from .steps import Clock
from .thresholds import Site, plan, settle
from .trace import own_copy, trace
from .verify import answer_of, check_independent, check_same, note_shapes

__all__ = ["convert", "methods"]


def methods() -> list[dict[str, Any]]:
    """The conversion methods, each a dictionary.

    ``name``; ``source`` (the paper); ``needs`` (training, data, extra steps); ``trains`` (the
    activation that networks for it are trained with, or ""); ``options`` (of its class, with their
    defaults); ``binary`` (whether spikes are 0 and 1: the T of others does not compare).
    """
    return [
        {
            "name": m.name,
            "source": m.source,
            "needs": m.needs,
            "trains": m.trains,
            "options": {f.name: f.default for f in fields(m)},
            "binary": m.binary,
        }
        for m in METHODS.values()
    ]


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")


def convert(
    ann: nn.Module,
    loader: Any = None,
    *,
    inputs: Callable[[Any], Any] | None = None,
    method: str | Method = "opi",
    T: int = 16,
    threshold: Any = None,
    per_channel: bool | None = None,
    v_init: Any = None,
    maxpool: str = "cumulative",
    on_unsupported: str = "error",
    normalize: str = "threshold",
    fold: bool = True,
    progress: bool = True,
    process_group: Any = None,
    checkpoint: Any = None,
) -> ConvertedNetwork:
    """Convert a trained network into a spiking one; ``ann`` is not modified.

    Example::

        snn = snnkernels.convert(ann, loader, T=16)
        with torch.no_grad():  # without it, calls take the slower path that training needs
            logits = snn(images)
        print(snn.report)

    On the loader's first inputs the traced network is compared with ``ann`` before any neuron is
    placed, and the last row of the report is the error of the spiking network's answer against
    ``ann``'s own. Forward hooks are not called and not converted (the report names their modules),
    except those of pruning, weight_norm and spectral_norm, whose weights are computed once.

    Args:
        ann: maps ``[B, *]`` to its output; the first dimension is the batch. Any device.
        loader: calibration inputs: an iterable of tensors or of (input, anything), or one tensor.
            Not needed where thresholds are learned (``ClipReLU``, ``QCFS``) or given.
        inputs: a function from an item of the loader to the network's inputs, if that is more than
            one tensor: a tensor, a tuple of the inputs by position, or a dict of them by name, such
            as ``lambda item: item[:2]``. An input is a tensor ``[B, *]``, or a tuple, list or dict
            of such; numbers, None and other constants keep their value in the converted network, as
            do parameters of ``forward`` that are not given. None: the tensor, or the first of a
            tuple. Without a loader, all required parameters are inputs.
        method: a name of :func:`methods`, or one of :mod:`snnkernels.conversion.methods` with
            options of its own, such as ``SRP(probe=8)``.
        T: number of time steps the thresholds are made for, and the default of ``snn(x)``.
        threshold: None (the method's own: for opi the learned ceiling if there is one, else
            "mmse"), ``"mmse"``, ``"max"``, ``"kl"``, ``"ltb"`` (or a ``Balancing`` of
            :mod:`snnkernels.conversion.methods`, with options), a percentile such as ``"99.9%"``, a
            number, a tensor (scalar or one value for each channel), or a dict from activation name
            to one of these.
        per_channel: thresholds from data per channel (True) or per layer; None: the method's own.
        v_init: initial potential: None (the method's own), ``"half"`` (θ/2, follows θ),
            ``"zero"``, a part of θ such as ``"25%"``, ``"uniform"`` or ``"normal"`` (drawn for each
            neuron, from data's shapes), ``"mse"`` (the part of each channel that brings the spiking
            layer nearest to the ANN's), a number or a tensor (scalar, per channel or of the layer's
            shape) in the units of the current, or a dict.
        maxpool: ``"cumulative"`` (exact in the mean at every T), ``"pre_spike"`` (maximum of the
            currents of each step) or ``"avg"`` (replaced by average pooling: a different ANN).
        on_unsupported: what becomes of an operation between neurons that is not affine (a product
            of two values that spike, a sigmoid, a layer norm): ``"error"``; ``"mean"`` to apply it
            to running means at every step, so that the mean of what it emits is exact at every T
            (:mod:`snnkernels.conversion.means`): right for squeeze-and-excite gates and attention,
            but no spiking operation; ``"keep"`` to apply it to the spikes of every step as it is.
            The report names it.
        normalize: ``"threshold"`` (spikes weigh θ) or ``"weights"`` (θ folded into the weights,
            every threshold 1); equal up to rounding.
        fold: fold batch norms into the weights before them; False leaves them where they are,
            which is equal up to rounding and keeps the ANN's own bits.
        progress: show a tqdm bar while calibrating, if tqdm is installed (of ranks, on the first).
        process_group: of torch.distributed, such as ``torch.distributed.group.WORLD`` under
            torchrun: every member makes the same call and gets the same network, with the bits
            that one process would have made. Batches of calibration are dealt to the ranks whole;
            what follows them in order or looks at a few (``"ltb"``, ``v_init="mse"``, ``"light"``,
            ``"advanced"``) runs on every rank alike. See :mod:`snnkernels.distributed`. None: this
            process alone, whatever else is running.
        checkpoint: path of a file in which statistics of the calibration data are kept as they
            come, every few minutes: the same call after a kill goes on from there, with any number
            of ranks, and one for another T or rule starts from all of them. The loader must give
            the same batches again. None: nothing is kept.

    Returns:
        The spiking network; ``snn(x)``, ``snn(x, T=...)``, ``snn.predict_curve``, ``snn.report``.

    Raises:
        ConversionError: the network cannot be converted; names the layer, why, and the way out.
        ValueError, TypeError: an argument is not allowed, or not the same on every rank; names it.
    """
    if not isinstance(ann, nn.Module):
        raise TypeError(f"ann must be a torch.nn.Module, got {type(ann).__name__}")
    chosen, T = find_method(method), _steps(T)
    check_steps(chosen, T)
    _one_of("maxpool", maxpool, MAXPOOL_MODES)
    _one_of("on_unsupported", on_unsupported, ("error", "keep", "mean"))
    _one_of("normalize", normalize, ("threshold", "weights"))
    if not (per_channel is None or isinstance(per_channel, bool)):
        raise TypeError(f"per_channel={per_channel!r} must be True, False or None")
    report = Report(str(chosen), T)
    if chosen.steps().extra:
        report.notes.append(
            f"{chosen.name} adds {chosen.steps().extra} steps to every T: count them in latency "
            "and energy"
        )
    if not chosen.binary:
        report.notes.append(
            f"spikes of {chosen.name} are not only 0 and 1: its T does not compare with the T of "
            "binary methods"
        )

    if inputs is not None and not callable(inputs):
        raise TypeError(
            "inputs must be a function from an item of the loader to the network's inputs, got "
            f"{type(inputs).__name__}"
        )
    team = Team(process_group)
    same = (threshold, v_init, per_channel, maxpool, on_unsupported, normalize, fold)
    check_call(team, ann, str(chosen), T, *same)
    first: Any = None
    source: Source | None = None
    if loader is not None:
        in_order = _in_order(threshold, chosen)
        source = Source(
            loader, _device(ann), inputs, team, checkpoint=checkpoint, in_order=in_order
        )
        first = source.first
    traced = trace(ann, first)
    net, graph, ports = traced.net, traced.graph, traced.ports
    behind = chosen.behind()
    if behind is not None:
        _append(net, graph, behind, chosen)
    if traced.hooked:
        report.notes.append(
            f"forward hooks of {', '.join(traced.hooked)} were not called: what they change is "
            "neither in this network nor in the ANN of the errors; put it into forward"
        )
    batch: Any = None
    sample, expected, failure = None, None, None
    if source is not None:
        source.bind(ports.bind)
        batch = source.first
        sample = batch[:SAMPLE]
        try:
            expected = answer_of(own_copy(ann, share=True)[0], batch, sample, ports.call)
            expected = expected if behind is None else behind(expected)
            check_same(expected, note_shapes(net, graph, sample))
        except ConversionError as error:
            failure = error  # what the graph alone tells comes first: it says more
    folded = fold_batch_norm(net, graph) if fold else {}
    mark(net, graph)
    check_pools(net, graph)
    unpooled = fx.GraphModule(net, copy_graph(graph)).eval()
    pools = average_instead(net, graph) if maxpool == "avg" else pools_first(net, graph)
    if maxpool == "avg" and pools:
        report.notes.append(
            "max-pools were replaced by average pools: errors of neurons are against that network, "
            "those of the answer against the ANN"
        )
    paths = [str(node.target) for node in graph.nodes if is_activation(net, node)]
    activations: dict[str, Activation] = {p: net.get_submodule(p) for p in paths}  # type: ignore
    kinds = kinds_of(net, graph)
    keep, means = on_unsupported == "keep", on_unsupported == "mean"
    kept = check_supported(net, graph, kinds, keep, means)
    if failure is not None:
        raise failure
    if kept and chosen.steps().bias != "every":
        name, reason = next(iter(kept.items()))
        raise ConversionError(
            f"{name}: {reason}; method={str(chosen)!r} has the constant terms of the layers act at "
            f"other steps than their spikes, which takes affine operations: "
            f"on_unsupported={on_unsupported!r} cannot be combined with it, but with a method "
            "whose input comes at every step, such as 'opi'"
        )
    model = fx.GraphModule(net, copy_graph(graph)).eval()

    memo: dict[fx.Node, Any] = {}
    channels = {
        str(node.target): channels_of(net, first_input(node), memo)
        for node in graph.nodes
        if is_activation(net, node)
    }
    sites = plan(activations, chosen, threshold, per_channel, v_init, channels)
    needy = [site for site in sites if site.needs_data]
    if loader is None and needy:
        raise ValueError(
            f"loader is None, but threshold={needy[0].rule!r} for {needy[0].label} needs "
            "calibration data: pass loader= (an iterable of input batches, or one tensor), "
            "give threshold= as numbers, or train with ClipReLU or QCFS"
        )
    seen: dict[str, Statistics] = {}
    if source is not None and sample is not None:
        how = {s.path: (s.per_channel if s.needs_histogram else None, s.channel_dim) for s in sites}
        once = not any(site.needs_histogram for site in sites)
        source.belongs_to(model)
        seen = collect(model, how, source, progress=progress, once=once)
        unread = chain([batch], source.rest()) if once else None
        _balance(model, sites, unread, source.again, report, progress and team.leads)
        with torch.no_grad():
            note = check_same(expected, (unpooled if maxpool == "avg" else model)(sample))
        if note is not None:
            report.notes.append(note)
        try:
            check_independent(net, graph, kinds, sample)
        except ConversionError as error:
            if not kept or means:
                raise
            report.notes.append(str(error))
    for site in sites:
        settle(site, seen.get(site.path), chosen.levels_of(site, T), _dtype(net))
        if site.silent:
            report.notes.append(f"{site.label} never fired on the calibration data: θ = 1")
        elif site.borrowed:
            report.silent_channels[site.label] = site.borrowed
        if site.rare:
            report.notes.append(
                f"{site.label}: the {site.rule} percentile of channels {site.rare} is 0; they took "
                "the layer's threshold"
            )

    again = None if source is None else source.again
    context = Context(model, sites, seen, T, sample, again, report, progress and team.leads, source)
    chosen.settle(context)
    clock = Clock(chosen.steps())
    spiking_graph, spiking_kinds = graph, kinds
    if normalize == "weights":
        theta = {s.path: Scale(s.theta, s.channel_dim) for s in sites}
        spiking_graph = fold_thresholds(net, graph, kinds, theta, sample)
        spiking_kinds = kinds_of(net, spiking_graph)
    weights = normalize == "weights"
    neurons = {site.path: place(site, chosen, T, weights, clock) for site in sites}
    parts = cut(net, spiking_graph, spiking_kinds, neurons, cumulative=maxpool == "cumulative")
    describe(report, model, sites, folded, pools, kept, maxpool, means)
    snn = ConvertedNetwork(parts, T, report, clock, ports)
    device = _device(net)
    if device is not None:
        snn.to(device)
    fit_starts(snn, context)
    chosen.finish(snn, context)
    team.align(snn)
    if sample is not None:
        measure(snn, model, sample, expected, report)
    return snn


def _in_order(threshold: Any, method: Method) -> bool:
    """Whether a rule of the conversion follows the batches one after the other."""
    given = list(threshold.values()) if isinstance(threshold, dict) else [threshold]
    rules = [*given, method.threshold]
    return any(isinstance(r, Balancing) or (isinstance(r, str) and r == "ltb") for r in rules)


def _append(net: nn.Module, graph: fx.Graph, module: nn.Module, method: Method) -> None:
    """Put ``module`` behind the answer of ``graph``."""
    output = next(n for n in graph.nodes if n.op == "output")
    answer = output.args[0]
    if not isinstance(answer, fx.Node):
        raise ConversionError(
            f"method={method.name!r} puts neurons behind the network's answer, which must be one "
            f"tensor; this is a {type(answer).__name__}. Turn the method's option off"
        )
    path = add_module(net, "spiking_output", module)
    with graph.inserting_before(output):
        appended = graph.call_module(path, (answer,))
    output.args = (appended,)


def _balance(
    model: fx.GraphModule,
    sites: list[Site],
    first: Iterator[Tensor] | None,
    again: Callable[[], Iterator[Tensor]],
    report: Report,
    progress: bool,
) -> None:
    """Grow the thresholds of the sites whose rule is a Balancing, if there are any."""
    wanted = {
        s.path: (s.rule, s.per_channel, s.channel_dim)
        for s in sites
        if isinstance(s.rule, Balancing)
    }
    if not wanted:
        return
    thetas, done = balance(model, wanted, first, again, progress=progress)
    for site in sites:
        site.grown = thetas.get(site.path)
    asked = max(rule.updates for rule, *_ in wanted.values())
    if done < asked:
        report.notes.append(
            f"the loader can be read only once: thresholds were balanced on {done} batches instead "
            f"of {asked}"
        )


def _device(net: nn.Module) -> torch.device | None:
    return next((t.device for t in (*net.parameters(), *net.buffers())), None)


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
