"""``snnkernels explain``: what a conversion did, node by node, and what to do about its errors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .datasets import add_data, load_data, remembered
from .networks import load_saved
from .output import add_command, print_table

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "explain",
        "what a conversion did, where errors enter, what the engine makes of it",
        "Prints the report of a saved network: each node, its threshold, rate, error and the "
        "sources of that error, then the notes with what would remove the largest. --engine adds "
        "what every pass of the engine did and what each layer costs.",
        """
        snnkernels explain resnet_snn
        snnkernels explain resnet_snn --engine
        snnkernels explain resnet_snn --json | jq '.nodes[] | select(.error > 0.2) | .name'
        """,
    )
    parser.add_argument("folder", type=Path, help="of a saved network")
    parser.add_argument("--engine", action="store_true", help="the plan of the engine as well")
    add_data(parser, default="none: the engine is asked with the shape in convert.json")
    parser.set_defaults(run=_run)


def example_of(args: argparse.Namespace, about: dict[str, Any], snn: Any, batch: int) -> Any:
    """Inputs for the network: images of ``--data``, else noise of the shape in convert.json.

    Raises:
        ValueError: neither is known.
    """
    import torch

    if args.data is not None:
        images = load_data(args.data, False, limit=batch, options=remembered(about, args))
        return images[:batch][0]
    found = about.get("input")
    if not found:
        raise ValueError(
            f"--data is needed: {args.folder} does not say what its inputs look like (it was not "
            "written by `snnkernels convert` with --data)"
        )
    try:
        shape, dtype = [int(n) for n in found["shape"]], getattr(torch, found["dtype"])
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{args.folder / 'convert.json'} is damaged: input={found!r}") from e


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from ..engine import lower

    snn, about = load_saved(args.folder)
    report = snn.report
    header, *rows = report._table()
    print_table(f"{args.folder}: method {report.method}, T = {report.T}", header, rows, left=2)
    for note in report._notes():
        print(f"* {note}")
    document: dict[str, Any] = {
        "folder": args.folder, "method": report.method, "T": report.T,
        "nodes": [_node(row) for row in report.rows], "silent channels": report.silent_channels,
        "notes": report.notes, "engine": None,
    }  # fmt: skip
    if args.engine:
        found = lower(snn).explain(example_of(args, about, snn, 1))
        print(f"\nThe engine\n\n{found}")
        document["engine"] = {
            "not lowered": found.reason or None, "passes": found.passes,
            "layers": [vars(row) for row in found.layers], "packed bytes": found.arena,
        }  # fmt: skip
    return document


def _node(row: Any) -> dict[str, Any]:
    names = ("name", "action", "rate", "error", "clipping", "quantisation", "unevenness",
             "inherited")  # fmt: skip
    node = {name: getattr(row, name) for name in names}
    theta = row.threshold
    node["threshold"] = None if theta is None else [float(theta.min()), float(theta.max())]
    return node
