"""What commands take: networks by entry or file, data by name, path or entry."""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import positive

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Given",
    "add_data",
    "add_model",
    "batches",
    "data_options",
    "load_data",
    "load_model",
    "load_saved",
    "object_of",
    "remembered",
]


# --- Python entries -------------------------------------------------------------------------


@contextmanager
def _path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def object_of(entry: str) -> Any:
    """The object that ``package.module:name`` or ``path/to/file.py:name`` names.

    This runs the module's code: an entry is code of the user's.

    Raises:
        ValueError: ``entry`` is no such text, or the module fails or lacks the name.
    """
    module, colon, name = entry.rpartition(":")
    if not colon or not module or not name:
        raise ValueError(
            f"{entry!r} is no entry: expected package.module:name or path/to/file.py:name"
        )
    try:
        if module.endswith(".py"):
            found = _from_file(Path(module))
        else:
            with _path(os.getcwd()):  # as python -m has it
                found = importlib.import_module(module)
    except FileNotFoundError:
        raise
    except Exception as e:
        raise ValueError(f"{entry!r}: {module} cannot be imported: {_said(e)}") from e
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{entry!r}: {module} has no {name!r}")
        found = getattr(found, part)
    return found


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"_snnkernels_entry_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _path(str(path.resolve().parent)):
        spec.loader.exec_module(module)
    return module


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# --- networks -------------------------------------------------------------------------------


@dataclass
class Given:
    """A network and where it came from."""

    model: nn.Module
    name: str
    about: dict[str, Any] = field(default_factory=dict)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that :func:`load_model` reads."""
    parser.add_argument(
        "model",
        help="package.module:factory or path/to/file.py:factory (a function without arguments "
        "that returns the network, or the network itself), or a .safetensors checkpoint that "
        "names its architecture",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE",
        help="state dict for the network of an entry: .safetensors, or what torch.save wrote (read "
        "with weights_only=True)",
    )  # fmt: skip


def load_model(model: str, weights: Path | None = None) -> Given:
    """The network of an entry (with ``weights``) or of a checkpoint, in eval mode, on the CPU.

    Raises:
        ValueError: an entry or file does not give a network; says which and why.
        FileNotFoundError: a file is missing.
    """
    from torch import nn

    if ":" not in model or Path(model).is_file():
        if weights is not None:
            raise ValueError(
                f"--weights={weights} is for entries: {model} is a checkpoint, with weights"
            )
        return _checkpoint(Path(model))
    found = object_of(model)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"{model!r} is a {type(found).__name__}, neither function nor network")
        try:
            found = found()
        except Exception as e:
            raise ValueError(f"{model!r} failed: {_said(e)}") from e
    if not isinstance(found, nn.Module):
        raise ValueError(f"{model!r} returned a {type(found).__name__}, not a torch.nn.Module")
    about: dict[str, Any] = {"entry": model}
    if weights is not None:
        about["weights"] = str(weights)
        about["sha256"] = load_weights(found, weights)
    return Given(found.eval(), model.rpartition(":")[2].split(".")[-1], about)


def _checkpoint(path: Path) -> Given:
    from ..conversion import ACTIVATIONS
    from ..models import load_checkpoint

    if path.suffix != ".safetensors" or not path.is_file():
        raise FileNotFoundError(
            f"model={str(path)!r} is neither an entry (module:factory, file.py:factory) nor a "
            ".safetensors file that exists"
        )
    found = load_checkpoint(path, activations=ACTIVATIONS)
    about = {"checkpoint": str(path), "architecture": found.architecture, "sha256": found.sha256}
    return Given(found.model, path.stem, about)


def load_weights(model: nn.Module, path: Path) -> str:
    """Load a state dict strictly and return the SHA-256 of its file.

    Raises:
        ValueError: the file is no state dict, or does not fit; names what differs.
        FileNotFoundError: there is no such file.
    """
    import hashlib
    import pickle

    import torch

    if not path.is_file():
        raise FileNotFoundError(f"--weights={path}: no such file")
    blob = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load
            except ImportError as e:
                raise ImportError(
                    ".safetensors needs safetensors: pip install 'snnkernels[hub]'"
                ) from e
            state: Any = load(blob)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(
            f"--weights={path} holds more than tensors, and nothing else is unpickled: save "
            "model.state_dict()"
        ) from e
    except ImportError:
        raise
    except Exception as e:
        raise ValueError(f"--weights={path} cannot be read: {_said(e)}") from e
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"--weights={path} holds no state dict: save model.state_dict()")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): v for key, v in state.items()}  # of DataParallel
    wanted = model.state_dict()
    wrong = [f"missing {key}" for key in wanted if key not in state]
    wrong += [f"unexpected {key}" for key in state if key not in wanted]
    wrong += [
        f"{key} is {list(state[key].shape)}, the network has {list(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"--weights={path} does not fit the network: {'; '.join(wrong[:4])}{more}")
    model.load_state_dict(state)
    return hashlib.sha256(blob).hexdigest()


def load_saved(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The network of a folder that ``convert`` or ``save_pretrained`` wrote, and convert.json.

    Raises:
        ValueError, FileNotFoundError: it holds none, or files are damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: expected one that `snnkernels convert` or save_pretrained wrote"
        )
    from ..hub import load_pretrained

    snn = load_pretrained(folder)
    about: dict[str, Any] = {}
    path = folder / "convert.json"
    if path.is_file():
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise ValueError(f"{path} is damaged: {e}") from e
        if not isinstance(about, dict):
            raise ValueError(f"{path} is damaged: expected an object")
    _points(snn, folder / "activations.safetensors")
    return snn, about


def _points(snn: Any, path: Path) -> None:
    """Put the sample of activations and answers back into the report."""
    if not path.is_file():
        return
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except Exception as e:
        raise ValueError(f"{path} is damaged: {_said(e)}") from e
    for row in snn.report.rows:
        points = found.get(row.name)
        if points is not None and points.dim() == 2 and len(points) == 2:
            row.points = points


# --- data -----------------------------------------------------------------------------------


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
    found = object_of(entry)
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
            raise ValueError(f"--data={entry} failed: {_said(e)}") from e
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
