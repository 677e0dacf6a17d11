"""Firing rates, thresholds and operations of a network for TensorBoard."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from .metrics import energy, firing_rates, synaptic_operations

__all__ = ["log_to_tensorboard"]


@torch.no_grad()
def log_to_tensorboard(
    snn: Any,
    writer: Any,
    x: Any,
    step: int,
    *,
    T: int | None = None,
    tag: str = "snn",
) -> None:
    """Write what a network does with ``x`` to TensorBoard.

    Example::

        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter("runs/fine-tuning") as writer:
            for epoch in range(epochs):
                train(snn)
                snnkernels.log_to_tensorboard(snn, writer, images, epoch)

    Of each layer of neurons: the mean rate (``tag/rate/LAYER``), a histogram of the rates of its
    neurons (``tag/rates/LAYER``) and of its thresholds (``tag/threshold/LAYER``); the share of
    neurons that never fired (``tag/silent/LAYER``). Of the network: ``tag/spikes``,
    ``tag/synaptic_operations`` and ``tag/energy_pJ`` of a sample
    (:mod:`snnkernels.metrics`).

    Args:
        snn: a converted network, or a plan of one.
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar`` and
            ``add_histogram``; or a folder, for which one is made and closed.
        x: inputs ``[B, *]``, as ``snn`` takes them.
        step: the global step of the values.
        T: number of steps; None: those of the conversion.
        tag: stands before all names.

    Raises:
        TypeError: ``snn``, ``writer``, ``step`` or ``tag`` is something else.
        ValueError: ``T`` is not allowed, or ``x`` is empty.
        ImportError: ``writer`` is a folder and tensorboard is not installed.
    """
    if not isinstance(step, int):
        raise TypeError(f"step={step!r} must be an int")
    if not isinstance(tag, str):
        raise TypeError(f"tag={tag!r} must be a string")
    if isinstance(writer, (str, PathLike)):
        with _writer(writer) as made:
            log_to_tensorboard(snn, made, x, step, T=T, tag=tag)
        return
    for method in ("add_scalar", "add_histogram"):
        if not callable(getattr(writer, method, None)):
            raise TypeError(
                f"writer must be a SummaryWriter or a folder, got {type(writer).__name__} without "
                f"{method}"
            )
    layers = dict(snn.neurons()) if hasattr(snn, "neurons") else {}
    for name, rates in firing_rates(snn, x, T, per="neuron").items():
        writer.add_scalar(f"{tag}/rate/{name}", float(rates.mean()), step)
        writer.add_scalar(f"{tag}/silent/{name}", float((rates == 0).double().mean()), step)
        writer.add_histogram(f"{tag}/rates/{name}", rates.flatten(), step)
        threshold = torch.as_tensor(layers[name].node.threshold).detach().flatten().cpu().double()
        writer.add_histogram(f"{tag}/threshold/{name}", threshold, step)
    found = synaptic_operations(snn, x, T)
    writer.add_scalar(f"{tag}/spikes", found.spikes, step)
    writer.add_scalar(f"{tag}/synaptic_operations", found.additions, step)
    writer.add_scalar(f"{tag}/energy_pJ", energy(found).snn, step)


def _writer(folder: Any) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ImportError(
            "a folder as writer needs tensorboard: pip install 'snnkernels[tensorboard]'"
        ) from e
    return SummaryWriter(str(folder))
