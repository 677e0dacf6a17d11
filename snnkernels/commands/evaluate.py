"""``snnkernels eval``: accuracy, latency, spikes and energy of a saved network."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import Any

from .datasets import add_data, load_data, remembered
from .networks import add_device, load_saved
from .output import add_command, percent, positive, print_table

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "eval",
        "accuracy, latency, spikes and energy of a saved network",
        "Runs a network that `snnkernels convert` or save_pretrained wrote over test images. "
        "Options of a folder of images that were given to convert are taken from convert.json. "
        "Energy is that of the arithmetic alone (45 nm: 0.9 pJ an addition, 4.6 pJ a multiply-add; "
        "Horowitz, ISSCC 2014), counted on the first 16 images.",
        """
        snnkernels eval digits_snn --data digits
        snnkernels eval resnet_snn --data photos --T 1 2 4 8 --engine
        snnkernels eval resnet_snn --data new_photos --predict predictions.csv
        """,
    )
    parser.add_argument("folder", type=Path, help="of a saved network")
    add_data(parser, default="that of convert.json")
    parser.add_argument("--T", type=positive, nargs="+", metavar="T", help="default: 1 2 4 8 ... T")
    parser.add_argument("--images", type=positive, metavar="N", help="test images; default: all")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N")
    add_device(parser)
    parser.add_argument(
        "--engine", action="store_true", help="run lowered: faster, the same up to rounding"
    )
    parser.add_argument(
        "--predict", type=Path, metavar="FILE.csv",
        help="write the prediction of each image at the largest T",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def source_of(args: argparse.Namespace, about: dict[str, Any]) -> str:
    """``--data``, or the files that the network was converted with.

    Raises:
        ValueError: neither is known, or it is an entry, whose code is only run by ``--data``.
    """
    if args.data is not None:
        return str(args.data)
    found = (about.get("data") or {}).get("source")
    if not isinstance(found, str):
        raise ValueError(f"--data is needed: {args.folder} does not say what it was converted with")
    if found != "digits" and not Path(found).exists():
        # A folder from elsewhere must not choose which code runs here.
        what = (
            f"--data is needed: {args.folder} was converted with {found!r}, which is no file or "
            "folder here"
        )
        if ":" in found:
            what += f"; code is run only where it is asked for: --data {found}"
        raise ValueError(what)
    return found


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from ..engine import lower
    from ..files import write_text
    from .measure import measure, usual_steps

    if args.predict is not None and not args.predict.absolute().parent.is_dir():
        raise FileNotFoundError(f"--predict={args.predict}: its folder does not exist")
    snn, about = load_saved(args.folder, args.device)
    source = source_of(args, about)
    images = load_data(source, False, limit=args.images, options=remembered(about, args))
    steps = args.T or usual_steps(snn.T)
    found = measure(lower(snn) if args.engine else snn, images, steps, args.batch_size)
    classes = getattr(images, "classes", None) or (about.get("data") or {}).get("classes") or []
    if args.predict is not None:
        write_text(args.predict, _predictions(images, found, max(steps), classes))
    _show(args, images, found, about)
    return {
        "folder": args.folder, "data": images.name, "images": len(images), "method":
        snn.report.method, "T": snn.T, "engine": args.engine,
        "device": args.device, "rows": found.rows,
        "ANN at conversion": (about.get("accuracy") or {}).get("ANN"), "predictions": args.predict,
    }  # fmt: skip


def _predictions(images: Any, found: Any, T: int, classes: Any) -> str:
    def named(index: int) -> str:
        return classes[index] if 0 <= index < len(classes) else str(index)

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", "prediction", "confidence"])
    paths = getattr(images, "paths", None) or range(len(images))
    for path, label, guess, sure in zip(
        paths, found.labels, found.predictions[T], found.confidence, strict=True
    ):
        writer.writerow([path, named(label) if label >= 0 else "", named(guess), f"{sure:.4f}"])
    return text.getvalue()


def _show(args: argparse.Namespace, images: Any, found: Any, about: dict[str, Any]) -> None:
    with_top5 = "top-5" in found.rows[0]
    header = ["T", "steps", "accuracy %", *(["top-5 %"] if with_top5 else ()), "ms per image",
              "spikes", "additions", "MACs", "µJ", "of the ANN's"]  # fmt: skip
    lines = []
    for row in found.rows:
        ratio = row["energy pJ"] / row["ANN energy pJ"] if row["ANN energy pJ"] else float("nan")
        lines.append(
            [
                str(row["T"]), str(row["latency steps"]), percent(row["accuracy"]),
                *([percent(row["top-5"])] if with_top5 else ()), f"{row['ms per image']:.3f}",
                _number(row["spikes per neuron and step"]), f"{row['synaptic operations']:.3g}",
                f"{row['MACs']:.3g}", f"{row['energy pJ'] / 1e6:.3g}", f"{ratio:.3f}",
            ]
        )  # fmt: skip
    how = "lowered" if args.engine else "as converted"
    print_table(f"{args.folder}: {len(images)} images of {images.name}, {how}", header, lines)
    print(
        "steps: latency, with those that the method adds; spikes: of a neuron and step; additions, "
        "MACs, µJ: of an image\n(arithmetic alone, no movement of data)"
    )
    measured = about.get("accuracy") or {}
    if measured.get("ANN") is not None:
        print(
            f"The ANN at conversion, on {measured['images']} images: {percent(measured['ANN'])} %"
        )
    for note in dict.fromkeys(note for row in found.rows for note in row["notes"]):
        print(f"* {note}")
    if args.predict is not None:
        print(f"Predictions: {args.predict}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
