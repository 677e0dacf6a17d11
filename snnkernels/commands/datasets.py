"""Data by name, path or entry."""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import entries
from .entries import said
from .output import positive

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_data", "batches", "data_options", "load_data", "remembered"]


def add_data(parser: argparse.ArgumentParser, *, required: bool = False, default: str = "") -> None:
    """The arguments that :func:`load_data` reads."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="DATA", required=required,
        help="digits (scikit-learn's); CIFAR-10 as a .npz bundle, the official archive or its "
        "folder; a folder of images, root/[train|val/]CLASS/*.png|jpg; or an entry "
        "module:dataset (see docs/cli.md)" + (f"; default: {default}" if default else ""),
    )  # fmt: skip
    group.add_argument("--size", type=positive, metavar="N", help="of images of a folder, N x N")
    group.add_argument(
        "--mean", type=float, nargs="+", metavar="M",
        help="of images of a folder, pixels in [0, 1]: three values, or one for grey images; "
        "default: ImageNet's",
    )  # fmt: skip
    group.add_argument("--std", type=float, nargs="+", metavar="S", help="as --mean")


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """Size, mean and std that were given."""
    return {k: v for k in ("size", "mean", "std") if (v := getattr(args, k)) is not None}


def remembered(about: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Options given now over those that the network was converted with."""
    data = about.get("data") or {}
    before = data.get("options") if isinstance(data, dict) else {}
    return {**(before or {}), **data_options(args)}


def load_data(
    spec: str, train: bool, *, limit: int | None = None, options: dict[str, Any] | None = None
) -> Any:
    """A set with a length, ``name`` and slices ``(inputs, labels)``.

    Raises:
        ValueError, FileNotFoundError: ``spec`` names no data; says what is expected.
    """
    from .. import data
    from ..image_folder import ImageFolder

    options = options or {}
    path = Path(spec)
    if spec != "digits" and path.is_dir() and not _is_cifar(path):
        return ImageFolder(path, train, limit=limit, **_folder_options(options))
    found: Any
    if spec == "digits":
        found = first(data.digits(train), limit)
    elif path.exists():
        found = data.load_cifar10(path, train, limit=limit)
    elif ":" in spec:
        found = first(_entry_data(spec, train), limit)
    else:
        raise FileNotFoundError(
            f"--data={spec}: no such file or folder, nor 'digits', nor an entry module:dataset"
        )
    if options:
        names = ", ".join(f"--{key}" for key in options)
        raise ValueError(f"{names}: only for a folder of images; {found.name} has its own")
    return found


def _is_cifar(path: Path) -> bool:
    return any(path.glob("*_batch*")) or any(path.glob("cifar-10-*"))


def _folder_options(options: dict[str, Any]) -> dict[str, Any]:
    mean, std = options.get("mean"), options.get("std")
    if (mean is None) != (std is None):
        raise ValueError("--mean and --std belong together: give both, or neither for ImageNet's")
    return options


def first(images: Any, count: int | None) -> Any:
    """The first ``count`` images of a set that holds them."""
    if count is None or count >= len(images):
        return images
    part = copy.copy(images)
    if isinstance(images, Slices):
        part.count = count
    else:
        part.images, part.labels = images.images[:count], images.labels[:count]
    return part


class Slices:
    """A data set of a user's with slices: ``set[i]`` gives ``(input, label)``."""

    def __init__(self, given: Any, name: str) -> None:
        self.given, self.name, self.count = given, name, len(given)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: slice) -> tuple[Tensor, Tensor]:
        import torch

        items = [self.given[i] for i in range(*index.indices(self.count))]
        for item in items:
            if not isinstance(item, (tuple, list)) or len(item) < 2:
                raise ValueError(
                    f"{self.name}: an item must be (input, label), got {type(item).__name__}"
                )
        try:
            inputs = torch.stack([torch.as_tensor(item[0]) for item in items])
            labels = torch.tensor([int(item[1]) for item in items])
        except (TypeError, ValueError, RuntimeError) as e:
            raise ValueError(
                f"{self.name}: items must be (tensor of one shape, whole number): {e}"
            ) from e
        return inputs, labels


def _entry_data(entry: str, train: bool) -> Slices:
    found = entries.object_of(entry)
    if not hasattr(found, "__getitem__") or inspect.isclass(found):
        if not callable(found):
            raise ValueError(
                f"--data={entry} is a {type(found).__name__}: expected a data set (a length, and "
                "items (input, label)) or a function that returns one"
            )
        try:
            takes = "train" in inspect.signature(found).parameters
            found = found(train=train) if takes else found()
        except Exception as e:
            raise ValueError(f"--data={entry} failed: {said(e)}") from e
    if not hasattr(found, "__getitem__") or not hasattr(found, "__len__"):
        raise ValueError(
            f"--data={entry} gave a {type(found).__name__}: expected a length and items "
            "(input, label)"
        )
    if not len(found):
        raise ValueError(f"--data={entry} is empty")
    return Slices(found, entry)


def batches(images: Any, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``(inputs, labels)``, ``size`` at a time."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
