"""Save, load and share converted networks without pickles and without the ANN's code."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..conversion.errors import ConversionError
from ..conversion.methods.ptl import _Spread
from ..conversion.modules import ConvertedModules
from ..conversion.network import ConvertedNetwork
from ..conversion.report import Report
from . import files
from .card import model_card
from .files import CONFIG, GRAPH, README, WEIGHTS
from .graphs import plain_paths, write_graph
from .shared import HUB_ID, NUMBERS, PARTS, VERSION, huggingface, safetensors_package
from .store import Writer
from .values import encode

__all__ = ["push_to_hub", "save_pretrained"]

# ---- saving --------------------------------------------------------------------------------------


def save_pretrained(snn: ConvertedNetwork, folder: str | Path) -> Path:
    """Save a converted network into a folder: ``load_pretrained(folder)`` gives it back.

    ``model.safetensors`` holds the weights, thresholds and initial potentials, ``graph.json`` the
    graph as a list of operations out of a closed list, ``config.json`` T, the method's steps, the
    inputs, the report and ``snn.metadata``; ``README.md`` is a model card. Nothing is pickled, and
    loading needs neither the ANN's code nor anything beside torch, numpy and safetensors. The
    loaded network gives the same bits.

    The folder may exist; other files in it are left alone, and a save that is in it is replaced
    as a whole: killed at any moment, the folder holds the old save or the new one.

    Args:
        snn: of :func:`snnkernels.convert`. Membranes are not saved: calls leave none behind.
        folder: made if it is not there.

    Returns:
        The folder.

    Raises:
        ConversionError: something in the network is code of yours, which could not be loaded
            without it; names it.
        TypeError: ``folder`` is no path, ``snn`` is not a converted network, or ``snn.metadata`` is
            not plain JSON.
        ImportError: safetensors is not installed.
        OSError: the folder cannot be written.
    """
    _check_savable(snn)
    safetensors = safetensors_package()
    config, graph, tensors = _described(snn)
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be a path, got {type(folder).__name__}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder={str(folder)!r} is a file: give a folder")

    def write_weights(path: Path) -> None:
        try:
            # One entry: of several, safetensors writes the order of a hash table, and the same
            # network would not give the same bytes.
            safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error

    def write_config(path: Path) -> None:
        there = {name: files.digest(path.parent / name) for name in (WEIGHTS, GRAPH)}
        path.write_text(_json({**config, "files": there}, 1), encoding="utf-8")

    files.put(
        folder,
        {
            WEIGHTS: write_weights,
            GRAPH: lambda path: path.write_text(_json(graph), encoding="utf-8"),
            CONFIG: write_config,
            README: lambda path: path.write_text(model_card(snn, folder.name), encoding="utf-8"),
        },
    )
    return folder


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=True) + "\n"


def _check_savable(snn: Any) -> None:
    if isinstance(snn, ConvertedModules):
        paths = ", ".join(repr(p) for p in snn._paths)
        raise ConversionError(
            "a network converted module by module runs the code of its ANN, so it cannot be loaded "
            f"without it. Save the converted modules ({paths}): "
            "snn.network.get_submodule(path).save_pretrained(folder); load each, and put it into "
            "the ANN with set_submodule"
        )
    if not isinstance(snn, ConvertedNetwork):
        raise TypeError(
            f"snn must be a ConvertedNetwork (of snnkernels.convert), got {type(snn).__name__}"
            + ("; save the network and lower it again" if type(snn).__name__ == "Plan" else "")
        )
    if not isinstance(snn.prefix, (_Spread, fx.GraphModule)):
        raise ConversionError(
            "a network whose first layer draws its weights cannot be saved: save the network that "
            "stochastic_prefix was given, and call stochastic_prefix again"
        )


def _described(snn: ConvertedNetwork) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """``config.json``, ``graph.json`` and the tensors."""
    from .. import __version__

    to = Writer()
    graph: dict[str, Any] = {"format": "snnkernels-graph", "format_version": VERSION}
    spread: list[list[int]] = []
    prefix: Any = snn.prefix
    parts: dict[str, Any] = {}
    parts["body"] = write_graph(snn.body, "body", to)
    if isinstance(prefix, _Spread):
        for output, layer in prefix._takers:
            index = to.index_of(layer)
            assert index is not None
            spread.append([output, index])
        prefix = prefix.inner
    parts["prefix"] = write_graph(prefix, "prefix", to)
    parts["suffix"] = write_graph(snn.suffix, "suffix", to)
    graph.update({name: parts[name] for name in PARTS})
    graph |= {"modules": to.modules, "tensors": to.about, "spread": spread}
    report = _report(snn.report, to)
    paths = plain_paths(snn.body)
    ports, fixed = snn._ports, {}
    for name, value in snn._ports.fixed.items():
        try:
            fixed[name] = encode(value, lambda t, name=name: to.tensor(t, f"inputs.{name}"))  # type: ignore[misc]
        except TypeError:
            fixed[name] = {"opaque": f"{value!r:.60}"}
    config = {
        "format": "snnkernels",
        "format_version": VERSION,
        "snnkernels": __version__,
        "torch": torch.__version__,
        "library_name": "snnkernels",
        "method": snn.report.method,
        "T": snn.T,
        "latency": snn.latency(),
        "steps": dataclasses.asdict(snn._clock.steps),
        "inputs": {
            "names": list(ports.names),
            "parameters": [[p.name, p.kind.name] for p in ports.signature.parameters.values()],
            "fixed": fixed,
            "packed": ports.packed,
        },
        "counted": [paths[path] for path in snn._counted],
        "of_body": list(snn._of_body),
        "of_suffix": list(snn._of_suffix),
        "report": report,
        "metadata": _metadata(snn.metadata),
    }
    return config, graph, to.tensors


def _metadata(value: Any) -> Any:
    try:
        same = isinstance(value, dict) and json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"snn.metadata cannot be written as JSON: {error}") from error
    if not same:
        raise TypeError(
            "snn.metadata must be a dict of what JSON holds: strings as keys; strings, finite "
            "numbers, bools, None, lists and dicts as values"
        )
    return value


def _report(report: Report, to: Writer) -> dict[str, Any]:
    rows = []
    for number, row in enumerate(report.rows):
        entry: dict[str, Any] = {"name": row.name, "action": row.action}
        theta = row.threshold
        entry["threshold"] = None if theta is None else to.tensor(theta, f"report.{number}")
        entry |= {name: encode(getattr(row, name)) for name in NUMBERS}
        rows.append(entry)
    return {
        "method": report.method,
        "T": report.T,
        "rows": rows,
        "silent_channels": report.silent_channels,
        "notes": report.notes,
    }


# ---- sharing -------------------------------------------------------------------------------------


def push_to_hub(
    snn: ConvertedNetwork,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a network converted by snnkernels",
) -> Any:
    """Save a converted network to the Hugging Face Hub; ``load_pretrained(repo_id)`` loads it.

    Args:
        snn: as for :func:`save_pretrained`.
        repo_id: ``"owner/name"``; made if it is not there.
        private, token, revision, create_pr, commit_message: as for ``huggingface_hub``.

    Returns:
        What ``huggingface_hub.HfApi.upload_folder`` returns: the commit.

    Raises:
        ValueError: ``repo_id`` is none.
        ConversionError, TypeError, ImportError: as :func:`save_pretrained`.
    """
    if not isinstance(repo_id, str) or not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r} must be 'owner/name' or 'name'")
    _check_savable(snn)
    api = huggingface().HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="snnkernels-") as folder:
        place = save_pretrained(snn, Path(folder) / repo_id.rpartition("/")[2])
        # The card names the repository, not the folder of this moment.
        (place / README).write_text(model_card(snn, repo_id), encoding="utf-8")
        made = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        return api.upload_folder(
            repo_id=getattr(made, "repo_id", repo_id),
            folder_path=str(place),
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
