"""Save, load and share converted networks without pickles and without the ANN's code."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..conversion.errors import ConversionError
from ..conversion.inputs import Ports
from ..conversion.methods.ptl import PTLActivation, _Spread
from ..conversion.modules import ConvertedModules
from ..conversion.network import ConvertedNetwork
from ..conversion.parts import Parts
from ..conversion.report import NodeReport, Report
from ..conversion.spiking import SpikingActivation
from ..conversion.steps import Clock, Steps
from . import files
from .card import model_card
from .files import CONFIG, GRAPH, README, WEIGHTS, Checked
from .graphs import plain_path_of, read_graph, read_modules, write_graph
from .store import Reader, Writer
from .values import FormatError, decode, encode

__all__ = ["load_pretrained", "push_to_hub", "save_pretrained"]

_VERSION = 1
_PARTS = ("prefix", "body", "suffix")
_NUMBERS = ("rate", "error", "clipping", "quantisation", "unevenness", "inherited")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading networks needs safetensors: pip install 'snnkernels[hub]'"
        ) from error
    return safetensors


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
        TypeError: ``snn`` is not a converted network, or ``snn.metadata`` is not plain JSON.
        ImportError: safetensors is not installed.
        OSError: the folder cannot be written.
    """
    _check_savable(snn)
    safetensors = _safetensors()
    config, graph, tensors = _described(snn)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder={str(folder)!r} is a file: give a folder")

    def write_config(path: Path) -> None:
        there = {name: files.digest(path.parent / name) for name in (WEIGHTS, GRAPH)}
        path.write_text(_json({**config, "files": there}, 1), encoding="utf-8")

    files.put(
        folder,
        {
            WEIGHTS: lambda path: safetensors.torch.save_file(
                tensors, path, metadata={"format": "pt", "snnkernels": str(_VERSION)}
            ),
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
    graph: dict[str, Any] = {"format": "snnkernels-graph", "format_version": _VERSION}
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
    graph.update({name: parts[name] for name in _PARTS})
    graph |= {"modules": to.modules, "tensors": to.about, "spread": spread}
    report = _report(snn.report, to)
    ports, fixed = snn._ports, {}
    for name, value in snn._ports.fixed.items():
        try:
            fixed[name] = encode(value, lambda t, name=name: to.tensor(t, f"inputs.{name}"))  # type: ignore[misc]
        except TypeError:
            fixed[name] = {"opaque": f"{value!r:.60}"}
    config = {
        "format": "snnkernels",
        "format_version": _VERSION,
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
        "counted": [plain_path_of(snn.body, path) for path in snn._counted],
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
        entry |= {name: encode(getattr(row, name)) for name in _NUMBERS}
        rows.append(entry)
    return {
        "method": report.method,
        "T": report.T,
        "rows": rows,
        "silent_channels": report.silent_channels,
        "notes": report.notes,
    }


# ---- loading -------------------------------------------------------------------------------------


class _Opaque:
    """A value of the ANN's forward that could not be saved; no value equals it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def load_pretrained(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> ConvertedNetwork:
    """Load a network saved by :func:`save_pretrained`, from a folder or the Hugging Face Hub.

    No code of the ANN is needed, nothing is unpickled, and no code from the files is run: what they
    may name comes from closed lists, and everything is checked before it is used. It gives the bits
    that the saved network gave, on the same machine; T, report, ``latency``, ``certify``,
    ``predict_curve`` and :func:`snnkernels.lower` are as before.

    Args:
        name: a folder; if there is none of that name, a repository ``"owner/name"`` of the hub.
        device: where to; None: the CPU. dtypes are those that were saved.
        revision, token, cache_dir: of the hub; as for ``huggingface_hub.snapshot_download``.

    Raises:
        FileNotFoundError: there is no such folder, or no saved network in it.
        ValueError: the files are damaged, do not belong together, were changed or are of a newer
            version; names the file, the field, the value and what is allowed.
        ImportError: safetensors, or for the hub huggingface_hub, is not installed.
    """
    folder = _folder(name, revision, token, cache_dir)
    target = torch.device("cpu" if device is None else device)
    safetensors = _safetensors()
    config_path = files.find(folder, CONFIG)
    config = Checked(files.load_json(config_path), str(config_path))
    if config.given.get("format") != "snnkernels":
        raise config.fail("format", "'snnkernels': this is no network of save_pretrained")
    if config.integer("format_version", 1) > _VERSION:
        raise config.fail(
            "format_version", f"up to {_VERSION} with this snnkernels: pip install -U snnkernels"
        )
    _check_files(folder, config)
    graph_path = files.find(folder, GRAPH)
    graph = Checked(files.load_json(graph_path), str(graph_path))
    try:
        with safetensors.safe_open(files.find(folder, WEIGHTS), framework="pt") as weights:
            return _read(config, graph, weights, target)
    except safetensors.SafetensorError as error:
        raise FormatError(f"{files.find(folder, WEIGHTS)}: damaged: {error}") from error


def _folder(name: Any, revision: Any, token: Any, cache_dir: Any) -> Path:
    if not isinstance(name, (str, Path)):
        raise TypeError(f"name must be a folder or a hub id, got {type(name).__name__}")
    folder = Path(name)
    if folder.is_dir():
        if not files.find(folder, CONFIG).is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG}: no network was saved there")
        return folder
    if not _HUB_ID.fullmatch(str(name)) or "/" not in str(name) or folder.exists():
        raise FileNotFoundError(
            f"name={str(name)!r} is no folder, and no id of a hub repository (owner/name)"
        )
    hub = _huggingface()
    found = hub.snapshot_download(
        repo_id=str(name),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        allow_patterns=[CONFIG, GRAPH, WEIGHTS],
    )
    if not (Path(found) / CONFIG).is_file():
        raise FileNotFoundError(f"the hub repository {name} holds no {CONFIG}")
    return Path(found)


def _check_files(folder: Path, config: Checked) -> None:
    there = config.inner("files")
    for name in (GRAPH, WEIGHTS):
        path = files.find(folder, name)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the saved network is not whole")
        wanted = there.inner(name)
        size = path.stat().st_size
        if size != wanted.integer("bytes", 0, 2**62):
            raise FormatError(
                f"{path}: {size} bytes, but {CONFIG} says {wanted.given['bytes']}: it is "
                "truncated, or belongs to another save"
            )
        if files.digest(path)["sha256"] != wanted.text("sha256"):
            raise FormatError(
                f"{path}: its SHA-256 is not the one in {CONFIG}: it is damaged, was changed, or "
                "belongs to another save"
            )


def _read(config: Checked, graph: Checked, weights: Any, device: torch.device) -> ConvertedNetwork:
    if graph.given.get("format") != "snnkernels-graph":
        raise graph.fail("format", "'snnkernels-graph'")
    graph.integer("format_version", 1, _VERSION)
    T = config.integer("T", 1)
    clock = Clock(_read_steps(config.inner("steps")))
    there = {}
    for name in weights.keys():  # noqa: SIM118
        held = weights.get_slice(name)
        there[name] = (list(held.get_shape()), _DTYPE.get(held.get_dtype(), held.get_dtype()))
    of = Reader(graph.given.get("tensors"), weights.get_tensor, there, graph.where)
    read_modules(graph.given.get("modules"), of, clock)
    made = {name: read_graph(graph.given.get(name), name, of, device) for name in _PARTS}
    body: Any = made["body"]
    prefix: Any = made["prefix"]
    spread = graph.items("spread")
    statics = _outputs(made["prefix"])
    takers = [_taker(pair, statics, of) for pair in spread]
    if takers:
        prefix = _Spread(made["prefix"], takers)
    counted = config.texts("counted")
    for path in counted:
        try:
            layer = body.get_submodule(path)
        except AttributeError:
            layer = None
        if not isinstance(layer, SpikingActivation):
            raise config.fail("counted", f"paths of spiking layers of the body, not {path[:60]!r}")
    for name in ("of_body", "of_suffix"):
        if not all(type(i) is int and 0 <= i < statics for i in config.items(name)):
            raise config.fail(name, f"numbers from 0 to {statics - 1}")
    takes = {
        "prefix": 1,
        "body": len(config.given["of_body"]) + 1,
        "suffix": len(config.given["of_suffix"]) + len(counted),
    }
    for name, count in takes.items():
        found = sum(n.op == "placeholder" for n in made[name].graph.nodes)
        if found != count:
            raise FormatError(f"{graph.where}: {name} takes {found} inputs; allowed: {count}")
    if _outputs(body) != len(counted):
        raise FormatError(
            f"{graph.where}: body has {_outputs(body)} outputs; allowed: {len(counted)}"
        )
    parts = Parts(
        prefix, body, made["suffix"], counted, config.given["of_body"], config.given["of_suffix"]
    )
    ports = _read_ports(config.inner("inputs"), of)
    report = _read_report(config.inner("report"), of)
    snn = ConvertedNetwork(parts, T, report, clock, ports)
    metadata = config.given.get("metadata")
    if not isinstance(metadata, dict):
        raise config.fail("metadata", "an object")
    snn.metadata = metadata
    return snn.to(device)


_DTYPE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def _outputs(graph: fx.GraphModule) -> int:
    """How many values a graph gives, as a tuple."""
    (given,) = next(n for n in graph.graph.nodes if n.op == "output").args
    return len(given) if isinstance(given, (tuple, list)) else -1


def _taker(pair: Any, statics: int, of: Reader) -> tuple[int, PTLActivation]:
    if isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int:
        layer = of.module(pair[1], "spread")
        if 0 <= pair[0] < statics and isinstance(layer, PTLActivation):
            return pair[0], layer
    raise of.fail("spread", pair, "pairs of an output of the prefix and a PTLActivation")


def _read_steps(given: Checked) -> Steps:
    known = {f.name: type(f.default) for f in dataclasses.fields(Steps)}
    if set(given.given) != set(known):
        raise FormatError(f"{given.where}: got {sorted(given.given)}; allowed: {sorted(known)}")
    read: dict[str, Any] = {}
    kind: Any
    for name, kind in known.items():
        read[name] = (
            given.flag(name) if kind is bool else
            given.text(name) if kind is str else given.integer(name, 0, 2**20)
        )  # fmt: skip
    if read["bias"] not in ("every", "first", "last", "spread"):
        raise given.fail("bias", "every, first, last, spread")
    return Steps(**read)


def _read_ports(given: Checked, of: Reader) -> Ports:
    names, fixed = given.texts("names"), {}
    parameters = []
    kinds = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")
    for pair in given.items("parameters"):
        good = isinstance(pair, list) and len(pair) == 2 and all(isinstance(v, str) for v in pair)
        if not good or not pair[0].isidentifier() or pair[1] not in kinds:
            raise given.fail("parameters", f"pairs of a name and one of {', '.join(kinds)}")
        parameters.append(inspect.Parameter(pair[0], getattr(inspect.Parameter, pair[1])))
    for name, value in given.inner("fixed").given.items():
        if isinstance(value, dict) and isinstance(value.get("opaque"), str) and len(value) == 1:
            fixed[name] = _Opaque(value["opaque"])
            continue

        def fail(why: str, name: str = name) -> Exception:
            return given.fail("fixed", f"plain values: {name}: {why}")

        fixed[name] = decode(value, fail, tensor=of.tensor)
    try:
        signature = inspect.Signature(parameters)
    except ValueError as error:
        raise given.fail("parameters", f"a signature ({error})") from error
    plain = list(signature.parameters)
    if not names or set(names) & set(fixed) or {*names, *fixed} != set(plain):
        raise given.fail("names", "some of the parameters; the others are fixed")
    packed = given.flag("packed")
    if not packed and len(names) != 1:
        raise given.fail("packed", "true for several inputs")
    return Ports(signature, tuple(names), fixed, packed)


def _read_report(given: Checked, of: Reader) -> Report:
    rows = []
    for number, entry in enumerate(given.items("rows")):
        row = Checked(entry, f"{given.where}: rows[{number}]")
        theta = row.given.get("threshold")
        numbers = {}
        for name in _NUMBERS:
            value = decode(
                row.given.get(name),
                lambda why, row=row, name=name: row.fail(name, why),  # type: ignore[misc]
            )
            if value is not None and (type(value) not in (int, float) or math.isnan(value)):
                raise row.fail(name, "a number or null")
            numbers[name] = value
        rows.append(
            NodeReport(
                row.text("name"),
                row.text("action"),
                None if theta is None else of.tensor(theta).detach(),
                **numbers,
            )
        )
    silent = given.inner("silent_channels").given
    for layer, channels in silent.items():
        if not isinstance(channels, list) or not all(type(c) is int for c in channels):
            raise given.fail("silent_channels", f"lists of channels by layer ({layer[:60]})")
    T = given.integer("T", 1)
    return Report(given.text("method"), T, rows, silent, given.texts("notes"))


# ---- sharing -------------------------------------------------------------------------------------


def _huggingface() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "the Hugging Face Hub needs huggingface_hub: pip install 'snnkernels[hub]'"
        ) from error
    return huggingface_hub


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
    if not isinstance(repo_id, str) or not _HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r} must be 'owner/name' or 'name'")
    _check_savable(snn)
    api = _huggingface().HfApi(token=token)
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
