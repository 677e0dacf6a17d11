"""What bad calls are made with: small tensors, modules, networks, files; made when first named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import bad_calls_disk as disk
import torch
from torch import nn

import snnkernels
from snnkernels import conversion, data, functional, hub, maps, models, options, scan, surrogate


def ann() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


DISK = (
    "write", "saved", "checkpoint", "evil_pickle", "evil_archive", "network_file", "with_full_disk",
    "killed_at_rename", "cli", "convert_command",
)  # fmt: skip


def with_metadata() -> nn.Module:
    snn = snnkernels.convert(ann(), torch.rand(8, 6), T=4, progress=False)
    snn.metadata["object"] = object()
    return snn


def nir_graph() -> Any:
    return snnkernels.to_nir(world("snn")["snn"], torch.rand(8, 6))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(ann())


def half_moved() -> nn.Module:
    net = ann()
    net[2].to("meta")
    return net


def with_nan() -> nn.Module:
    net = ann()
    net[0].weight.data[0, 0] = float("nan")
    return net


def failing_loader(parts: int = 1) -> Iterator[Any]:
    x = torch.rand(8, 6)
    yield x if parts == 1 else (x, torch.zeros(8, dtype=torch.int64))
    raise OSError("the disk is gone")


class Writer:
    """Takes what TensorBoard's writer takes."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def add_scalar(self, *args: Any) -> None:
        self.told.append(args)

    add_histogram = add_scalar


_MAKERS: dict[str, Callable[[], Any]] = {
    "x": lambda: torch.rand(4, 3, 2),
    "x_grad": lambda: torch.rand(4, 3, 2, requires_grad=True),
    "node": lambda: snnkernels.IFNode(),
    "counts": lambda: torch.zeros(3, 8, dtype=torch.int64),
    "sums": lambda: torch.zeros(3, 8, dtype=torch.float64),
    "values": lambda: torch.rand(3, 10),
    "packed": lambda: functional.if_packed(torch.rand(4, 3, 2))[0],
    "moved_in_part": lambda: snnkernels.IFNode(torch.ones(3), channel_dim=0),
    "words": lambda: torch.zeros(1, 3, dtype=torch.uint8),
    "times": lambda: torch.ones(3, 2, dtype=torch.uint8),
    "net": lambda: ann(), "data": lambda: torch.rand(8, 6),
    "nested": lambda: nn.Sequential(ann(), nn.Softmax(1)),
    "no_activation": lambda: nn.Sequential(nn.Linear(6, 3), nn.GELU()),
    "recurrent": lambda: nn.Sequential(nn.ReLU(), nn.LSTM(6, 3)),
    "scripted": scripted, "half_moved": half_moved, "with_nan": with_nan,
    "failing_loader": lambda: failing_loader,
    "snn": lambda: snnkernels.convert(ann(), torch.rand(8, 6), T=4, progress=False),
    "plan": lambda: snnkernels.lower(world("snn")["snn"]),
    "partly": lambda: snnkernels.convert_modules(
        nn.Sequential(ann(), nn.Softmax(1)), ["0"], torch.rand(8, 6), T=4, progress=False
    ),
    "labelled": lambda: [(torch.rand(8, 6), torch.zeros(8, dtype=torch.int64))],
    "operations": lambda: snnkernels.metrics.synaptic_operations(
        world("snn")["snn"], torch.rand(8, 6)
    ),
    "writer": lambda: Writer(),
    "small": disk.small, "images": lambda: torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
    "labels": lambda: torch.zeros(2, dtype=torch.int64),
    "names_": lambda: {"name": "x", "classes": ["a"], "mean": [0.0], "std": [1.0]},
    "snn_with_metadata": with_metadata, "nir_graph": lambda: nir_graph,
    **{name: (lambda name=name: getattr(disk, name)) for name in DISK},
    "methods": lambda: import_module("snnkernels.conversion.methods"), "conversion": lambda: conversion,
    "metrics": lambda: snnkernels.metrics, "plots": lambda: snnkernels.plots,
    "distributed": lambda: snnkernels.distributed, "hub": lambda: hub, "data_": lambda: data,
    "models": lambda: models, "interop": lambda: snnkernels.interop,
    "functional": lambda: functional, "options": lambda: options, "surrogate": lambda: surrogate,
    "compat": lambda: snnkernels.compat, "snnkernels": lambda: snnkernels, "maps": lambda: maps,
    "lif_scan": lambda: scan.lif_scan, "torch": lambda: torch, "nn": lambda: nn,
    "enter": lambda: lambda manager: manager.__enter__(),
}  # fmt: skip
_made: dict[str, Any] = {}


def world(text: str) -> dict[str, Any]:
    """The names that ``text`` uses."""
    found = {}
    for name in set(re.findall(r"(?<![.\w'])[a-zA-Z_]\w*", text)):
        if name in _MAKERS:
            if name not in _made:
                _made[name] = _MAKERS[name]()
            found[name] = _made[name]
        else:
            for home in (functional, maps, snnkernels):
                if name in home.__all__:
                    found[name] = getattr(home, name)
    return found
