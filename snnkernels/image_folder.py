"""A folder of images as a data set, decoded when it is indexed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageFolder"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue that torchvision's ImageNet networks are trained with."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue that go with it."""

_SUFFIXES = (".png", ".jpg", ".jpeg")
_SPLITS = {True: ("train", "training"), False: ("val", "test", "valid", "validation")}


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images of ``root/class/*.png|jpg``; ``set[i]`` is ``(float32 [C, size, size], int64)``.

    A slice, a list or an index tensor gives a batch. Classes are numbered in the order of their
    names; images stand in the order of their paths. With ``root/train`` and ``root/val`` (or
    ``test``) the split is one of them; without, all images are in both, which :attr:`split` says
    by being None. A folder that holds images itself has no classes: its labels are -1.

    Args:
        root: the folder.
        train: which split.
        size: the shorter side is resized to it (bilinear, antialiased), then the middle is cut
            out; None: images must have one size, which is kept.
        mean, std: ``(pixel - mean) / std`` of pixels in [0, 1]; one value makes images grey,
            three make them red, green and blue.
        limit: so many images, evenly spaced over the split, so that all classes are in it.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: an argument is not allowed. Indexing raises it for images that are damaged or
            differ in size.
        ImportError: Pillow is not installed.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        train: bool = True,
        *,
        size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        limit: int | None = None,
    ) -> None:
        try:
            import PIL  # noqa: F401
        except ImportError as e:
            raise ImportError("images need Pillow; install it with: pip install pillow") from e
        for name, value in (("size", size), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if len(mean) not in (1, 3) or len(mean) != len(std):
            raise ValueError(
                f"mean={list(mean)} and std={list(std)} must have one value each (grey) or three"
            )
        if not all(0 < s < float("inf") for s in std):
            raise ValueError(f"std={list(std)} must be positive and finite")
        self.root, self.size = Path(root), size
        self.mean, self.std = tuple(mean), tuple(std)
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {self.root}")
        home, self.split = self._split(train)
        self.classes = tuple(sorted(p.name for p in home.iterdir() if _is_class(p)))
        found = [(p, i) for i, name in enumerate(self.classes) for p in _images(home / name, True)]
        if not self.classes:
            found = [(p, -1) for p in _images(home, False)]
        if not found:
            raise FileNotFoundError(
                f"no image ({', '.join(_SUFFIXES)}) in {home}: expected {home}/CLASS/*.png"
            )
        if limit is not None and limit < len(found):
            found = [found[i * len(found) // limit] for i in range(limit)]
        self.paths = [p for p, _ in found]
        self.labels = torch.tensor([label for _, label in found], dtype=torch.int64)
        self.name = self.root.name + (f"/{self.split}" if self.split else "")
        self._shift = torch.tensor(self.mean).view(-1, 1, 1)
        self._scale = torch.tensor(self.std).view(-1, 1, 1)

    def _split(self, train: bool) -> tuple[Path, str | None]:
        for name in _SPLITS[train]:
            if (self.root / name).is_dir():
                return self.root / name, name
        for name in _SPLITS[not train]:
            if (self.root / name).is_dir():
                raise FileNotFoundError(
                    f"{self.root} has {name}, but none of {', '.join(_SPLITS[train])}"
                )
        return self.root, None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """Return normalised image(s) and label(s) for an int, a slice or indices."""
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        elif isinstance(index, Tensor) and index.dim():
            index = index.tolist()
        if isinstance(index, (range, list, tuple)):
            if not len(index):
                raise IndexError("no indices: there is no batch of no images")
            images = [self._image(i) for i in index]
            for i, image in zip(index, images, strict=True):
                if image.shape != images[0].shape:
                    raise ValueError(
                        f"{self.paths[i]} is {tuple(image.shape[1:])}, {self.paths[index[0]]} is "
                        f"{tuple(images[0].shape[1:])}: give size="
                    )
            return torch.stack(images), self.labels[list(index)]
        i = operator.index(index)
        return self._image(i), self.labels[i]

    def _image(self, index: int) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        path = self.paths[index]
        try:
            with Image.open(path, formats=["PNG", "JPEG"]) as opened:
                image = opened.convert("L" if len(self.mean) == 1 else "RGB")
        except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as e:
            raise ValueError(f"{path} is not a readable image: {e}") from e
        if self.size is not None:
            image = _middle(image, self.size)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        return (pixels.float() / 255 - self._shift) / self._scale


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and bool(_images(path, True))


def _images(folder: Path, deep: bool) -> list[Path]:
    paths = folder.rglob("*") if deep else folder.iterdir()
    return sorted(p for p in paths if p.suffix.lower() in _SUFFIXES and p.is_file())


def _middle(image: Any, size: int) -> Any:
    from PIL import Image

    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
