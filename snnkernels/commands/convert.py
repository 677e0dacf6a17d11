"""``snnkernels convert``: a trained network to a folder that a colleague can run."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .datasets import add_data, batches, data_options, load_data
from .networks import add_device, add_model, device_of, load_model
from .output import add_command, percent, plain, positive, print_table

__all__ = ["add_parser"]

_FLAGS = ("threshold", "v_init", "per_channel", "maxpool", "normalize")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "convert",
        "a trained network to a folder that a colleague can run",
        "Converts a trained network and writes a folder: the spiking network (loads without the "
        "network's code, nothing is pickled), report.html, report.md, and convert.json with all "
        "settings. An entry runs the code it names.",
        """
        snnkernels convert small_cnn.safetensors --data digits --out digits_snn
        snnkernels convert mynet.models:resnet18 --weights best.pt --data photos --size 224 --T 8
        snnkernels convert train.py:build --weights best.safetensors --data cifar10.npz \\
            --method srp:probe=8 --out srp_snn
        snnkernels eval digits_snn --data digits
        """,
    )
    add_model(parser)
    add_data(parser)
    parser.add_argument(
        "--calibration", type=positive, default=1024, metavar="N",
        help="training images that thresholds are taken from; default 1024",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=int, default=256, metavar="N",
        help="test images for the report's accuracies, 0 for none; default 256",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N")
    group = parser.add_argument_group("conversion")
    group.add_argument(
        "--method", default="opi", metavar="METHOD[:OPTION=VALUE,...]",
        help="such as opi, srp:probe=8; `snnkernels methods` lists them; default opi",
    )  # fmt: skip
    group.add_argument("--T", type=positive, default=16, help="number of time steps; default 16")
    group.add_argument("--threshold", help="mmse, max, kl, ltb, a percentile (99.9%%) or a number")
    group.add_argument("--v-init", help="half, zero, uniform, normal, mse, 25%% or a number")
    group.add_argument(
        "--per-channel", action=argparse.BooleanOptionalAction, help="thresholds from data"
    )
    group.add_argument("--maxpool", choices=("cumulative", "pre_spike", "avg"))
    group.add_argument("--normalize", choices=("threshold", "weights"))
    group.add_argument("--on-unsupported", choices=("error", "mean", "keep"), default="error")
    add_device(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write; default: NAME_snn"
    )
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    parser.set_defaults(run=_run)


def _arguments(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The method, and what else ``convert`` is told."""
    from ..sweep import _number_or_word, parse_trial

    trial = parse_trial(args.method)
    told = dict(trial.arguments)
    for name in _FLAGS:
        value = getattr(args, name)
        if value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if name in told:
            raise ValueError(f"{flag} and {name}= in --method={args.method}: give one of them")
        told[name] = _number_or_word(value) if name in ("threshold", "v_init") else value
    return trial.method, told


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from .. import convert
    from ..files import check_new_folder, new_folder
    from ..html_report.page import versions
    from ..hub.shared import safetensors_package
    from .measure import accuracy_of, measure, operations_of, usual_steps

    if args.images < 0:
        raise ValueError(f"--images={args.images} must be at least 0")
    method, told = _arguments(args)
    safetensors_package()  # a missing package is told before the work
    if args.out is not None:
        check_new_folder(args.out, force=args.force)
    device = device_of(args.device)
    given = load_model(args.model, args.weights)
    given.model.to(device)
    out = args.out or Path(f"{given.name}_snn")
    check_new_folder(out, force=args.force)
    options = data_options(args)
    calibration, test = None, None
    if args.data is not None:
        calibration = load_data(args.data, True, limit=args.calibration, options=options)
        if args.images:
            test = load_data(args.data, False, limit=args.images, options=options)
    elif options:
        raise ValueError("--size, --mean and --std need --data")
    loader = None
    if calibration is not None:  # a list: some methods look at the data more than once
        loader = [x for x, _ in batches(calibration, args.batch_size)]
    snn = convert(
        given.model, loader, method=method, T=args.T, on_unsupported=args.on_unsupported,
        progress=sys.stderr.isatty(), **told,
    )  # fmt: skip

    ann = found = operations = accuracy = None
    if test is not None:
        ann = accuracy_of(given.model, test, args.batch_size)
        found = measure(snn, test, usual_steps(args.T), args.batch_size)
        operations = operations_of(snn, test, args.T)
        accuracy = {"ANN": ann, "images": len(test), "rows": found.rows}
    settings = {
        "model": {"name": given.name, **given.about},
        "data": _about_data(args, calibration, loader, test, options),
        "method": str(method), "T": args.T, "latency steps": snn.latency(),
        "arguments": {**told, "on_unsupported": args.on_unsupported},
        "input": _input_of(loader),
        "accuracy": accuracy,
        "versions": versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "snnkernels " + shlex.join(args.argv),
    }  # fmt: skip
    snn.metadata = plain({k: settings[k] for k in ("model", "data", "method", "T")})
    curve = {r["T"]: r["accuracy"] for r in found.rows} if found else {}
    curve = {T: a for T, a in curve.items() if a is not None}
    with new_folder(out, force=args.force) as new:
        _write(new, out.absolute().name, snn, settings, given.name, curve, ann, operations)
    return _told(args, out, snn, settings)


