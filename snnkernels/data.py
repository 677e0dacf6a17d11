"""Image sets for demos, tests and benchmarks, read from what is on disk; nothing is downloaded.

Each reader returns an :class:`ImageSet`: pixels stay uint8 in memory and become normalised float32
when indexed, with the constants given here.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

__all__ = [
    "CIFAR10_CLASSES",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "DIGITS_MEAN",
    "DIGITS_STD",
    "ImageSet",
    "cifar10",
    "cifar10_jpeg",
    "digits",
    "load_cifar10",
]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
"""Mean of red, green and blue over the CIFAR-10 training images, pixels in [0, 1]."""
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
"""Standard deviation of red, green and blue, pixels in [0, 1]."""
CIFAR10_CLASSES = (
    "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
)
"""Class names in the order of the labels."""
DIGITS_MEAN = (0.3053,)
"""Mean over scikit-learn's digits, pixels in [0, 1]."""
DIGITS_STD = (0.3760,)
"""Standard deviation over scikit-learn's digits, pixels in [0, 1]."""

_CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
_Arrays = tuple[np.ndarray, np.ndarray]


class ImageSet(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images and labels; ``set[i]`` is ``(float32 [C, H, W], int64 scalar)``.

    A slice or an index tensor gives a batch: ``set[:8]`` is ``(float32 [8, C, H, W], int64 [8])``.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        name: what tables print.
        classes: the name of each label.
        mean: of each channel; pixels are normalised as ``(pixel - mean) / std``.
        std: of each channel.
        full_scale: the value in ``images`` that is a pixel of 1.

    Raises:
        TypeError: images or labels of another type.
        ValueError: a shape, a ``mean``, ``std`` or ``full_scale`` that does not fit.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        name: str,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        full_scale: float = 255.0,
    ) -> None:
        for name, tensor, dtype in (("images", images, torch.uint8), ("labels", labels, torch.int64)):
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            if got != dtype:
                raise TypeError(f"{name} must be a tensor of {dtype}, got {got}")
        if images.dim() != 4 or tuple(labels.shape) != (len(images),):
            raise ValueError(
                f"images is {tuple(images.shape)} and labels {tuple(labels.shape)}; they must be "
                "[N, C, H, W] and [N]"
            )
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != images.shape[1]:
                raise ValueError(
                    f"{name} has {len(values)} values for {images.shape[1]} channels of images; "
                    "it must have one for each"
                )
        if not all(0 < s < float("inf") for s in std):
            raise ValueError(f"std={std!r} must be positive and finite")
        if not 0 < full_scale < float("inf"):
            raise ValueError(f"full_scale={full_scale!r} must be positive and finite")
        self.images = images
        self.labels = labels
        self.name = name
        self.classes = tuple(classes)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._scale = torch.tensor([1 / (full_scale * s) for s in std]).view(-1, 1, 1)
        self._shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalised image(s) and label(s) for an int, a slice or an index tensor."""
        return self.images[index] * self._scale - self._shift, self.labels[index]


def digits(train: bool = True) -> ImageSet:
    """Return scikit-learn's handwritten digits, 8x8 grey: 1,433 to train with or 364 to test on.

    Every fifth image of each class is a test image, so the split is the same everywhere. Raises
    :class:`ImportError` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError(
            "the digits come with scikit-learn; install it with: pip install scikit-learn"
        ) from e
    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        test[(labels == digit).nonzero().flatten()[::5]] = True
    keep = ~test if train else test
    return ImageSet(
        images[keep],
        labels[keep],
        name="scikit-learn digits",
        classes=[str(d) for d in range(10)],
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
        full_scale=16.0,
    )


def load_cifar10(
    path: str | PathLike[str], train: bool = True, *, limit: int | None = None
) -> ImageSet:
    """Return CIFAR-10 from a JPEG bundle (a ``.npz`` file) or from the official archives.

    The result's ``name`` says which one it was.

    Args:
        path: the ``.npz`` file (:func:`cifar10_jpeg`), or what :func:`cifar10` takes.
        train: the training images; else the test images.
        limit: only so many, the first.

    Raises:
        OSError, ImportError, ValueError: as :func:`cifar10_jpeg` and :func:`cifar10`.
    """
    if Path(path).suffix == ".npz":
        return cifar10_jpeg(path, train, limit=limit)
    return cifar10(path, train, limit=limit)


