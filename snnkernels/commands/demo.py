"""``snnkernels demo``: train a small network, make it spike, compare."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import cpu_row, kernel_race
from .output import add_command, positive, print_table, progress_bar
from .pictures import new_figure, save_figure

if TYPE_CHECKING:
    import torch
    from torch import nn

    from snnkernels.data import ImageSet

# A neuron and what it was called with.
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]

__all__ = ["add_parser"]

STEPS = (1, 2, 4, 8, 16, 32)
"""Numbers of time steps that the demo evaluates."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        "train a small network, make it spike, compare",
        "Trains a small network on scikit-learn's digits (seconds on one core), converts it twice, "
        "prints the accuracies against the number of time steps and saves pictures.",
        "snnkernels demo\nsnnkernels demo --epochs 3 --out digits --json",
    )
    parser.add_argument("--out", type=Path, default=Path("snnkernels_demo"), metavar="DIR")
    parser.add_argument("--epochs", type=positive, default=12, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    with _quiet_backend():
        return _run_demo(args)


def _run_demo(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from snnkernels import data, models, plots
    from snnkernels.conversion import convert

    new_figure(1, 1)  # a missing package should stop the demo before the training, not after
    train, test = data.digits(train=True), data.digits(train=False)
    if args.out.exists() and not args.out.is_dir():
        raise NotADirectoryError(f"--out={args.out} is a file: give a folder")
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

    figure = new_figure(5.2, 3.6)
    plots.accuracy_curve(STEPS, dict(reversed(curves.items())), ann=ann_acc, ax=figure.subplots())
    save_figure(figure, args.out / "accuracy_vs_T.png", 150)
    _raster(spiking, x[:1], int(y[0]), args.out / "raster.png")
    told, speed = _race(spiking["v_init = θ/2"], x[:128])
    print(told)
    print(f"Saved in {args.out.resolve()}: accuracy_vs_T.png, raster.png, small_cnn.safetensors")
    by_steps = {k: dict(zip(map(str, STEPS), acc, strict=True)) for k, acc in curves.items()}
    return {
        "data": test.name, "images": len(test), "seed": args.seed, "ANN": ann_acc,
        "accuracy": by_steps, "kernel over reference": speed, "folder": args.out.resolve(),
    }  # fmt: skip


@contextmanager
def _quiet_backend() -> Iterator[None]:
    """Ask for the reference where ``auto`` would end there anyway, with a warning.

    The demo says what is missing itself, at its end.
    """
    from snnkernels.kernels.backends import get_backend, use_backend

    if get_backend() == "auto" and not cpu_row().available:
        with use_backend("reference"):
            yield
    else:
        yield


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


def _neurons(snn: nn.Module, x: torch.Tensor, steps: int) -> list[_Call]:
    """Return (neuron, its arguments) for each spiking layer of one run, in order of execution.

    The neurons are copies that return their spikes, whatever the network asks of the original.
    """
    import torch

    from snnkernels.neurons import IFNode

    calls: list[_Call] = []

    def record(node: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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


def _fire(call: _Call) -> torch.Tensor:
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
    figure = new_figure(8.4, 4.4)
    axes = figure.subplots(1, len(fired), sharey=True)
    for ax, (name, s) in zip(axes, fired.items(), strict=True):
        plots.raster(s[:, active], ax, title=name)
        ax.set_ylabel("")
    axes[0].set_ylabel("neuron, by number of spikes")
    figure.suptitle(f"Last spiking layer, one test image of the digit {label}", fontsize=11)
    save_figure(figure, path, 150)


def _race(
    snn: nn.Module, x: torch.Tensor, steps: int = 16, rounds: int = 15
) -> tuple[str, float | None]:
    """Time the fused kernel against the reference on the widest layer's own current."""
    import torch

    row = cpu_row()
    if not row.available:
        return (
            f"No fused CPU kernel here, so the networks above ran through the reference and there "
            f"is nothing to compare it with: {row.reason}. {row.remedy}"
        ), None
    # The first layer may see an image that is constant in time; the ones after it see spikes.
    call = max(_neurons(snn, x, steps)[1:], key=lambda c: c[1][0].numel())
    shape = list(call[1][0].shape)
    fused, reference = (1e3 * s for s in kernel_race(lambda: _fire(call), rounds))
    return (
        f"T = {steps}, current {shape}: fused kernel {fused:.2f} ms, reference {reference:.2f} ms, "
        f"{reference / fused:.1f}x, equal spikes (medians of {rounds}, interleaved, "
        f"{torch.get_num_threads()} threads)"
    ), reference / fused
