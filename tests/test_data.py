"""Image sets: each format from a tiny archive made here; damaged and foreign files are refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support import optional
from torch.utils.data import DataLoader

from snnkernels import data

N = 3  # images a batch


def batch(i: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(i)
    return rng.integers(0, 256, (N, 3072), np.uint8), rng.integers(0, 10, N).tolist()


def python2_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes Python 2 and the numpy of 2009 wrote, as in the official archive."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    raw = images.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + (b"cnumpy\nndarray\n" + integer(0) + b"\x85" + short(b"b") + b"\x87R")
        + (b"(" + integer(1) + integer(len(images)) + integer(3072) + b"\x86")
        + (b"cnumpy\ndtype\n" + short(b"u1") + integer(0) + integer(1) + b"\x87R")
        + (b"(" + integer(3) + short(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0))
        + (b"tb" + b"\x89" + b"T" + struct.pack("<i", len(raw)) + raw + b"tb")
    )
    items = short(b"data") + array + short(b"labels")
    items += b"](" + b"".join(integer(v) for v in labels) + b"e"
    items += short(b"batch_label") + short(b"testing batch 1 of 1")
    return b"\x80\x02}(" + items + b"u."


def python3_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({"data": images, "labels": labels}, protocol=2)


def binary(images: np.ndarray, labels: list[int]) -> bytes:
    records = [
        bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)
    ]
    return b"".join(records)


NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
FORMATS = {
    "python2": (python2_pickle, "cifar-10-batches-py", ""),
    "python3": (python3_pickle, "cifar-10-batches-py", ""),
    "binary": (binary, "cifar-10-batches-bin", ".bin"),
}


def write_folder(root: Path, fmt: str) -> Path:
    encode, folder, suffix = FORMATS[fmt]
    target = root / folder
    target.mkdir()
    for i, name in enumerate(NAMES):
        (target / (name + suffix)).write_bytes(encode(*batch(i)))
    return target


def write_archive(root: Path, fmt: str) -> Path:
    staging = root / "staging"
    staging.mkdir()
    folder = write_folder(staging, fmt)
    kind = "binary" if fmt == "binary" else "python"
    archive = root / f"cifar-10-{kind}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


def write_bundle(path: Path, **changes: object) -> Path:
    from PIL import Image

    content: dict[str, object] = {"classes": np.array(data.CIFAR10_CLASSES)}
    for split, start in (("train", 0), ("test", 100)):
        files = []
        for i in range(N):
            buffer = io.BytesIO()
            colour = (20 * i + start, 50, 200 - 30 * i)
            Image.new("RGB", (32, 32), colour).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
        content[f"{split}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        content[f"{split}_offsets"] = np.cumsum([0, *map(len, files)]).astype(np.int32)
        content[f"{split}_labels"] = np.arange(N, dtype=np.uint8)
    content.update(changes)
    np.savez_compressed(path, **{k: v for k, v in content.items() if v is not None})
    return path


def expected(train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [batch(i) for i in (range(5) if train else [5])]
    images = np.concatenate([p[0] for p in parts]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.tensor([v for p in parts for v in p[1]])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("where", ["folder", "parent", "archive", "parent of archive"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_official_formats(tmp_path: Path, fmt: str, where: str, train: bool) -> None:
    path = (write_archive if "archive" in where else write_folder)(tmp_path, fmt)
    found = data.cifar10(path.parent if where.startswith("parent") else path, train=train)
    images, labels = expected(train)
    assert torch.equal(found.images, images)
    assert torch.equal(found.labels, labels)
    assert found.name == "CIFAR-10"


def test_limit_reads_no_further_than_needed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "binary")
    (folder / "data_batch_3.bin").unlink()
    found = data.cifar10(folder, limit=N + 1)
    images, labels = expected(True)
    assert torch.equal(found.images, images[: N + 1])
    assert torch.equal(found.labels, labels[: N + 1])
    with pytest.raises(FileNotFoundError, match="lacks data_batch_3"):
        data.cifar10(folder)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        data.cifar10(folder, limit=0)


def test_normalisation_constants(tmp_path: Path) -> None:
    found = data.cifar10(write_folder(tmp_path, "binary"), train=False)
    x, y = found[1]
    assert x.dtype == torch.float32
    assert x.shape == (3, 32, 32)
    assert y.dtype == torch.int64
    pixels = found.images[1].double() / 255
    mean, std = (torch.tensor(c).double().view(3, 1, 1) for c in (found.mean, found.std))
    torch.testing.assert_close(x.double(), (pixels - mean) / std, rtol=0, atol=2e-6)
    batch_x, batch_y = found[:2]
    assert torch.equal(batch_x[1], x)
    assert batch_y.tolist() == found.labels[:2].tolist()
    loaded = next(iter(DataLoader(found, batch_size=2)))
    assert torch.equal(loaded[0], batch_x)
    assert len(found) == N


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz or .*cs\.toronto"):
            data.cifar10(path)


@pytest.mark.parametrize("fmt", FORMATS)
def test_damaged_folder(tmp_path: Path, fmt: str) -> None:
    folder = write_folder(tmp_path, fmt)
    path = next(folder.glob("test_batch*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"not a batch|whole records"):
        data.cifar10(folder, train=False)


@pytest.mark.parametrize("cut", [0.5, 0.98])
def test_truncated_archive(tmp_path: Path, cut: float) -> None:
    archive = write_archive(tmp_path, "python2")
    blob = archive.read_bytes()
    archive.write_bytes(blob[: int(cut * len(blob))])
    with pytest.raises(ValueError, match="not a readable tar archive"):
        data.cifar10(archive)


def test_wrong_contents(tmp_path: Path) -> None:
    archive = tmp_path / "other.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(__file__, "readme.txt")
    with pytest.raises(FileNotFoundError, match="lacks test_batch"):
        data.cifar10(archive, train=False)
    folder = write_folder(tmp_path, "python2")
    images, labels = batch(0)
    for wrong in ((images[:, :10], labels), (images, labels[:2]), (images.astype("i4"), labels)):
        (folder / "test_batch").write_bytes(python3_pickle(*wrong))
        with pytest.raises(ValueError, match=r"expected uint8 data \[N, 3072\]"):
            data.cifar10(folder, train=False)
    (folder / "test_batch").write_bytes(python3_pickle(images, [0, 1, 10]))
    with pytest.raises(ValueError, match=r"labels must be 0 to 9, found 0\.\.10"):
        data.cifar10(folder, train=False)


class Malice:
    def __reduce__(self):
        return (os.putenv, ("SNNKERNELS_TEST_MALICE", "1"))


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_pickles_run_no_code(tmp_path: Path, protocol: int) -> None:
    folder = write_folder(tmp_path, "python2")
    content = {"data": Malice(), "labels": [0]}
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match="putenv is not allowed"):
        data.cifar10(folder, train=False)


def test_object_arrays_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "python2")
    objects = np.array([[object] * 3072], dtype=object)
    (folder / "test_batch").write_bytes(python3_pickle(objects, [0]))
    with pytest.raises(ValueError, match="not allowed"):
        data.cifar10(folder, train=False)


def test_jpeg_bundle(tmp_path: Path) -> None:
    optional("PIL")
    path = write_bundle(tmp_path / "bundle.npz")
    for train, start in ((True, 0), (False, 100)):
        found = data.cifar10_jpeg(path, train)
        assert found.name == "CIFAR-10, JPEG copies"
        assert found.labels.tolist() == list(range(N))
        for i in range(N):
            colour = torch.tensor([20 * i + start, 50, 200 - 30 * i]).view(3, 1, 1)
            assert (found.images[i].int() - colour).abs().max() <= 4  # JPEG loses a little
    assert len(data.cifar10_jpeg(path, limit=2)) == 2


def test_damaged_bundle(tmp_path: Path) -> None:
    optional("PIL")
    path = tmp_path / "bundle.npz"
    with pytest.raises(FileNotFoundError, match="no JPEG bundle"):
        data.cifar10_jpeg(path)
    write_bundle(path, train_labels=None)
    with pytest.raises(ValueError, match=r"not a JPEG bundle.*train_labels"):
        data.cifar10_jpeg(path)
    for change in (
        {"train_offsets": np.array([0, 5, 3, 9])},
        {"train_offsets": np.array([0, 5, 9])},
        {"train_offsets": np.array([0, 5, 9, 10**8])},
        {"train_bytes": np.zeros(9)},
    ):
        write_bundle(path, **change)
        with pytest.raises(ValueError, match="not a JPEG bundle"):
            data.cifar10_jpeg(path)
    write_bundle(path, train_labels=np.array([0, 1, 99], np.uint8))
    with pytest.raises(ValueError, match="labels must be 0 to 9"):
        data.cifar10_jpeg(path)
    write_bundle(path, train_offsets=np.array([0, 40, 80, 120]))
    with pytest.raises(ValueError, match="train image 0 is not a readable JPEG"):
        data.cifar10_jpeg(path)
    blob = write_bundle(path).read_bytes()
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    for damaged in (blob[:200], b"hello", b"", single.getvalue()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not a readable \.npz file"):
            data.cifar10_jpeg(path)


def test_load_cifar10_takes_both(tmp_path: Path) -> None:
    optional("PIL")
    bundle = write_bundle(tmp_path / "bundle.npz")
    assert data.load_cifar10(bundle, False).name == "CIFAR-10, JPEG copies"
    assert data.load_cifar10(write_folder(tmp_path, "binary"), False).name == "CIFAR-10"


def test_digits() -> None:
    optional("sklearn")
    train, test = data.digits(True), data.digits(False)
    assert (len(train), len(test)) == (1433, 364)
    assert train.images.shape[1:] == (1, 8, 8)
    assert torch.bincount(test.labels).tolist() == [36, 37, 36, 37, 37, 37, 37, 36, 35, 36]
    x = torch.cat([train[:][0], test[:][0]])
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3
    assert torch.equal(data.digits(False).images, test.images)


@pytest.mark.parametrize(
    ("module", "call", "package"),
    [("sklearn.datasets", "digits", "scikit-learn"), ("PIL", "jpeg", "pillow")],
)
def test_missing_packages_name_the_command(
    monkeypatch, tmp_path: Path, module, call, package
) -> None:
    path = tmp_path / "bundle.npz"
    path.touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        data.digits() if call == "digits" else data.cifar10_jpeg(path)
