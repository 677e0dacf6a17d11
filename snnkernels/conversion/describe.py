"""What a conversion did, said operation by operation."""

from __future__ import annotations

from torch import fx

from .graphs import module_of, name_of
from .kinds import Kind, before_neurons, kinds_of
from .ops import MAX_POOL_MODULES, why_not_affine
from .report import NodeReport, Report
from .thresholds import Site

__all__ = ["describe"]


def describe(
    report: Report,
    model: fx.GraphModule,
    sites: list[Site],
    folded: dict[str, str],
    pools: list[str],
    kept: dict[str, str],
    maxpool: str,
    means: bool = False,
) -> None:
    """One row for every operation of the ANN."""
    by_path = {site.path: site for site in sites}
    early = before_neurons(model, model.graph)
    report.rows += [NodeReport(name, f"batch norm {what}") for name, what in folded.items()]
    kinds = kinds_of(model, model.graph)  # the model holds a copy of the graph
    varying = {n for n, kind in kinds.items() if kind is Kind.TIME}
    analog = []
    for node in model.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        kind = kinds[node]
        name = name_of(node)
        if kind in (Kind.META, Kind.CONST) or name in folded:
            continue
        if name in by_path:
            site = by_path[name]
            report.rows.append(NodeReport(site.label, site.describe(), site.theta))
            continue
        module = module_of(model, node)
        if kind is Kind.STATIC:
            what = "once, before the neurons"
        elif node not in early:
            what = "once, on rates"
            reason = why_not_affine(node, model, varying) or ""
            if reason.endswith("is not affine") and not isinstance(node.target, type):
                analog.append(f"{name} ({reason.split()[0]})")
        elif name in kept and means:
            what = f"on running means, every step: {kept[name]}"
        elif node.meta.get("on_means"):
            what = "on running means, every step"
        elif name in kept:
            what = f"KEPT as it is, every step: {kept[name]}"
        elif isinstance(module, MAX_POOL_MODULES):
            what = f"every step, {maxpool} max-pool"
        else:
            what = "every step"
        if name in pools:
            what += ", max-pool averaged" if maxpool == "avg" else ", moved before its neurons"
        operation = type(module).__name__ if module is not None else _operation(node)
        report.rows.append(NodeReport(name, f"{operation}: {what}"))
    if kept and means:
        report.notes.append(
            f"{len(kept)} operation{'s' if len(kept) > 1 else ''} between neurons run"
            f"{'' if len(kept) > 1 else 's'} on running means at every step, exact in the mean "
            f"but not spiking: {', '.join(kept)}"
        )
    if analog:
        report.notes.append(
            f"{len(analog)} operation{'s' if len(analog) > 1 else ''} behind the last neurons "
            f"stay{'' if len(analog) > 1 else 's'} analog and run once, on rates: "
            + ", ".join(analog)
        )


def _operation(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
