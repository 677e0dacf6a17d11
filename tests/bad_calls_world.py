"""What bad calls are made with: small tensors, modules, networks, files; made when first named."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import snnkernels
from snnkernels import functional, maps, options, scan, surrogate

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
