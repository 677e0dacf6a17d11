"""Networks by entry, by checkpoint, or from a saved folder."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import entries
from .entries import said

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Given", "add_device", "add_model", "device_of", "hash_of", "load_model", "load_saved"]


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, which :func:`device_of` reads."""
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu (default), cuda or cuda:N"
    )


def device_of(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        ValueError: there is none here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device={name} is not known; allowed: cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device={name}: torch sees {torch.cuda.device_count()} CUDA devices here; see "
            "`snnkernels info`"
        )
    return device


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
    found = entries.object_of(model)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"{model!r} is a {type(found).__name__}, neither function nor network")
        try:
            found = found()
        except Exception as e:
            raise ValueError(f"{model!r} failed: {said(e)}") from e
    if not isinstance(found, nn.Module):
        raise ValueError(f"{model!r} returned a {type(found).__name__}, not a torch.nn.Module")
    about: dict[str, Any] = {"entry": model}
    if weights is not None:
        about["weights"] = str(weights)
        about["sha256"] = load_weights(found, weights)
    return Given(found.eval(), model.rpartition(":")[2].split(".")[-1], about)


def hash_of(given: Given) -> str:
    """SHA-256 of the file of the weights, or of the state that an entry came with."""
    if "sha256" not in given.about:
        import hashlib

        import torch

        seen = hashlib.sha256()
        for key, value in given.model.state_dict().items():
            seen.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            seen.update(bits.numpy().tobytes())
        given.about["sha256"] = seen.hexdigest()
    return str(given.about["sha256"])


def _checkpoint(path: Path) -> Given:
    from ..conversion import ACTIVATIONS
    from ..models import load_checkpoint

    if path.suffix != ".safetensors" or not path.is_file():
        raise FileNotFoundError(
            f"model={str(path)!r} is neither an entry (module:factory, file.py:factory) nor a "
            ".safetensors file that exists: give one of these"
        )
    try:
        found = load_checkpoint(path, activations=ACTIVATIONS)
    except ValueError as e:
        if "does not name its architecture" not in str(e):
            raise
        raise ValueError(
            f"{e}. For a network of your own: module:factory or file.py:factory with "
            f"--weights {path}"
        ) from e
    about = {"checkpoint": str(path), "architecture": found.architecture, "sha256": found.sha256}
    return Given(found.model, path.stem, about)


def load_weights(model: nn.Module, path: Path) -> str:
    """Load a state dict strictly and return the SHA-256 of its file.

    Warns where torch is too old to read its own format safely.

    Raises:
        ValueError: the file is no state dict, or does not fit; names what differs.
        FileNotFoundError: there is no such file.
    """
    import hashlib
    import io
    import pickle
    import warnings

    import torch

    from ..hub.shared import safetensors_package
    from ..models.checkpoints import differences

    if not path.is_file():
        raise FileNotFoundError(f"--weights={path}: no such file")
    load = safetensors_package().torch.load if path.suffix == ".safetensors" else None
    if load is None and torch.__version__ < "2.10":  # a TorchVersion: compared as a version
        warnings.warn(
            f"--weights={path}: with torch {torch.__version__} a crafted file of this format can "
            "run code, weights_only or not (CVE-2026-24747, before torch 2.10). If it is not "
            "yours, use torch 2.10 or later, or safetensors",
            UserWarning,
            stacklevel=2,
        )
    blob = path.read_bytes()
    try:
        if load is not None:
            state: Any = load(blob)
        else:
            state = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(
            f"--weights={path} holds more than tensors, and nothing else is unpickled: save "
            "model.state_dict()"
        ) from e
    except Exception as e:
        raise ValueError(f"--weights={path} cannot be read: {said(e)}") from e
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"--weights={path} holds no state dict: save model.state_dict()")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): v for key, v in state.items()}  # of DataParallel
    if wrong := differences(model, state):
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"--weights={path} does not fit the network: {'; '.join(wrong[:4])}{more}")
    model.load_state_dict(state)
    return hashlib.sha256(blob).hexdigest()


def load_saved(folder: Path, device: str = "cpu") -> tuple[Any, dict[str, Any]]:
    """The network of a folder that ``convert`` or ``save_pretrained`` wrote, and convert.json.

    Raises:
        ValueError, FileNotFoundError: it holds none, or files are damaged.
    """
    where = device_of(device)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: expected one that `snnkernels convert` or save_pretrained wrote"
        )
    from ..hub import load_pretrained

    snn = load_pretrained(folder, device=where)
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
        raise ValueError(f"{path} is damaged: {said(e)}") from e
    for row in snn.report.rows:
        points = found.get(row.name)
        if points is not None and points.dim() == 2 and len(points) == 2:
            row.points = points
