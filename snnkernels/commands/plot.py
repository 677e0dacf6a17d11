"""``snnkernels plot``: pictures of a sweep or of a saved network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .datasets import add_data, load_data, remembered
from .evaluate import source_of
from .networks import load_saved
from .output import add_command, positive
from .pictures import new_figure, save_figure

__all__ = ["add_parser"]

_FORMATS = (".png", ".svg", ".pdf")
_KINDS = {
    "accuracy": "accuracy against T, of a sweep's CSV or of convert.json",
    "energy": "accuracy against energy, of convert.json",
    "errors": "where the error of each layer enters",
    "correlation": "how well each layer's spikes follow the ANN",
    "activation": "answers against activations, one layer a panel",
    "rates": "histogram of firing rates, by layer (runs on --data)",
    "raster": "spikes of a layer for one image (runs on --data)",
    "membrane": "membrane potentials of a layer's busiest neurons (runs on --data)",
    "layers": "energy of each layer, beside the ANN's (runs on --data)",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plot",
        "pictures of a sweep or of a saved network: png, svg, pdf",
        "Draws the CSV of a sweep, or a folder that `snnkernels convert` wrote.",
        """
        snnkernels plot snnkernels_sweep/sweep.csv --out sweep.pdf
        snnkernels plot resnet_snn --kind errors --out errors.svg
        snnkernels plot resnet_snn --kind raster --layer blocks.2.relu1 --data photos
        """,
    )
    parser.add_argument("source", type=Path, help="sweep.csv, or the folder of a saved network")
    parser.add_argument(
        "--kind", choices=tuple(_KINDS), metavar="KIND",
        help="; ".join(f"{name}: {what}" for name, what in _KINDS.items())
        + ". Default: accuracy of a sweep, errors of a folder",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=".png, .svg or .pdf; default: KIND.png"
    )
    parser.add_argument("--layer", metavar="NAME", help="for raster, membrane, activation")
    parser.add_argument("--image", type=int, default=0, metavar="I", help="for raster, membrane")
    parser.add_argument("--T", type=positive, help="number of steps; default: the network's")
    parser.add_argument("--images", type=positive, default=32, metavar="N", help="for rates")
    parser.add_argument("--dpi", type=positive, default=150)
    add_data(parser, default="that of convert.json")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    kind = args.kind or ("accuracy" if args.source.is_file() else "errors")
    out = args.out or Path(f"{kind}.png")
    if out.suffix not in _FORMATS:
        raise ValueError(f"--out={out}: the name must end in {', '.join(_FORMATS)}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out={out}: its folder does not exist")
    new_figure(1, 1)  # a missing package is told before the work
    if args.source.is_file():
        if kind != "accuracy":
            raise ValueError(f"--kind={kind}: a sweep's CSV has accuracy only")
        figure = _sweep(args.source)
    else:
        args.folder = args.source
        snn, about = load_saved(args.source)
        figure = _of_network(args, kind, snn, about)
    save_figure(figure, out, args.dpi)
    print(f"Picture: {out}")
    return {"source": args.source, "kind": kind, "picture": out, "bytes": out.stat().st_size}


def _sweep(path: Path) -> Any:
    import csv

    from ..sweep import COLUMNS, curves
    from .sweep import draw_curves

    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise ValueError(f"{path} is not the CSV of a sweep: it needs {', '.join(COLUMNS)}")
    networks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        about = ", ".join((row["network"], row["data"], f"{row['images']} images"))
        networks.setdefault(f"{about}, for T = {row['for T']}", []).append(row)
    figure = new_figure(8.2 * len(networks), 4.6)
    axes = figure.subplots(1, len(networks), squeeze=False)[0]
    for ax, (name, part) in zip(axes, networks.items(), strict=True):
        try:
            draw_curves(ax, curves(part), float(part[0]["ANN"]), name)
        except (ValueError, ZeroDivisionError) as e:
            raise ValueError(f"{path} has a row that is no measurement: {e}") from e
    return figure


def _of_network(args: argparse.Namespace, kind: str, snn: Any, about: dict[str, Any]) -> Any:
    from .. import metrics, plots

    report = snn.report
    layers = [row for row in report.rows if row.error is not None and row.threshold is not None]
    if kind in ("accuracy", "energy"):
        return _measured(args, kind, about)
    if kind == "errors":
        figure = new_figure(6.6, 0.3 * max(len(layers), 2) + 1.3)
        plots.error_sources(report, ax=figure.subplots())
        return figure
    if kind == "correlation":
        figure = new_figure(max(4.6, 0.42 * len(layers) + 1.4), 3.6)
        plots.correlations(report, ax=figure.subplots())
        return figure
    if kind == "activation":
        return _activation(args, report)
    images = load_data(
        source_of(args, about), False, limit=max(args.images, args.image + 1),
        options=remembered(about, args),
    )  # fmt: skip
    x = images[: args.images][0]
    if kind == "rates":
        rates = metrics.firing_rates(snn, x, T=args.T, per="neuron")
        figure = new_figure(6.8, max(3.6, 0.3 * len(rates) + 1.1))
        plots.rate_histogram(rates, ax=figure.subplots())
        return figure
    if kind == "layers":
        found = metrics.synaptic_operations(snn, x, T=args.T)
        figure = new_figure(6.6, 0.36 * len({row.name for row in found.layers}) + 1.3)
        plots.energy_layers(found, ax=figure.subplots())
        return figure
    return _one_layer(args, kind, snn, images)


def _measured(args: argparse.Namespace, kind: str, about: dict[str, Any]) -> Any:
    from .. import plots

    measured = about.get("accuracy") or {}
    rows = [row for row in measured.get("rows", []) if row.get("accuracy") is not None]
    if not rows:
        raise ValueError(
            f"{args.source} has no accuracies: convert with --data and --images, or plot a sweep"
        )
    accuracies, ann = [row["accuracy"] for row in rows], measured.get("ANN")
    figure = new_figure(5.4, 3.8)
    if kind == "accuracy":
        plots.accuracy_curve([row["T"] for row in rows], accuracies, ann=ann, ax=figure.subplots())
        return figure
    plots.accuracy_energy(
        [row["energy pJ"] / 1e6 for row in rows], accuracies, steps=[row["T"] for row in rows],
        ann=None if ann is None else (rows[0]["ANN energy pJ"] / 1e6, ann), ax=figure.subplots(),
    )  # fmt: skip
    return figure


def _activation(args: argparse.Namespace, report: Any) -> Any:
    from .. import plots

    rows = [row for row in report.rows if row.points is not None]
    if args.layer is not None:
        known = [row.name for row in rows]
        rows = [row for row in rows if row.name == args.layer]
        if not rows:
            raise ValueError(f"--layer={args.layer} is none of {', '.join(known)}")
    if not rows:
        raise ValueError(f"{args.source} has no sample of activations: convert with --data")
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = new_figure(3.2 * columns, 3.2 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax, row in zip(axes, rows, strict=False):
        plots.rate_activation(row.points[0], row.points[1], title=row.name, ax=ax)
    for ax in axes[len(rows) :]:
        ax.set_visible(False)
    return figure


def _one_layer(args: argparse.Namespace, kind: str, snn: Any, images: Any) -> Any:
    import torch

    from .. import plots

    layers = dict(snn.neurons())
    name = args.layer or list(layers)[-1]
    if name not in layers:
        raise ValueError(f"--layer={name} is none of {', '.join(layers)}")
    if not 0 <= args.image < len(images):
        raise ValueError(f"--image={args.image}: there are images 0 to {len(images) - 1}")
    T = args.T or snn.T
    spikes, v = _record(snn, layers[name], images[args.image : args.image + 1][0], T)
    # The busiest neurons, in order: silent rows would take the space.
    total = (spikes != 0).sum(0)
    order = total.sort(stable=True).indices
    active = order[int((total == 0).sum()) :] if bool(total.any()) else order
    if kind == "raster":
        figure = new_figure(7.0, 4.2)
        ax = figure.subplots()
        title = f"{name}, image {args.image}, {min(64, len(active))} busiest neurons"
        plots.raster(spikes[:, active[-64:]], ax, title=title)
        ax.set_ylabel("neuron, by number of spikes")
        return figure
    if v is None:
        raise ValueError(
            f"--layer={name}: neurons of {snn.report.method} have no membranes to draw"
        )
    chosen = active[torch.linspace(0, len(active) - 1, min(3, len(active))).long()]
    figure = new_figure(7.4, 3.4)
    ax = plots.membrane(
        v[:, chosen], 1.0, spikes=spikes[:, chosen], labels=[f"neuron {int(i)}" for i in chosen],
        ax=figure.subplots(),
    )  # fmt: skip
    ax.set_ylabel("membrane potential, in θ")
    ax.set_title(f"{name}, image {args.image}", fontsize=10, loc="left")
    return figure


def _record(snn: Any, layer: Any, x: Any, T: int) -> tuple[Any, Any]:
    """Spikes ``[rows, neurons]`` of a layer, and its membranes in thresholds or None."""
    import copy

    import torch

    from ..conversion.spiking import per_channel_view, split_time

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []
    handles = [
        layer.node.register_forward_pre_hook(
            lambda node, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        ),
        layer.register_forward_hook(lambda module, args, out: outputs.append(out)),
    ]
    try:
        with torch.no_grad():
            snn(x, T=T)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != 1:  # a layer with a forward of its own
        if layer.clock.steps.parallel:
            raise ValueError(
                f"neurons of {snn.report.method} run all steps at once: there is no time to draw"
            )
        (out,) = outputs
        return split_time(out, snn._clock.steps.rows(T)).flatten(1), None
    node = copy.deepcopy(layer.node)
    node.output, node.store_v_seq = "spikes", True
    node.reset()
    with torch.no_grad():
        ((args, kwargs),) = calls
        spikes = node(*args, **kwargs)
    theta = per_channel_view(torch.as_tensor(node.threshold), layer.channel_dim, spikes.dim() - 1)
    return spikes.flatten(1), (node.v_seq / theta.to(node.v_seq)).flatten(1)
