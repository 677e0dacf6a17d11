"""Files of bad calls: saved folders and checkpoints, damaged or hostile, full disks, kills."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import tarfile
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bad_calls_rows import CommandError
from torch import nn

import snnkernels
from snnkernels import cli as command
from snnkernels import models


@lru_cache
def _content() -> dict[str, bytes]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    snn = snnkernels.convert(net, torch.rand(8, 6), T=4, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        snn.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def saved(
    folder: str, *, cut: str = "", flip: str = "", gone: str = "", trusted: bool = False,
    call: str = "", kind: str = "", theta: Any = None, config: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """A saved network, in one way not as it was saved; checksums fit changed graphs."""
    content = dict(_content())
    graph = json.loads(content["graph.json"])
    if call:
        node = {"name": "evil", "op": "call_function", "target": call, "args": ["x"], "kwargs": {}}
        graph["suffix"]["nodes"].insert(1, node)
    if kind:
        graph["modules"][1]["kind"] = kind
    if theta is not None:
        (neuron,) = (m for m in graph["modules"] if m["kind"] == "SpikingActivation")
        neuron["args"]["node"]["v_threshold"] = theta
    content["graph.json"] = json.dumps(graph).encode()
    if cut:
        content[cut] = content[cut][: len(content[cut]) // 2]
    about = json.loads(_content()["config.json"])
    for name in ("graph.json", *(("model.safetensors",) if trusted else ())):
        sums = {"bytes": len(content[name]), "sha256": hashlib.sha256(content[name]).hexdigest()}
        about["files"][name] = sums
    if cut != "config.json":
        content["config.json"] = json.dumps({**about, **(config or {})}).encode()
    if flip:
        content[flip] = content[flip][:-1] + bytes([content[flip][-1] ^ 1])
    Path(folder).mkdir()
    for name, data in content.items():
        if name != gone:
            (Path(folder) / name).write_bytes(data)


@lru_cache
def small() -> nn.Module:
    torch.manual_seed(0)
    return models.small_cnn()


def checkpoint(path: str, cut: bool = False, **metadata: str) -> None:
    models.save_checkpoint(small(), path, "small_cnn", **metadata)
    if cut:
        Path(path).write_bytes(Path(path).read_bytes()[:1000])


class Evil:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def evil_pickle(path: str) -> None:
    Path(path).write_bytes(pickle.dumps(Evil()))


def evil_archive(path: str) -> None:
    """A tar with names that lead out of the folder, of batches that are pickles with code."""
    data = pickle.dumps(Evil())
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../escape", *(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6))):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def write(path: str, text: str) -> None:
    Path(path).write_text(text)


def network_file(path: str) -> None:
    Path(path).write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(6, 3), nn.ReLU())\n"
    )


def with_full_disk(call: Callable[[], Any]) -> None:
    """What is written cannot be flushed."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device, the disk is full")

    with mock.patch.object(os, "fsync", full):
        call()


def killed_at_rename(call: Callable[[], Any]) -> None:
    """Interrupted at the moment at which the new file or folder would appear."""

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt("killed")

    with mock.patch.object(os, "replace", killed), mock.patch.object(Path, "rename", killed):
        call()


def cli(*words: str) -> None:
    """The command; what it says on stderr is the error."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = command.main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    if code == 130:
        raise KeyboardInterrupt("killed")
    if code:
        raise CommandError(err.getvalue().strip().splitlines()[-1])


def convert_command(out: str) -> None:
    cli("convert", "m.safetensors", "--data", "digits", "--images", "10", "--calibration", "20",
        "--out", out, "--T", "2")  # fmt: skip


def files(folder: str | Path = ".") -> dict[str, str]:
    """What lies in a folder: names and the hashes of their content."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        data = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path)] = data
    return found
