"""The ``snnkernels`` command: ``info``, ``methods``, ``demo`` and ``sweep``.

Everything heavy is imported by the command that uses it, so ``info`` works with torch and numpy
alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_sweep import add_parser as add_sweep

if TYPE_CHECKING:
    import torch
    from torch import nn

    from snnkernels.data import ImageSet

__all__ = ["main", "markdown_table", "print_table", "progress_bar"]

STEPS = (1, 2, 4, 8, 16, 32)
"""Numbers of time steps that the demo evaluates."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's own when None) and return its exit code.

    0: done; 1: an error, told in one line on stderr; 2: wrong arguments (raised as
    :class:`SystemExit` by argparse); 130: interrupted.
    """
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a "θ" must not end a run in an ASCII terminal
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as e:
        if args.traceback:
            raise
        print(f"snnkernels {args.command}: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="snnkernels", description="Spiking networks from trained ANNs, on fused kernels."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="which implementations run here, and what to install")
    info.add_argument("--json", action="store_true", help="the same as JSON")
    info.set_defaults(run=_info)

    methods = commands.add_parser("methods", help="the conversion methods: papers, needs, options")
    methods.add_argument("--json", action="store_true", help="the same as JSON")
    methods.set_defaults(run=_methods)

    demo = commands.add_parser("demo", help="train a small network, make it spike, compare")
    demo.add_argument("--out", type=Path, default=Path("snnkernels_demo"), metavar="DIR")
    demo.add_argument("--epochs", type=_positive, default=12, metavar="N")
    demo.add_argument("--seed", type=int, default=0, metavar="N")
    demo.set_defaults(run=_demo)
    add_sweep(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


# --- printing -------------------------------------------------------------------------------


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of text, the first column left and the others right aligned.

    With rich when it is installed, plain otherwise. A row of empty cells is a rule.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain(title, header, rows)
        return
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="left" if i == 0 else "right")
    for row in rows:
        if any(row):
            table.add_row(*(Text(cell) for cell in row))
        else:
            table.add_section()
    print(title)  # as the table's own title it would be broken to the table's width
    # At the width of a pipe or a narrow terminal rich would cut cells; numbers must stay whole.
    wide = Console(width=10_000)
    Console(width=max(Console().width, wide.measure(table).maximum)).print(table)


def _print_plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    print(title)
    print(line(header))
    print(rule)
    for row in rows:
        print(line(row) if any(row) else rule)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table in Markdown, ending in a newline; rules (empty rows) are left out."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(row for row in rows if any(row))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Any]:
    """Yield a bar with ``update(n)``, tqdm's when it is installed, else one that shows nothing."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield _NoBar()
        return
    with tqdm(total=total, desc=what, leave=False, dynamic_ncols=True) as bar:
        yield bar


class _NoBar:
    def update(self, n: int = 1) -> None:
        """Do nothing."""


# --- info -----------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
    from snnkernels import backend_info

    found = backend_info()
    print(json.dumps(found.to_dict(), indent=2) if args.json else str(found))


def _methods(args: argparse.Namespace) -> None:
    from textwrap import fill

    from snnkernels import methods

    found = methods()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for m in found:
        options = ", ".join(f"{name}={value!r}" for name, value in m["options"].items())
        told = [m["source"], f"needs {m['needs']}"]
        told += [f"its paper trains with {m['trains']}"] if m["trains"] else []
        told += [f"options: {options}"] if options else []
        print(m["name"] + ("" if m["binary"] else " (not binary)"))
        for line in told:
            print(fill(line, 96, initial_indent="    ", subsequent_indent="      "))
    print(
        "\nconvert(ann, loader, method=NAME); with options an object of "
        "snnkernels.conversion.methods;\nin a sweep NAME:option=value. Which to take: "
        "docs/methods.md"
    )


# --- demo -----------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> None:
    with _quiet_backend():
        _run_demo(args)


def _run_demo(args: argparse.Namespace) -> None:
    import torch

    from snnkernels import data, models, plots
    from snnkernels.conversion import convert

    _figure((1, 1))  # a missing package should stop the demo before the training, not after
    train, test = data.digits(train=True), data.digits(train=False)
    args.out.mkdir(parents=True, exist_ok=True)

    print(f"Training small_cnn on {train.name}: {len(train)} images, seed {args.seed}")
    ann = _train(train, args.epochs, args.seed)
    models.save_checkpoint(ann, args.out / "small_cnn.safetensors", "small_cnn")
    x, y = test[:]
    with torch.no_grad():
        ann_acc = float((ann(x).argmax(1) == y).float().mean())

    calibration = [train[i : i + 256][0] for i in range(0, len(train), 256)]
    curves, spiking = {}, {}
    for label, v_init in (("v_init = 0", 0.0), ("v_init = θ/2", "half")):
        snn = convert(
            ann,
            calibration,
            method="opi",
            T=max(STEPS),
            threshold="mmse",
            v_init=v_init,
            progress=False,
        )
        spiking[label] = snn
        with torch.no_grad():
            answers = snn.predict_curve(x, STEPS)
        curves[label] = [float((answers[t].argmax(1) == y).float().mean()) for t in STEPS]

    percent = "{:.1f}".format
    rows = [["ANN", *[percent(100 * ann_acc)] * len(curves)], [""] * (1 + len(curves))]
    for i, t in enumerate(STEPS):
        rows.append([f"T = {t}", *(percent(100 * acc[i]) for acc in curves.values())])
    print_table(
        f"Accuracy (%) on {len(test)} test images, thresholds from training images, no retraining",
        ["", *curves],
        rows,
    )

    figure = _figure((5.2, 3.6))
    plots.accuracy_curve(STEPS, dict(reversed(curves.items())), ann=ann_acc, ax=figure.subplots())
    figure.savefig(args.out / "accuracy_vs_T.png", dpi=150)
    _raster(spiking, x[:1], int(y[0]), args.out / "raster.png")
    print(_race(spiking["v_init = θ/2"], x[:128]))
    print(f"Saved in {args.out.resolve()}: accuracy_vs_T.png, raster.png, small_cnn.safetensors")