def cifar10(root: str | PathLike[str], train: bool = True, *, limit: int | None = None) -> ImageSet:
    """Return CIFAR-10 from its official archives on disk.

    Images are uint8 ``[N, 3, 32, 32]`` in the archive's order. The pickles of the Python version
    are read by an unpickler that builds arrays, lists, numbers and bytes and nothing else.

    Args:
        root: ``cifar-10-python.tar.gz``, ``cifar-10-binary.tar.gz``, a folder extracted from one of
            them (``cifar-10-batches-py``, ``cifar-10-batches-bin``), or the folder that holds any
            of these.
        train: the training images; else the test images.
        limit: only so many, the first.

    Raises:
        FileNotFoundError: none is there, or a batch is missing.
        ValueError: a file is damaged; ``limit`` is below 1.
    """
    _check_limit(limit)
    source = _find_cifar10(Path(root))
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    parts: list[_Arrays] = []
    missing = limit
    for label, blob, binary in _batches(source, names):
        images, labels = (_parse_binary if binary else _parse_pickle)(blob, label)
        parts.append((images[:missing], labels[:missing]))
        if missing is not None:
            missing -= len(parts[-1][1])
            if missing <= 0:
                break
    images = np.concatenate([p[0] for p in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([p[1] for p in parts])
    return _cifar_set(images, labels, "CIFAR-10")


def cifar10_jpeg(
    path: str | PathLike[str], train: bool = True, *, limit: int | None = None
) -> ImageSet:
    """Return CIFAR-10 from a bundle of JPEG copies.

    The bundle is a ``.npz`` file with, for ``train`` and ``test``: ``*_bytes`` (uint8, the JPEG
    files one after the other), ``*_offsets`` (int, one more than there are images; file i is
    ``bytes[offsets[i]:offsets[i + 1]]``) and ``*_labels`` (uint8). Images are uint8
    ``[N, 3, 32, 32]`` in the bundle's order. Accuracies are those of JPEG copies, which the name
    of the set says.

    Args:
        path: the ``.npz`` file.
        train: the training images; else the test images.
        limit: only so many, the first.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: Pillow is not installed.
        ValueError: the file is no such bundle or is damaged; ``limit`` is below 1.
    """
    _check_limit(limit)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no JPEG bundle at {path}; expected a .npz file with train_bytes, train_offsets, "
            "train_labels and the same for test"
        )
    try:
        from PIL import Image
    except ImportError as e:
        raise ImportError("JPEG images need Pillow; install it with: pip install pillow") from e

    split = "train" if train else "test"
    keys = [f"{split}_bytes", f"{split}_offsets", f"{split}_labels"]
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as bundle:
            blob, offsets, labels = (bundle[key] for key in keys)
    except KeyError as e:
        raise ValueError(f"{path} is not a JPEG bundle: {e}; expected {', '.join(keys)}") from e
    except (ValueError, TypeError, AttributeError, OSError, EOFError) as e:
        raise ValueError(f"{path} is not a readable .npz file: {e}") from e
    except (zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path} is not a readable .npz file: {e}") from e
    _check_bundle(path, blob, offsets, labels)

    labels = labels[:limit]
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    for i in range(len(labels)):
        jpeg = blob[offsets[i] : offsets[i + 1]].tobytes()
        try:
            # Only JPEG: Pillow would otherwise try every decoder it has on bytes from a file.
            with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as e:
            raise ValueError(f"{path}: {split} image {i} is not a readable JPEG file: {e}") from e
        if pixels.shape != (32, 32, 3):
            raise ValueError(f"{path}: {split} image {i} is {pixels.shape[:2]}, not 32x32")
        images[i] = pixels
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return _cifar_set(images, labels, "CIFAR-10, JPEG copies")


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")


def _cifar_set(images: np.ndarray, labels: np.ndarray, name: str) -> ImageSet:
    return ImageSet(
        torch.from_numpy(images),
        torch.from_numpy(labels.astype(np.int64)),
        name=name,
        classes=CIFAR10_CLASSES,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )


def _check_labels(labels: np.ndarray, where: str) -> None:
    if labels.size and (labels.min() < 0 or labels.max() > 9):
        raise ValueError(f"{where}: labels must be 0 to 9, found {labels.min()}..{labels.max()}")


def _check_bundle(path: Path, blob: np.ndarray, offsets: np.ndarray, labels: np.ndarray) -> None:
    ok = (
        blob.dtype == np.uint8
        and all(a.ndim == 1 for a in (blob, offsets, labels))
        and offsets.dtype.kind in "iu"
        and labels.dtype.kind in "iu"
        and len(offsets) == len(labels) + 1
        and offsets[0] >= 0
        and bool((offsets[1:] >= offsets[:-1]).all())
        and offsets[-1] <= len(blob)
    )
    if not ok:
        raise ValueError(
            f"{path} is not a JPEG bundle: bytes must be uint8 and offsets non-decreasing within "
            f"them, one more than labels; got {len(blob)} bytes, {len(offsets)} offsets, "
            f"{len(labels)} labels"
        )
    _check_labels(labels, str(path))


_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")


def _find_cifar10(root: Path) -> Path:
    """Return the archive, or the folder with the batches, that ``root`` stands for."""
    if root.is_file():
        return root
    if root.is_dir():
        if any(root.glob("*_batch*")):
            return root
        for name in (*_FOLDERS, *_ARCHIVES):
            if (root / name).exists():
                return root / name
    raise FileNotFoundError(
        f"no CIFAR-10 at {root}; expected {' or '.join(_ARCHIVES)} from {_CIFAR_HOME}, a folder "
        f"extracted from one of them ({' or '.join(_FOLDERS)}), or the folder that holds it"
    )


def _batches(source: Path, names: list[str]) -> Iterator[tuple[str, bytes, bool]]:
    """Yield (what to call it, content, whether it is the binary version) for each batch."""
    if source.is_dir():
        for name in names:
            found = [p for p in (source / name, source / f"{name}.bin") if p.is_file()]
            if not found:
                raise FileNotFoundError(
                    f"{source} lacks {name}; expected all files of an archive from {_CIFAR_HOME}"
                )
            yield str(found[0]), found[0].read_bytes(), found[0].suffix == ".bin"
        return
    try:
        with tarfile.open(source) as tar:
            members = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}
            for name in names:
                member = members.get(name) or members.get(f"{name}.bin")
                if member is None:
                    raise FileNotFoundError(
                        f"{source} lacks {name}; expected an archive from {_CIFAR_HOME}"
                    )
                stream = tar.extractfile(member)
                assert stream is not None  # isfile() above
                yield f"{source}: {member.name}", stream.read(), member.name.endswith(".bin")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as e:
        if isinstance(e, FileNotFoundError):
            raise
        raise ValueError(
            f"{source} is not a readable tar archive ({e}); get it again from {_CIFAR_HOME}"
        ) from e


