"""Load saved networks: everything is checked before it is used."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..conversion.inputs import Ports
from ..conversion.methods.ptl import PTLActivation, _Spread
from ..conversion.network import ConvertedNetwork
from ..conversion.parts import Parts
from ..conversion.report import NodeReport, Report
from ..conversion.spiking import SpikingActivation
from ..conversion.steps import Clock, Steps
from . import files
from .files import CONFIG, GRAPH, WEIGHTS, Checked
from .graphs import read_graph, read_modules
from .shared import HUB_ID, NUMBERS, PARTS, VERSION, huggingface, safetensors_package
from .store import DTYPES, Reader
from .values import FormatError, decode

__all__ = ["load_pretrained"]


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
    try:
        target = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown; it must be one of torch's") from error
    safetensors = safetensors_package()
    config_path = files.find(folder, CONFIG)
    config = Checked(files.load_json(config_path), str(config_path))
    if config.given.get("format") != "snnkernels":
        raise config.fail("format", "'snnkernels': this is no network of save_pretrained")
    if config.integer("format_version", 1) > VERSION:
        raise config.fail(
            "format_version", f"up to {VERSION} with this snnkernels: pip install -U snnkernels"
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
    if not HUB_ID.fullmatch(str(name)) or "/" not in str(name) or folder.exists():
        raise FileNotFoundError(
            f"name={str(name)!r} is no folder, and no id of a hub repository (owner/name)"
        )
    hub = huggingface()
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
    graph.integer("format_version", 1, VERSION)
    T = config.integer("T", 1)
    clock = Clock(_read_steps(config.inner("steps")))
    there = {}
    for name in weights.keys():  # noqa: SIM118
        held = weights.get_slice(name)
        there[name] = (list(held.get_shape()), DTYPES.get(held.get_dtype(), held.get_dtype()))
    of = Reader(graph.given.get("tensors"), weights.get_tensor, there, graph.where)
    read_modules(graph.given.get("modules"), of, clock)
    made = {name: read_graph(graph.given.get(name), name, of, device) for name in PARTS}
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
        for name in NUMBERS:
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