@contextmanager
def _quiet_backend() -> Iterator[None]:
    """Ask for the reference where ``auto`` would end there anyway, with a warning.

    The demo says what is missing itself, at its end.
    """
    from snnkernels.kernels.backends import get_backend, use_backend

    if get_backend() == "auto" and not _cpu_row().available:
        with use_backend("reference"):
            yield
    else:
        yield


def _cpu_row() -> Any:
    from snnkernels import backend_info

    return next(row for row in backend_info().rows if row.name == "cpu")


def _train(train: ImageSet, epochs: int, seed: int, batch_size: int = 64) -> nn.Module:
    """Return a trained small_cnn in eval mode; the same seed gives the same network."""
    import torch
    from torch.nn.functional import cross_entropy

    from snnkernels import models

    # Layers this small gain nothing from a second thread and, on a busy machine, wait for it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = models.small_cnn().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    batches = epochs * -(-len(train) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=batches + 1)
    try:
        with progress_bar("training", batches) as bar:
            for _ in range(epochs):
                for index in torch.randperm(len(train)).split(batch_size):
                    x, y = train[index]
                    loss = cross_entropy(model(x), y, label_smoothing=0.05)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update(1)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _figure(size: tuple[float, float]) -> Any:
    """Return a figure that belongs to no window system: the demo only saves files."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(
            "the demo's pictures need matplotlib; install it with: pip install matplotlib"
        ) from e
    return Figure(figsize=size, layout="constrained")


def _neurons(snn: nn.Module, x: torch.Tensor, steps: int) -> list[tuple[nn.Module, tuple, dict]]:
    """Return (neuron, its arguments) for each spiking layer of one run, in order of execution.

    The neurons are copies that return their spikes, whatever the network asks of the original.
    """
    import torch

    from snnkernels.neurons import IFNode

    calls: list[tuple[nn.Module, tuple, dict]] = []

    def record(node: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((node, args, kwargs))

    handles = [
        m.register_forward_pre_hook(record, with_kwargs=True)
        for m in snn.modules()
        if isinstance(m, IFNode)
    ]
    try:
        with torch.no_grad():
            snn(x, T=steps)
    finally:
        for handle in handles:
            handle.remove()
    twins = []
    for node, args, kwargs in calls:
        twin: Any = copy.deepcopy(node)
        twin.output = "spikes"
        twins.append((twin, args, kwargs))
    return twins


def _fire(call: tuple[Any, tuple, dict]) -> torch.Tensor:
    import torch

    node, args, kwargs = call
    node.reset()
    with torch.no_grad():
        return node(*args, **kwargs)


def _raster(spiking: Mapping[str, nn.Module], x: torch.Tensor, label: int, path: Path) -> None:
    """Draw the last spiking layer for one image, once for each network."""
    import torch

    from snnkernels import plots

    fired = {
        name: (_fire(_neurons(snn, x, max(STEPS))[-1]) != 0).flatten(1)
        for name, snn in spiking.items()
    }
    # The busiest neurons, in order: rates become visible, silent rows do not take the space.
    total = torch.stack([s.sum(0) for s in fired.values()]).sum(0)
    active = total.sort(stable=True).indices[total.count_nonzero().neg() :][-64:]
    figure = _figure((8.4, 4.4))
    axes = figure.subplots(1, len(fired), sharey=True)
    for ax, (name, s) in zip(axes, fired.items(), strict=True):
        plots.raster(s[:, active], ax, title=name)
        ax.set_ylabel("")
    axes[0].set_ylabel("neuron, by number of spikes")
    figure.suptitle(f"Last spiking layer, one test image of the digit {label}", fontsize=11)
    figure.savefig(path, dpi=150)


def _race(snn: nn.Module, x: torch.Tensor, steps: int = 16, rounds: int = 15) -> str:
    """Time the fused kernel against the reference on the widest layer's own current."""
    import torch

    from snnkernels.kernels.backends import use_backend

    row = _cpu_row()
    if not row.available:
        return (
            f"No fused CPU kernel here, so the networks above ran through the reference and there "
            f"is nothing to compare it with: {row.reason}. {row.remedy}"
        )
    # The first layer may see an image that is constant in time; the ones after it see spikes.
    call = max(_neurons(snn, x, steps)[1:], key=lambda c: c[1][0].numel())
    shape = list(call[1][0].shape)
    spikes: dict[str, torch.Tensor] = {}
    seconds: dict[str, list[float]] = {"cpu": [], "reference": []}
    for name in seconds:
        with use_backend(name):
            spikes[name] = _fire(call)
    if not torch.equal(spikes["cpu"], spikes["reference"]):
        raise RuntimeError("the fused kernel and the reference differ in their spikes")
    for _ in range(rounds):
        for name, times in seconds.items():
            with use_backend(name):
                start = time.perf_counter()
                _fire(call)
                times.append(time.perf_counter() - start)
    fused, reference = (1e3 * statistics.median(times) for times in seconds.values())
    return (
        f"T = {steps}, current {shape}: fused kernel {fused:.2f} ms, reference {reference:.2f} ms, "
        f"{reference / fused:.1f}x, equal spikes (medians of {rounds}, interleaved, "
        f"{torch.get_num_threads()} threads)"
    )
