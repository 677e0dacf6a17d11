"""Spiking layers of a converted network and their neurons as data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import surrogate
from ..conversion.impulse import ImpulseActivation
from ..conversion.methods.bit_serial import BitSerialActivation
from ..conversion.methods.dsr import DSR, DSRActivation
from ..conversion.methods.multi_threshold import MultiThresholdActivation
from ..conversion.methods.ptl import PTLActivation
from ..conversion.methods.ttfs import TTFSActivation
from ..conversion.spiking import SpikingActivation
from ..conversion.steps import Clock
from ..monitors import flags_before
from ..neurons import IFNode, LIFNode
from ..options import Probe, Signed
from .store import Reader, Writer
from .values import decode, encode

__all__ = ["SPIKING", "read_spiking", "write_spiking"]

SPIKING: dict[str, type[SpikingActivation]] = {
    cls.__name__: cls
    for cls in (
        *(SpikingActivation, ImpulseActivation, PTLActivation, BitSerialActivation),
        *(TTFSActivation, MultiThresholdActivation, DSRActivation),
    )
}
# Arguments of all of them, and of one alone.
_SHARED = ("node", "label", "constant", "counts", "channel_dim", "scale")
_OWN = {
    "TTFSActivation": ("round",),
    "MultiThresholdActivation": ("thresholds",),
    "DSRActivation": ("how",),
}
_NODES: dict[str, type[IFNode]] = {"IFNode": IFNode, "LIFNode": LIFNode}
# What an IFNode holds as a number, a word or a tensor, and what it holds as plain values.
_OPERANDS = (
    "v_threshold", "v_init", "amplitude", "input_scale", "beta", "bias", "fire_level", "mask",
)  # fmt: skip
_WORDS = {"v_init": "half", "amplitude": "threshold"}
_OPTIONS = (
    "v_reset", "detach_reset", "step_mode", "channel_dim", "tie", "spike_dtype",
    "store_v_seq", "store_count", "save", "layout", "T", "max_spikes", "parallel",
)  # fmt: skip
_FLAGS = ("detach_reset", "store_v_seq", "store_count", "parallel")
# Arguments of an IFNode or LIFNode that are saved in another way, or that are not the network's:
# the layer sets the output at every call, monitors ask for what is stored.
_OTHERS = (
    "surrogate_function", "signed", "probe", "learn_threshold", "learn_v_init", "learn_beta",
    "output", "store_packed", "store_charge_seq",
)  # fmt: skip
# What else there is in a node: what belongs to the last call, and what every module has.
_STATE = ("_v", "_carried", "v_seq", "charge_seq", "count", "packed", "_step_mode", "_floor")
_KNOWN = {*_OPERANDS, *_OPTIONS, *_OTHERS, *_STATE, *vars(nn.Module())}


def write_spiking(layer: Any, name: str, to: Writer) -> dict[str, Any]:
    """The arguments of a layer of :data:`SPIKING`.

    Raises:
        TypeError: its neurons cannot be saved; says why.
    """
    args = {
        "node": _write_node(layer.node, f"{name}.node", to),
        "label": layer.label,
        "constant": layer.constant,
        "counts": layer.counts,
        "channel_dim": layer.channel_dim,
        "scale": None if layer.scale is None else to.tensor(layer.scale, f"{name}.scale"),
    }
    for field in _OWN.get(type(layer).__name__, ()):
        value = getattr(layer, field)
        args[field] = dataclasses.asdict(value) if field == "how" else value
    return args


def _write_node(node: IFNode, name: str, to: Writer) -> dict[str, Any]:
    kind = type(node).__name__
    if _NODES.get(kind) is not type(node):
        raise TypeError(f"its neurons are {type(node).__module__}.{kind}, not IFNode or LIFNode")
    unknown = {*vars(node), *node._parameters, *node._buffers, *node._modules} - _KNOWN
    if unknown:
        raise TypeError(
            f"its {kind} has {', '.join(sorted(unknown))}, which the saved network would not have"
        )
    if surrogate.BY_NAME.get(node.surrogate_function.name) is not type(node.surrogate_function):
        raise TypeError(
            f"its surrogate {node.surrogate_function!r} is a class of your own: its code would be "
            "needed to load it"
        )
    given: dict[str, Any] = {"kind": kind}
    kept = flags_before(node)
    for field in _OPERANDS:
        value = getattr(node, field)
        if isinstance(value, Tensor):
            given[field] = {"tensor": to.tensor(value, f"{name}.{field}")}
        else:
            given[field] = encode(value)
    for field in _OPTIONS:
        given[field] = encode(kept.get(field, getattr(node, field)))
    if node.learn_threshold:
        given["floor"] = {"tensor": to.tensor(node._floor, f"{name}.floor")}
    how = node.surrogate_function
    given["surrogate"] = {"name": how.name, **dataclasses.asdict(how)}
    given["signed"] = None if node.signed is None else node.signed._asdict()
    given["probe"] = None if node.probe is None else node.probe._asdict()
    return given


# ---- reading -------------------------------------------------------------------------------------


def read_spiking(
    kind: str, args: dict[str, Any], field: str, of: Reader, clock: Clock
) -> SpikingActivation:
    """The layer that :func:`write_spiking` described."""
    own = _OWN.get(kind, ())
    of.exactly(args, (*_SHARED, *own), f"{field}.args")
    extra: dict[str, Any] = {}
    for name in own:
        value: Any = args.get(name)
        if name == "how":
            if not isinstance(value, dict):
                raise of.fail(f"{field}.args.how", value, "an object")
            of.exactly(value, [f.name for f in dataclasses.fields(DSR)], f"{field}.args.how")
            extra[name] = DSR(**value)
        elif name == "round" and not isinstance(value, bool):
            raise of.fail(f"{field}.args.{name}", value, "true or false")
        elif name == "thresholds" and (type(value) is not int or not 1 <= value <= 16):
            raise of.fail(f"{field}.args.{name}", value, "1 to 16")
        else:
            extra[name] = value
    for name, of_type in (("label", str), ("constant", bool), ("counts", bool)):
        if type(args.get(name)) is not of_type:
            raise of.fail(f"{field}.args.{name}", args.get(name), f"a {of_type.__name__}")
    if type(args.get("channel_dim")) is not int:
        raise of.fail(f"{field}.args.channel_dim", args.get("channel_dim"), "an int")
    scale = None if args.get("scale") is None else of.tensor(args["scale"])
    if scale is not None:
        _refuse_not_finite(scale, f"{field}.args.scale", of)
    return SPIKING[kind](
        _read_node(args.get("node"), f"{field}.args.node", of),
        args["label"],
        constant=args["constant"],
        counts=args["counts"],
        scale=scale,
        channel_dim=args["channel_dim"],
        clock=clock,
        **extra,
    ).eval()


def _refuse_not_finite(value: Any, field: str, of: Reader) -> None:
    number = type(value) in (int, float) and not math.isfinite(value)
    if number or (isinstance(value, Tensor) and not bool(torch.isfinite(value.detach()).all())):
        raise of.fail(field, "a value that is not finite", "finite numbers")


def _read_node(given: Any, field: str, of: Reader) -> IFNode:
    if not isinstance(given, dict) or given.get("kind") not in _NODES:
        raise of.fail(field, given, "an IFNode or LIFNode")
    floor = given.get("floor")
    known = {"kind", "surrogate", "signed", "probe", *_OPERANDS, *_OPTIONS}
    of.exactly(given, known | {"floor"} if "floor" in given else known, field)

    def plain(name: str) -> Any:
        def fail(why: str) -> Exception:
            return of.fail(f"{field}.{name}", why, "a plain value")

        return decode(given.get(name), fail, tensor=of.tensor)

    operands = {name: plain(name) for name in _OPERANDS}
    tensors = {n: v for n, v in operands.items() if isinstance(v, Tensor)}
    for name, value in operands.items():
        if name in tensors:
            if name != "mask":
                _refuse_not_finite(value, f"{field}.{name}", of)
            continue
        if isinstance(value, str) and value != _WORDS.get(name):
            raise of.fail(f"{field}.{name}", value, "a number, a tensor or its own word")
        if name != "v_threshold":
            _refuse_not_finite(value, f"{field}.{name}", of)
    threshold = operands["v_threshold"]
    if isinstance(threshold, Tensor):
        bad = not (threshold.is_floating_point() and bool((threshold.detach() > 0).all()))
    else:
        # bool is an int, and NaN is not above 0.
        bad = type(threshold) not in (int, float) or not 0 < threshold < float("inf")
    if bad:
        raise of.fail(f"{field}.v_threshold", threshold, "positive finite numbers")
    arguments = {name: plain(name) for name in _OPTIONS}
    for name in _FLAGS:
        if not isinstance(arguments[name], bool):
            raise of.fail(f"{field}.{name}", arguments[name], "true or false")
    for name, value in operands.items():
        if name not in ("mask", "beta"):
            arguments[name] = 1.0 if name in tensors else value
    if given["kind"] == "LIFNode":
        arguments["beta"] = 0.5 if "beta" in tensors else operands["beta"]
    signed, probe = given.get("signed"), given.get("probe")
    node = _NODES[given["kind"]](
        surrogate_function=_read_surrogate(given.get("surrogate"), field, of),
        signed=None if signed is None else _checked(Signed, signed, f"{field}.signed", of),
        probe=None if probe is None else _checked(Probe, probe, f"{field}.probe", of),
        **arguments,
    )
    for name, tensor in tensors.items():
        if name == "mask":
            node.mask = tensor
            continue
        # Not given to the constructor: it would copy what several may share.
        delattr(node, name)
        if isinstance(tensor, nn.Parameter):
            node.register_parameter(name, tensor)
        else:
            node.register_buffer(name, tensor)
    if floor is not None:
        if not isinstance(node.v_threshold, nn.Parameter):
            raise of.fail(f"{field}.floor", floor, "null where the threshold is not learned")
        held = decode(
            floor, lambda why: of.fail(f"{field}.floor", why, "a tensor"), None, of.tensor
        )
        _refuse_not_finite(held, f"{field}.floor", of)
        node.learn_threshold = True
        node.register_buffer("_floor", held)
    return node


def _read_surrogate(given: Any, field: str, of: Reader) -> surrogate.Surrogate:
    given = dict(given) if isinstance(given, dict) else {}
    cls = surrogate.BY_NAME.get(str(given.pop("name", None)))
    if cls is None or set(given) != {f.name for f in dataclasses.fields(cls)}:
        known = ", ".join(surrogate.BY_NAME)
        raise of.fail(f"{field}.surrogate", given, f"one of {known}, with its own arguments")
    return cls(**given)


def _checked(kind: type[Signed] | type[Probe], given: Any, field: str, of: Reader) -> Any:
    if not isinstance(given, dict):
        raise of.fail(field, given, "an object or null")
    of.exactly(given, kind._fields, field)
    made = kind(**given)
    made.check()
    return made