def _write(
    new: Path, folder: str, snn: Any, settings: dict[str, Any], name: str,
    curve: dict[int, float], ann: float | None, operations: Any,
) -> None:  # fmt: skip
    from safetensors.torch import save_file

    from ..html_report import to_html
    from ..hub import save_pretrained
    from ..hub.card import model_card

    save_pretrained(snn, new)
    # The card names the folder to be, not that of this moment.
    (new / "README.md").write_text(model_card(snn, folder), encoding="utf-8")
    points = {r.name: r.points.contiguous() for r in snn.report.rows if r.points is not None}
    if points:
        save_file(points, new / "activations.safetensors")
    settings["sha256"] = hashlib.sha256((new / "model.safetensors").read_bytes()).hexdigest()
    (new / "report.md").write_text(
        f"# {name} as a spiking network\n\n{snn.report.to_markdown()}\n", encoding="utf-8"
    )
    to_html(
        snn.report, new / "report.html", title=f"{name} as a spiking network",
        settings=_flat(settings), accuracy=curve or None, ann=ann, operations=operations,
    )  # fmt: skip
    text = json.dumps(plain(settings), indent=2, allow_nan=False) + "\n"
    (new / "convert.json").write_text(text, encoding="utf-8")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as lines of a table, without what the page shows otherwise."""
    lines = {}
    for key, value in settings.items():
        if key in ("accuracy", "versions", "input") or value is None:
            continue
        if isinstance(value, dict):
            value = ", ".join(
                f"{k} {_words(v)}" for k, v in value.items() if v not in (None, {}, "")
            )
        lines[key] = value
    return {key: value for key, value in lines.items() if value != ""}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _about_data(
    args: argparse.Namespace, calibration: Any, loader: Any, test: Any, options: dict[str, Any]
) -> dict[str, Any] | None:
    if calibration is None:
        return None
    seen = hashlib.sha256()
    for x in loader:
        seen.update(x.contiguous().numpy().tobytes())
    about: dict[str, Any] = {
        "source": args.data, "name": calibration.name, "calibration images": len(calibration),
        "calibration sha256": seen.hexdigest(), "options": options,
    }  # fmt: skip
    if hasattr(calibration, "mean"):
        about["mean"], about["std"] = calibration.mean, calibration.std
    if getattr(calibration, "classes", None):
        about["classes"] = list(calibration.classes)
    if getattr(calibration, "split", "") is None and test is not None:
        about["note"] = "no train and val folders: the test images may be calibration images too"
    return about


def _input_of(loader: Any) -> dict[str, Any] | None:
    if not loader:
        return None
    return {"shape": list(loader[0].shape[1:]), "dtype": str(loader[0].dtype).rpartition(".")[2]}


def _told(
    args: argparse.Namespace, out: Path, snn: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    measured = settings["accuracy"]
    if measured is not None:
        rows = [["ANN", percent(measured["ANN"])], ["", ""]]
        rows += [[f"T = {row['T']}", percent(row["accuracy"])] for row in measured["rows"]]
        print_table(f"Accuracy (%) on {measured['images']} test images", ["", "%"], rows)
    for note in snn.report.notes:
        print(f"* {note}")
    data = settings["data"]
    words = ["snnkernels", "eval", str(out)]
    words += ["--data", data["source"]] if data else ["--data", "DATA"]
    run = shlex.join(words)
    print(
        f"\nSaved in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}\n"
        f"Look at {out / 'report.html'}, run it with:\n\n    {run}\n\n"
        f'or in Python: snnkernels.load_pretrained("{out}")'
    )
    return {"folder": out, "run": run, "notes": snn.report.notes, **settings}
