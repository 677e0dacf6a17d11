"""``snnkernels sweep``: methods times numbers of steps over a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .datasets import add_data, data_options, load_data
from .networks import hash_of, load_model
from .output import add_command, print_table, progress_bar
from .pictures import new_figure, save_figure

__all__ = ["add_parser", "draw_curves"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``snnkernels``."""
    parser = add_command(
        commands,
        "sweep",
        "accuracy of conversion methods against the number of steps",
        "Converts a trained network with one method after the other and measures each after "
        "several numbers of steps. Rows go to OUT/sweep.csv as they are measured; the same command "
        "again measures what is missing. A table and OUT/sweep.png come last.",
        """
        snnkernels sweep small_cnn.safetensors --methods opi srp parallel --T 1 2 4 8
        snnkernels sweep vgg9.safetensors --data cifar10.npz --images 1000 --engine
        snnkernels sweep train.py:build --weights best.pt --data cifar10.npz --methods opi light
        snnkernels sweep vgg9.safetensors --methods opi:v_init=zero,threshold=max srp:probe=8
        """,
    )
    parser.add_argument(
        "network", nargs="+",
        help="checkpoint (.safetensors with its architecture), or entry as for convert",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="of a single entry, as for convert"
    )
    add_data(parser, default="digits")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="such as opi srp:probe=8 "
        "opi:v_init=zero,threshold=max (`snnkernels methods` lists them); by default all that the "
        "network can be converted by",
    )  # fmt: skip
    parser.add_argument("--T", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="T")
    parser.add_argument("--for-T", type=int, default=8, metavar="T", help="of thresholds from data")
    parser.add_argument("--images", type=int, metavar="N", help="test images; default: all")
    parser.add_argument("--calibration", type=int, default=1024, metavar="N")
    parser.add_argument("--batch-size", type=int, default=50, metavar="N")
    parser.add_argument(
        "--engine", action="store_true", help="run lowered: faster, the same up to rounding"
    )
    parser.add_argument("--out", type=Path, default=Path("snnkernels_sweep"), metavar="DIR")
    parser.add_argument("--no-plot", action="store_true")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from ..distributed.team import launched

    with launched() as group:
        return _sweep(args, group)


def _sweep(args: argparse.Namespace, group: Any) -> dict[str, Any]:
    from ..distributed.team import Team
    from ..sweep import curves, parse_trial, sweep, table

    if min([*args.T, args.for_T, args.calibration, args.batch_size, args.images or 1]) < 1:
        raise ValueError("numbers of steps and of images must be at least 1")
    if args.weights is not None and len(args.network) > 1:
        raise ValueError(f"--weights={args.weights} is for one entry, got {len(args.network)}")
    if not args.no_plot:
        try:
            new_figure(1, 1)  # a missing package is told before the work
        except ImportError as e:
            raise ImportError(f"{e}, or pass --no-plot") from e
    leads = Team(group).leads
    args.json = args.json and leads  # one document, not one of each rank
    trials = [parse_trial(text) for text in args.methods or _default_methods()]
    source, options = args.data or "digits", data_options(args)
    train = load_data(source, True, limit=args.calibration, options=options)
    test = load_data(source, False, limit=args.images, options=options)
    size = max(args.batch_size, 64)
    calibration = [train[i : i + size][0] for i in range(0, len(train), size)]
    everything = []
    figures = {}
    refusals = {}
    for network in args.network:
        given = load_model(network, args.weights)
        name = given.name
        # What was asked for by name must work; of all there are, some need another network.
        refused: dict[str, str] | None = None if args.methods else {}
        rows = sweep(
            given.model, test, calibration, trials, args.T,
            network=f"{name} {hash_of(given)[:12]}", data=test.name, for_T=args.for_T,
            batch_size=args.batch_size, engine=args.engine, store=args.out / "sweep.csv",
            progress=progress_bar,
            refused=refused, process_group=group,
        )  # fmt: skip
        if not leads:
            continue
        everything += rows
        for method, why in (refused or {}).items():
            refusals[f"{name}: {method}"] = why
            print(f"{name} is not converted by {method}: {why}", file=sys.stderr)
        if not rows:
            continue
        ann = float(rows[0]["ANN"])
        header, lines = table(rows)
        title = (
            f"{name}: accuracy (%) on {len(test)} test images of {test.name}; ANN "
            f"{100 * ann:.2f}; thresholds from data are for T = {args.for_T}"
        )
        print_table(title, header, lines)
        figures[name if name not in figures else network] = (curves(rows), ann)
    picture = args.out / "sweep.png" if figures and not args.no_plot else None
    if picture is not None:
        _picture(figures, picture)
        print(f"Picture: {picture}")
    if leads:
        print(f"Rows: {args.out / 'sweep.csv'}")
    return {
        "rows": everything, "refused": refusals, "csv": args.out / "sweep.csv", "picture": picture,
    }  # fmt: skip


def _default_methods() -> list[str]:
    from ..conversion.methods import METHODS

    return list(METHODS)


def _picture(figures: dict[str, tuple[dict[Any, Any], float]], path: Path) -> None:
    figure = new_figure(8.2 * len(figures), 4.6)
    axes = figure.subplots(1, len(figures), squeeze=False)[0]
    for ax, (name, (found, ann)) in zip(axes, figures.items(), strict=True):
        draw_curves(ax, found, ann, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, 130)


def draw_curves(ax: Any, found: dict[str, Any], ann: float, name: str) -> None:
    """The curves of one network (:func:`snnkernels.sweep.curves`)."""
    from .. import plots
    from ..sweep import added

    steps = sorted({T for curve in found.values() for T in curve})
    lines = {}
    for trial, curve in found.items():
        first = next(iter(curve.values()))
        label = trial if str(first["binary"]) == "True" else f"{trial} (not binary)"
        extra = added(curve)
        label += f" + {extra} steps" if extra != "0" else ""
        known = {T: float(row["accuracy"]) for T, row in curve.items()}
        lines[label] = [known.get(T, float("nan")) for T in steps]
    plots.accuracy_curve(steps, lines, ann=ann, ax=ax)
    ax.set_title(name, fontsize=10)
