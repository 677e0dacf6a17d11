"""Where a plan's time goes, layer by layer, beside what its cost model predicts.

The one file here that looks inside a plan.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import short
from network_rivals import plan_of
from networks import Subject
from torch import fx

from snnkernels.conversion.spiking import SpikingActivation
from snnkernels.engine.cost import cost_of
from snnkernels.engine.layers import SpikingLayer

Row = dict[str, Any]


class _Clock(fx.Interpreter):
    """Runs a graph and gives each layer of neurons the time since the last one."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[str, float] = {}
        self.since = 0.0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.since = time.perf_counter()
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module":
            layer = self.module.get_submodule(str(n.target))
            if isinstance(layer, (SpikingActivation, SpikingLayer)):
                now = time.perf_counter()
                self.seconds[n.name] = self.seconds.get(n.name, 0.0) + now - self.since
                self.since = now
        return result


def _clocked(body: fx.GraphModule, run: Callable[[], object]) -> dict[str, float]:
    """Seconds of a body's layers and of all in one call of ``run``."""
    clock = _Clock(body)
    plain = body.forward
    body.forward = clock.run
    try:
        start = time.perf_counter()
        run()
        clock.seconds[_ALL] = time.perf_counter() - start
    finally:
        body.forward = plain
    return clock.seconds


_ALL, _REST = "(all)", "(the rest)"


def layer_rows(subject: Subject, batch: int, T: int, precision: str, rounds: int) -> list[Row]:
    """A row per layer of a plan: shares of its time, measured over predicted, and operations."""
    x = subject.batch(batch)
    plan, note = plan_of(subject, precision)
    plan(x, T=T)
    built = plan._plan(x)
    net = built.net.copy()
    net.rates = {**net.rates, **subject.rates}  # measured on the images that run
    runs = {
        "plan": partial(_clocked, built.body, lambda: plan(x, T=T)),
        "unlowered": partial(_clocked, subject.snn.body, lambda: subject.snn(x, T=T)),
    }
    times: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    with torch.no_grad():
        subject.snn(x, T=T)
        for _ in range(rounds):
            for name, run in runs.items():
                for layer, seconds in run().items():
                    times[name].setdefault(layer, []).append(seconds)
    took, was = (
        {layer: statistics.median(values) for layer, values in times[name].items()} for name in runs
    )
    cores = batch * T / torch.get_num_threads()
    total = took.pop(_ALL)
    head = {"network": subject.name, "batch": batch, "T": T, "precision": precision}
    rows: list[Row] = []
    predicted_all = synaptic_all = macs_all = 0.0
    spiking = {node.name: node for node in net if node.neurons is not None}
    for node in spiking.values():
        # The module of a layer may have another name than its node: a dot is none in a path.
        seconds = took.pop(node.name.replace(".", "_"), 0.0)
        cost = cost_of(net, node) if node.terms else None
        layer = node.op == "layer"
        label = node.neurons.module.label if node.neurons is not None else ""
        how = ("packed" if node.terms else "constant current") if layer else "as it was"
        row: Row = {**head, "layer": label, "runs": how, "size": "x".join(map(str, node.size))}
        reads = [net.origin_of(term.source) for term in node.terms]
        row["input rate"] = short(max(map(net.rate, reads))) if reads else ""
        row["rate"] = short(subject.rates.get(label, 0.0))
        row["share"] = short(seconds / total)
        if cost is not None:
            predicted_all += cost.packed * cores
            synaptic_all += cost.synaptic * T
            macs_all += cost.dense_macs
            row["measured / predicted"] = short(seconds / (cost.packed * cores)) if layer else ""
            if node.name in was:
                row["dense, measured / predicted"] = short(was[node.name] / (cost.dense * cores))
            row["synaptic operations"] = short(cost.synaptic * T)
            row["dense MACs"] = short(cost.dense_macs)
        if node.name in was and seconds:
            row["unlowered / plan"] = short(was[node.name] / seconds)
        row["note"] = node.why or note
        rows.append(row)
    known = sum(float(r["share"]) for r in rows)
    rest = {**head, "layer": _REST, "runs": "input, answer, overhead"}
    rows.append({**rest, "share": short(1 - known), "note": ", ".join(took)})
    all_layers = sum(float(r["share"]) for r in rows if r.get("measured / predicted", "") != "")
    rows.append(
        {
            **head, "layer": _ALL, "rate": short(subject.rate), "share": 1.0,
            "measured / predicted": short(all_layers * total / predicted_all)
            if predicted_all else "",
            "synaptic operations": short(synaptic_all), "dense MACs": short(macs_all),
            "unlowered / plan": short(was[_ALL] / total),
        }
    )  # fmt: skip
    return rows