def _parse_binary(blob: bytes, where: str) -> _Arrays:
    """Records of one label byte and 3 x 32 x 32 pixel bytes."""
    if not blob or len(blob) % 3073:
        raise ValueError(f"{where}: {len(blob)} bytes are not whole records of 3073 bytes")
    records = np.frombuffer(blob, np.uint8).reshape(-1, 3073)
    _check_labels(records[:, 0], where)
    return records[:, 1:].copy(), records[:, 0].copy()


def _parse_pickle(blob: bytes, where: str) -> _Arrays:
    """A pickled dictionary with ``data`` (uint8 [N, 3072]) and ``labels`` (list of int)."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(blob), encoding="bytes").load()
        # Keys are bytes when Python 2 wrote the file, as the official one was.
        entries = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images, labels = entries["data"], np.asarray(entries["labels"])
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{where} is not a batch of CIFAR-10: {type(e).__name__}: {e}") from e
    ok = (
        isinstance(images, np.ndarray)
        and images.dtype == np.uint8
        and images.ndim == 2
        and images.shape[1] == 3072
        and labels.dtype.kind in "iu"
        and labels.shape == images.shape[:1]
    )
    if not ok:
        raise ValueError(f"{where}: expected uint8 data [N, 3072] and N labels")
    _check_labels(labels, where)
    return images, labels.astype(np.uint8)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays out of a pickle and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _plain_dtype,
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a batch of images")


def _empty_array(kind: object, shape: object, code: object) -> np.ndarray:
    # What numpy's own _reconstruct is called with; the array's state is set right after.
    return np.ndarray((0,), np.int8)


def _plain_dtype(code: str | bytes, align: int = 0, copy: int = 1) -> np.dtype:
    text = code.decode() if isinstance(code, bytes) else code
    if text not in ("u1", "i1", "i2", "i4", "i8"):
        raise pickle.UnpicklingError(f"arrays of {text!r} are not allowed in a batch of images")
    return np.dtype(text, align=False, copy=True)


def _latin1(text: str, encoding: str) -> bytes:
    # Python 3 writes bytes into a protocol-2 pickle as this call.
    return text.encode("latin-1")
