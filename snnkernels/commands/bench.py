"""``snnkernels bench``: how much faster, measured here, side by side."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .datasets import add_data, data_options, load_data
from .explain import example_of
from .networks import add_device, device_of, load_model, load_saved
from .output import add_command, positive, print_table

__all__ = ["add_parser", "cpu_row", "kernel_race"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "bench",
        "latency and throughput: network, lowered network, ANN; kernel and reference",
        "Measures a network as converted and lowered (of a checkpoint or an entry its ANN, too), "
        "or with --neuron the fused kernel beside the plain PyTorch reference. Calls take turns, "
        "times are medians, and ratios come first: they are what carries over to other machines. "
        "Before anything is timed, answers are compared.",
        """
        snnkernels bench --neuron --T 16 --batch 32 --neurons 65536
        snnkernels bench resnet_snn --data photos --batch 1 16
        snnkernels bench small_cnn.safetensors --data digits --T 4 8
        """,
    )
    parser.add_argument(
        "target", nargs="?", help="folder of a saved network, .safetensors checkpoint, or entry"
    )
    parser.add_argument("--neuron", action="store_true", help="the kernel of the neurons alone")
    parser.add_argument("--T", type=positive, nargs="+", metavar="T", help="default: the network's")
    parser.add_argument("--batch", type=positive, nargs="+", default=[16], metavar="N")
    parser.add_argument(
        "--neurons", type=positive, default=65536, metavar="N", help="of an image, with --neuron"
    )
    parser.add_argument("--method", help="of a checkpoint or entry; default opi")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of an entry, as for convert")
    parser.add_argument("--rounds", type=positive, default=15, metavar="N")
    add_device(parser)
    add_data(parser, default="of a folder: noise of its inputs' shape")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    if args.neuron is (args.target is not None):
        raise ValueError("give a network (folder, checkpoint or entry) or --neuron, one of the two")
    if args.neuron:
        for name, usual in (("data", None), ("weights", None), ("method", None), ("device", "cpu")):
            if getattr(args, name) != usual:
                raise ValueError(f"--{name} has no meaning with --neuron")
        return _neuron(args)
    return _network(args)


def race(
    calls: Mapping[str, Callable[[], Any]], rounds: int, sync: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Median seconds of each call; they take turns, after one round that is not counted.

    ``sync`` waits for the device.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if sync is not None:
                sync()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def cpu_row() -> Any:
    """Whether there is a fused CPU kernel here, and why not."""
    from .. import backend_info

    return next(row for row in backend_info().rows if row.name == "cpu")


def kernel_race(spikes: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of a call through the fused CPU kernel and through the reference.

    Raises:
        RuntimeError: they do not give the same spikes.
    """
    import torch

    from ..kernels.backends import use_backend

    def through(name: str) -> Any:
        with use_backend(name):
            return spikes()

    if not torch.equal(through("cpu"), through("reference")):
        raise RuntimeError("the fused kernel and the reference differ in their spikes")
    found = race({name: partial(through, name) for name in ("cpu", "reference")}, rounds)
    return found["cpu"], found["reference"]


def _machine() -> dict[str, Any]:
    from ..sweep import _machine

    return _machine(False)


# --- the neuron's kernel --------------------------------------------------------------------


