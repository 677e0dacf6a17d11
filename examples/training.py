"""What ``train_cifar10.py`` needs beside its loop: processes, images on the device, files."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from snnkernels import data

__all__ = ["Images", "Team", "draw", "load_state", "write"]

PAD, SIDE = 4, 32  # the margin that crops may reach into, and the images


@dataclass
class Team:
    """The processes of a run, and the device of this one."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def gather(cls, device: str) -> Team:
        """One process, or those that torchrun has started."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        found = torch.device(device)
        if device == "cuda":
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(found)
        if size > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(rank, size, found)

    @staticmethod
    def part() -> None:
        """Leave the others, if there are any."""
        if dist.is_available() and dist.is_initialized():
            # A reducer of DDP in a reference cycle would keep the group, and its threads, until
            # Python ends, which then aborts.
            gc.collect()
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def total(self, *numbers: float) -> list[float]:
        """The sums of numbers over all processes."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(values)
        return values.tolist()


class Images:
    """A set of 32x32 images that lies on the device as uint8."""

    def __init__(self, images: data.ImageSet, device: torch.device) -> None:
        self.pixels, self.labels = images.images.to(device), images.labels.to(device)
        self.mean = 255 * torch.tensor(images.mean, device=device)
        self.std = 255 * torch.tensor(images.std, device=device)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def batch(
        self, index: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(normalised float32 [B, 3, 32, 32] in channels_last, labels int64 [B])``.

        ``rows`` and ``columns``, ``[B, 32]``: what to take of each image in its black margin.
        """
        index = index.to(self.labels.device)
        x = self.pixels[index].permute(0, 2, 3, 1)
        if rows is not None and columns is not None:
            x = F.pad(x, (0, 0, PAD, PAD, PAD, PAD))
            which = torch.arange(len(x), device=x.device)[:, None, None]
            x = x[which, rows.to(x.device)[:, :, None], columns.to(x.device)[:, None, :]]
        return ((x.float() - self.mean) / self.std).permute(0, 3, 1, 2), self.labels[index]


def draw(n: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """An epoch's order ``[n]``, and each image's rows and columns ``[n, 32]``: crops and flips."""
    g = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(n, generator=g)
    top, left = torch.randint(0, 2 * PAD + 1, (2, n, 1), generator=g)
    flip = torch.rand(n, 1, generator=g) < 0.5
    along = torch.arange(SIDE)
    return order, top + along, left + torch.where(flip, SIDE - 1 - along, along)


def load_state(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run left at ``path``, or None.

    Raises:
        ValueError: it was a run with other settings; says which.
    """
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    old = state["settings"]
    differ = [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]
    if differ:
        raise ValueError(
            f"{path} was left by a run with other settings ({', '.join(differ)}); pass --fresh to "
            "start anew, or another --out"
        )
    return state


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    save(part)
    part.replace(path)
