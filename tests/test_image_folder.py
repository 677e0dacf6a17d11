"""Folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import optional

from snnkernels.image_folder import ImageFolder

optional("PIL")
from PIL import Image  # noqa: E402


def write(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, six images of 4 x 4 whose red is their number."""
    for i, name in enumerate(
        ("b/1.png", "b/2.PNG", "a/x.png", "a/deep/y.png", "b/3.png", "a/z.png")
    ):
        pixels = np.zeros((4, 4, 3))
        pixels[..., 0] = 51 * i
        write(tmp_path / name, pixels)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_classes_and_images_stand_in_order(folder: Path) -> None:
    images = ImageFolder(folder, mean=(0, 0, 0), std=(1, 1, 1))
    assert images.classes == ("a", "b")
    assert images.split is None
    assert [str(p.relative_to(folder)) for p in images.paths] == [
        "a/deep/y.png", "a/x.png", "a/z.png", "b/1.png", "b/2.PNG", "b/3.png",
    ]  # fmt: skip
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    x, y = images[:]
    assert x.shape == (6, 3, 4, 4)
    assert x.dtype == torch.float32
    assert torch.allclose(x[:, 0, 0, 0], torch.tensor([3, 2, 5, 0, 1, 4]) / 5)
    assert torch.equal(x[:, 1:], torch.zeros(6, 2, 4, 4))
    assert torch.equal(y, images.labels)
    one, label = images[4]
    assert torch.equal(one, x[4])
    assert label == 1
    assert torch.equal(images[torch.tensor([4, 0])][0], x[[4, 0]])
    assert torch.equal(images[-2:][0], x[-2:])
    with pytest.raises(IndexError):
        images[6]
    with pytest.raises(IndexError, match="no images"):
        images[6:]


def test_normalised_with_the_constants_given(folder: Path) -> None:
    x = ImageFolder(folder, mean=(0.5, 0.25, 0), std=(0.5, 0.25, 2))[0][0]
    assert torch.allclose(x[:, 0, 0], torch.tensor([0.2, -1.0, 0.0]))
    grey = ImageFolder(folder, mean=(0.0,), std=(1.0,))[0][0]
    assert grey.shape == (1, 4, 4)
    assert float(grey[0, 0, 0]) == pytest.approx(round(0.299 * 153) / 255, abs=0.005)


def test_a_limit_takes_of_all_classes(folder: Path) -> None:
    images = ImageFolder(folder, limit=2)
    assert images.labels.tolist() == [0, 1]
    assert len(ImageFolder(folder, limit=100)) == 6


def test_the_middle_is_cut_out(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3))
    pixels[:, 4:12] = 255
    write(tmp_path / "wide" / "a.png", pixels)
    x = ImageFolder(tmp_path, size=4, mean=(0, 0, 0), std=(1, 1, 1))[0][0]
    assert x.shape == (3, 4, 4)
    assert float(x[:, :, 1:3].min()) == 1.0
    up = ImageFolder(tmp_path, size=12, mean=(0, 0, 0), std=(1, 1, 1))[0][0]
    assert up.shape == (3, 12, 12)


def test_splits(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "train/b/0.png", "val/a/1.png"):
        write(tmp_path / name, np.zeros((2, 2, 3)))
    assert len(ImageFolder(tmp_path, train=True)) == 2
    test = ImageFolder(tmp_path, train=False)
    assert (len(test), test.split, test.name) == (1, "val", f"{tmp_path.name}/val")
    (tmp_path / "val").rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="has train, but none of val, test"):
        ImageFolder(tmp_path, train=False)


def test_images_without_classes(tmp_path: Path) -> None:
    write(tmp_path / "a.png", np.zeros((2, 2, 3)))
    images = ImageFolder(tmp_path)
    assert images.classes == ()
    assert images[:][1].tolist() == [-1]


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageFolder(tmp_path / "no")
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image \(.png, .jpg, .jpeg\)"):
        ImageFolder(tmp_path / "bare")
    for wrong, says in (
        ({"size": 0}, "size=0"), ({"limit": 0}, "limit=0"),
        ({"mean": (0, 0), "std": (1, 1)}, "one value each"),
        ({"mean": (0, 0, 0), "std": (1, 1)}, "one value each"),
        ({"mean": (0,), "std": (0,)}, "std=.* must be positive"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            ImageFolder(folder, **wrong)
    write(folder / "b" / "large.png", np.zeros((5, 4, 3)))
    with pytest.raises(ValueError, match=r"large.png is \(5, 4\), .* give size="):
        ImageFolder(folder)[:]
    (folder / "a" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ValueError, match=r"bad.png is not a readable image"):
        ImageFolder(folder)[0]