def _neuron(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..functional import if_multi_step

    cpu = cpu_row()
    if not cpu.available:
        raise RuntimeError(f"there is no fused CPU kernel here: {cpu.reason}. {cpu.remedy}")
    rows = []
    for T in args.T or [16]:
        for batch in args.batch:
            x = torch.randn(T, batch, args.neurons, generator=torch.Generator().manual_seed(0))
            x = x.mul_(0.5).add_(0.2)

            def spikes(x: Any = x) -> Any:
                with torch.no_grad():
                    return if_multi_step(x, 0.5, 1.0)[0]

            fused, reference = kernel_race(spikes, args.rounds)
            rows.append(
                {
                    "T": T, "batch": batch, "neurons": args.neurons,
                    "reference over fused": reference / fused,
                    "fused ms": 1e3 * fused, "reference ms": 1e3 * reference,
                    "updates per second": x.numel() / fused,
                }
            )  # fmt: skip
    header = ["T x batch x neurons", "times faster", "fused ms", "reference ms", "updates/s"]
    lines = [
        [
            f"{r['T']} x {r['batch']} x {r['neurons']}", f"{r['reference over fused']:.2f}",
            f"{r['fused ms']:.3f}", f"{r['reference ms']:.3f}", f"{r['updates per second']:.3g}",
        ]
        for r in rows
    ]  # fmt: skip
    print_table("Integrate-and-fire, float32: fused CPU kernel and reference", header, lines)
    print(f"equal spikes; medians of {args.rounds}, interleaved; {_machine()['hardware']}")
    return {"neuron": rows, "rounds": args.rounds, "machine": _machine()}


# --- networks -------------------------------------------------------------------------------


def _network(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..engine import lower

    device = device_of(args.device)
    snn, ann, inputs = _given(args)
    plan = lower(snn)
    rows = []
    for batch in args.batch:
        x = inputs(batch).to(device)
        if len(x) < batch:
            raise ValueError(f"--batch={batch}: there are {len(x)} images only")
        for T in args.T or [snn.T]:

            def plain(x: Any = x, T: int = T) -> Any:
                with torch.no_grad():
                    return snn(x, T=T)

            def lowered(x: Any = x, T: int = T) -> Any:
                return plan(x, T=T)

            def dense(x: Any = x) -> Any:
                with torch.no_grad():
                    return ann(x)

            same = _same(plain(), lowered())
            calls: dict[str, Callable[[], Any]] = {"converted": plain, "lowered": lowered}
            calls |= {"ANN": dense} if ann is not None else {}
            found = race(calls, args.rounds, torch.cuda.synchronize if x.is_cuda else None)
            row: dict[str, Any] = {
                "T": T, "batch": batch, "converted over lowered":
                found["converted"] / found["lowered"],
                "lowered over ANN": found["lowered"] / found["ANN"] if "ANN" in found else None,
                "same predictions": same,
            }  # fmt: skip
            for name, seconds in found.items():
                row[f"{name} ms"] = 1e3 * seconds
                row[f"{name} images per second"] = batch / seconds
            rows.append(row)
    _show(args, rows, plan.why_not())
    return {
        "target": args.target, "rows": rows, "rounds": args.rounds, "machine": _machine(),
        "not lowered": plan.why_not() or None,
    }  # fmt: skip


def _same(a: Any, b: Any) -> float | None:
    """Share of equal predictions; None where answers are not logits."""
    import torch

    if not isinstance(a, torch.Tensor) or a.dim() != 2:
        return None
    return float((a.argmax(1) == b.argmax(1)).double().mean())


def _show(args: argparse.Namespace, rows: list[dict[str, Any]], why_not: str) -> None:
    with_ann = any("ANN ms" in row for row in rows)
    header = ["T, batch", "lowered is times faster", *(["its time in ANNs"] if with_ann else ()),
              "lowered ms", "converted ms", *(["ANN ms"] if with_ann else ()), "images/s",
              "same predictions"]  # fmt: skip
    lines = []
    for r in rows:
        same = r["same predictions"]
        lines.append(
            [
                f"T = {r['T']}, {r['batch']}", f"{r['converted over lowered']:.2f}",
                *([f"{r['lowered over ANN']:.2f}"] if with_ann else ()),
                f"{r['lowered ms']:.2f}", f"{r['converted ms']:.2f}",
                *([f"{r['ANN ms']:.2f}"] if with_ann else ()),
                f"{r['lowered images per second']:.0f}", "" if same is None else f"{same:.1%}",
            ]
        )  # fmt: skip
    print_table(str(args.target), header, lines)
    print(f"medians of {args.rounds} calls, interleaved; {_machine()['hardware']}")
    if args.data is None:
        print("inputs are noise, whose rates are not those of images: give --data for those")
    if why_not:
        print(f"not lowered: {why_not}")


def _given(args: argparse.Namespace) -> tuple[Any, Any, Callable[[int], Any]]:
    """The converted network, its ANN if there is one, and inputs by batch size."""
    from .. import convert
    from ..sweep import parse_trial

    target = str(args.target)
    if Path(target).is_dir():
        if args.weights is not None:
            raise ValueError("--weights is for entries: a saved network has its own")
        if args.method is not None:
            raise ValueError(f"--method={args.method}: a saved network has been converted")
        snn, about = load_saved(Path(target), args.device)
        args.folder = Path(target)
        return snn, None, lambda batch: example_of(args, about, snn, batch)
    if args.data is None:
        raise ValueError(f"--data is needed to convert {target}: thresholds come from images")
    given = load_model(target, args.weights)
    given.model.to(device_of(args.device))
    trial = parse_trial(args.method or "opi")
    options = data_options(args)
    train = load_data(args.data, True, limit=256, options=options)
    test = load_data(args.data, False, limit=max(args.batch), options=options)
    T = max(args.T or [16])
    snn = convert(
        given.model, train[:256][0], method=trial.method, T=T, progress=False, **trial.arguments
    )
    return snn, given.model, lambda batch: test[:batch][0]
