"""Checkpoints: a network's weights in a file that names its architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import write_bytes
from .networks import ARCHITECTURES, Activation

__all__ = ["Checkpoint", "differences", "load_checkpoint", "save_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A network read from a file, and which file it was."""

    model: nn.Module
    """The network, in eval mode, on the CPU."""
    architecture: str
    """Its key in :data:`ARCHITECTURES`."""
    sha256: str
    """SHA-256 of the file, 64 hexadecimal digits."""
    metadata: dict[str, str]
    """The file's metadata, as stored."""

    @property
    def hash(self) -> str:
        """The first 12 digits of the file's SHA-256: enough to name it in a table."""
        return self.sha256[:12]


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as e:
        raise ImportError(
            "checkpoints need safetensors; install it with: pip install safetensors"
        ) from e
    return safetensors


def save_checkpoint(
    model: nn.Module, path: str | PathLike[str], architecture: str, **metadata: object
) -> None:
    """Write the state dict of ``model`` to a safetensors file that names its architecture.

    Args:
        model: the network.
        path: of the file; an older one is replaced once the new one is complete.
        architecture: its key in :data:`ARCHITECTURES`.
        metadata: stored as text (``activation="qcfs", L=8``).

    Raises:
        ImportError: safetensors is not installed.
        ValueError: :data:`ARCHITECTURES` does not know the architecture.
        TypeError: ``model`` is no module.
        OSError: the folder does not exist, or cannot be written to.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {_names()}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    # Copies: safetensors refuses parameters that share memory.
    layout = torch.contiguous_format
    state = {k: v.detach().cpu().clone(memory_format=layout) for k, v in model.state_dict().items()}
    stored = {"architecture": architecture, **{key: str(value) for key, value in metadata.items()}}
    write_bytes(path, _safetensors().torch.save(state, stored))


def load_checkpoint(
    path: str | PathLike[str],
    *,
    architecture: str | None = None,
    activations: Mapping[str, Callable[[Mapping[str, str]], nn.Module]] | None = None,
    pool: str | None = None,
) -> Checkpoint:
    """Read a safetensors file into the network that its metadata names.

    The metadata holds ``architecture`` and may hold ``activation`` (default ``relu``), the
    activation's own settings (``L``) and ``pool``. ``activations`` maps a name to a function from
    the metadata to a fresh module::

        load_checkpoint(path, activations={"qcfs": lambda meta: QCFS(levels=int(meta["L"]))})

    ``architecture`` and ``pool``, when given, win over the metadata. Input channels and classes
    are read from the weights. Raises :class:`FileNotFoundError`, :class:`ImportError` without
    safetensors, and :class:`ValueError` when the file is not safetensors, names nothing known, or
    holds other tensors than the network (the differing keys are listed).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; expected a .safetensors file")
    safetensors = _safetensors()
    blob = path.read_bytes()
    try:
        with safetensors.safe_open(str(path), "pt") as f:
            metadata = dict(f.metadata() or {})
        state = safetensors.torch.load(blob)
    except (safetensors.SafetensorError, OSError) as e:
        raise ValueError(f"{path} is not a readable safetensors file: {e}") from e

    name = architecture or metadata.get("architecture")
    if name is None:
        raise ValueError(
            f"{path} does not name its architecture in its metadata; pass architecture=, "
            f"one of {_names()}"
        )
    if name not in ARCHITECTURES:
        raise ValueError(f"{path} names the unknown architecture {name!r}; known: {_names()}")

    options: dict[str, Any] = {"activation": _activation_factory(path, metadata, activations)}
    pool = pool or metadata.get("pool")
    if pool is not None:
        options["pool"] = pool
    options.update(_sizes(state))
    model = ARCHITECTURES[name](**options)
    if wrong := differences(model, state):
        shown = "; ".join(wrong[:8]) + ("; ..." if len(wrong) > 8 else "")
        raise ValueError(f"{path} does not fit {name}: {len(wrong)} differences: {shown}")
    model.load_state_dict(state)
    return Checkpoint(model.eval(), name, hashlib.sha256(blob).hexdigest(), metadata)


def _names() -> str:
    return ", ".join(ARCHITECTURES)


def _activation_factory(
    path: Path,
    metadata: Mapping[str, str],
    activations: Mapping[str, Callable[[Mapping[str, str]], nn.Module]] | None,
) -> Activation:
    name = metadata.get("activation", "relu")
    known = {"relu": lambda meta: nn.ReLU(), **(activations or {})}
    if name not in known:
        raise ValueError(
            f"{path} was trained with the activation {name!r}, which was not given; pass "
            f"activations={{{name!r}: function from the metadata to a module}} "
            f"(known here: {', '.join(known)})"
        )

    def make() -> nn.Module:
        try:
            return known[name](metadata)
        except KeyError as e:
            raise ValueError(f"{path}: the metadata of activation {name!r} lacks {e}") from e

    return make


def _sizes(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Classes and input channels, where the usual keys are present."""
    sizes = {}
    if "classifier.weight" in state:
        sizes["num_classes"] = state["classifier.weight"].shape[0]
    for key in ("features.0.weight", "stem.0.weight"):
        if key in state and state[key].dim() == 4:
            sizes["in_channels"] = state[key].shape[1]
    return sizes


def differences(model: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """What keeps ``state`` from being the state dict of ``model``, a sentence for each key."""
    wanted = model.state_dict()
    found = [f"missing {key}" for key in wanted if key not in state]
    found += [f"unexpected {key}" for key in state if key not in wanted]
    found += [
        f"{key} is {list(state[key].shape)}, the network has {list(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    return found
