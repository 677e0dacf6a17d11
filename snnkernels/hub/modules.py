"""Modules of a converted network as data: layers of torch, spiking layers, what knows of time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import surrogate
from ..conversion.fold import ChannelAffine
from ..conversion.impulse import ImpulseActivation
from ..conversion.means import FromMeans, RunningMean
from ..conversion.methods.bit_serial import BitSerialActivation
from ..conversion.methods.dsr import DSR, DSRActivation
from ..conversion.methods.multi_threshold import MultiThresholdActivation
from ..conversion.methods.ptl import PTLActivation
from ..conversion.methods.ttfs import TTFSActivation
from ..conversion.pools import CumulativeMaxPool
from ..conversion.spiking import CountSpikes, Repeat, SpikingActivation, TimeShape
from ..conversion.steps import Clock
from ..monitors import flags_before
from ..neurons import IFNode, LIFNode
from ..options import Probe, Signed
from .store import Reader, Writer
from .tables import LAYERS
from .values import decode, encode

__all__ = ["read_module", "write_module"]

_SPIKING: dict[str, tuple[type[SpikingActivation], tuple[str, ...]]] = {
    "SpikingActivation": (SpikingActivation, ()),
    "ImpulseActivation": (ImpulseActivation, ()),
    "PTLActivation": (PTLActivation, ()),
    "BitSerialActivation": (BitSerialActivation, ()),
    "TTFSActivation": (TTFSActivation, ("round",)),
    "MultiThresholdActivation": (MultiThresholdActivation, ("thresholds",)),
    "DSRActivation": (DSRActivation, ("how",)),
}
_TIMED: dict[str, type[nn.Module]] = {"RunningMean": RunningMean, "FromMeans": FromMeans}
_PLAIN: dict[str, type[nn.Module]] = {"Repeat": Repeat, "TimeShape": TimeShape}
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
# Of a subclass of a torch layer these say nothing about what it computes.
_HARMLESS = {
    "__init__", "__module__", "__doc__", "__repr__", "extra_repr", "reset_parameters",
    "__annotations__", "__parameters__", "__firstlineno__", "__static_attributes__",
    "__constants__", "__orig_bases__", "__slots__", "__deepcopy__", "__getstate__",
    "__annotate_func__", "__annotate__", "__annotations_cache__",
}  # fmt: skip


def write_module(module: nn.Module, name: str, to: Writer) -> dict[str, Any]:
    """``{"name", "kind", "args", "tensors"}`` of a module.

    Raises:
        TypeError: it is none of those that can be saved; says why.
    """
    kind = type(module).__name__
    entry: dict[str, Any] = {"name": name, "kind": kind}
    if isinstance(module, SpikingActivation) and _SPIKING.get(kind, (None,))[0] is type(module):
        args = {
            "node": _write_node(module.node, f"{name}.node", to),
            "label": module.label,
            "constant": module.constant,
            "counts": module.counts,
            "channel_dim": module.channel_dim,
            "scale": None if module.scale is None else to.tensor(module.scale, f"{name}.scale"),
        }
        for field in _SPIKING[kind][1]:
            value = getattr(module, field)
            args[field] = dataclasses.asdict(value) if field == "how" else value
        return {**entry, "args": args}
    if type(module) in (*_TIMED.values(), *_PLAIN.values()):
        return entry
    if type(module) is CumulativeMaxPool:
        return {**entry, "pool": write_module(module.pool, f"{name}.pool", to)}
    if type(module) is CountSpikes:
        layer = to.index_of(module._layer[0])
        if layer is None:
            raise TypeError("it counts spikes of a layer that the network does not call")
        return {**entry, "layer": layer}
    if type(module) is ChannelAffine:
        tensors = {key: to.tensor(t, f"{name}.{key}") for key, t in module.named_parameters()}
        return {**entry, "tensors": tensors}
    return _write_layer(module, entry, to)


def _write_layer(module: nn.Module, entry: dict[str, Any], to: Writer) -> dict[str, Any]:
    base = next((b for b in type(module).__mro__ if _layer_name(b) is not None), None)
    if base is None:
        raise TypeError(
            f"{type(module).__module__}.{type(module).__qualname__} is a class of your own code, "
            "or one of torch that is not in the list of layers that can be saved"
        )
    parametrized = hasattr(module, "parametrizations")
    for cls in type(module).__mro__[: type(module).__mro__.index(base)]:
        own = {k for k in vars(cls) if k not in _HARMLESS and hasattr(base, k)}
        if own and not parametrized:
            raise TypeError(
                f"{type(module).__qualname__} is a {base.__name__} with its own "
                f"{', '.join(sorted(own))}: its code would be needed to load it"
            )
    kind = _layer_name(base)
    assert kind is not None
    args = {field: _argument(module, field) for field in LAYERS[kind][1]}
    twin = _build(kind, args)
    tensors = {}
    for key, like in (*twin.named_parameters(), *twin.named_buffers()):
        value: Any = module
        for part in key.split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor) or value.shape != like.shape:
            raise TypeError(f"its {key} is not a tensor of shape {tuple(like.shape)}")
        if isinstance(like, nn.Parameter) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach())  # computed by a parametrization
        tensors[key] = to.tensor(value, f"{entry['name']}.{key}")
    entry |= {"kind": kind, "args": {k: encode(v) for k, v in args.items()}}
    return {**entry, "tensors": tensors} if tensors else entry


def _layer_name(cls: type) -> str | None:
    name = f"torch.nn.{cls.__name__}"
    return name if name in LAYERS and LAYERS[name][0] is cls else None


def _argument(module: Any, field: str) -> Any:
    """An argument of the constructor, read off the module."""
    if isinstance(module, nn.MultiheadAttention):
        if field == "bias":
            return module.in_proj_bias is not None
        if field == "add_bias_kv":
            return module.bias_k is not None
    if field == "bias" and not isinstance(module, nn.RNNBase):
        return module.bias is not None
    return getattr(module, field)


def _build(kind: str, args: dict[str, Any]) -> nn.Module:
    """A layer without memory."""
    with torch.device("meta"):
        return LAYERS[kind][0](**args).eval()


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


def read_module(entry: Any, number: int, of: Reader, clock: Clock) -> nn.Module:
    """The module that :func:`write_module` described."""
    field = f"modules[{number}]"
    if not isinstance(entry, dict):
        raise of.fail(field, entry, "an object")
    kind = entry.get("kind")
    try:
        return _read(entry, kind, field, of, clock)
    except (TypeError, ValueError, RuntimeError, KeyError, OverflowError) as error:
        if isinstance(error, ValueError) and of.where in str(error):
            raise
        raise of.fail(f"{field} ({kind})", error, "arguments that it takes") from error


def _read(entry: dict[str, Any], kind: Any, field: str, of: Reader, clock: Clock) -> nn.Module:
    args = entry.get("args", {})
    if not isinstance(args, dict):
        raise of.fail(f"{field}.args", args, "an object")
    if kind in _SPIKING:
        return _read_spiking(kind, args, field, of, clock)
    if kind in _TIMED:
        return _TIMED[kind](clock)
    if kind in _PLAIN:
        return _PLAIN[kind]()
    if kind == "CumulativeMaxPool":
        pool = entry.get("pool")
        inner = pool.get("kind") if isinstance(pool, dict) else None
        if not isinstance(inner, str) or "MaxPool" not in inner or inner not in LAYERS:
            raise of.fail(f"{field}.pool", pool, "a max-pool of torch.nn")
        return CumulativeMaxPool(_read(pool, inner, f"{field}.pool", of, clock), clock)  # type: ignore[arg-type]
    if kind == "CountSpikes":
        layer = of.module(entry.get("layer"), f"{field}.layer")
        if not isinstance(layer, SpikingActivation):
            raise of.fail(f"{field}.layer", entry.get("layer"), "the number of a spiking layer")
        return CountSpikes(layer)
    tensors = entry.get("tensors", {})
    if not isinstance(tensors, dict):
        raise of.fail(f"{field}.tensors", tensors, "an object")
    if kind == "ChannelAffine":
        scale, shift = of.tensor(tensors.get("scale")), of.tensor(tensors.get("shift"))
        if scale.dim() != 1 or scale.shape != shift.shape:
            raise of.fail(f"{field}.tensors", tuple(scale.shape), "scale and shift of one size")
        affine = ChannelAffine(scale.detach(), shift.detach())
        return _fill(affine, {"scale": scale, "shift": shift})
    if not isinstance(kind, str) or kind not in LAYERS:
        known = ", ".join(sorted({*LAYERS, *_SPIKING, *_TIMED, *_PLAIN, "ChannelAffine"}))
        raise of.fail(f"{field}.kind", kind, f"one of {known}")
    _exactly(args, LAYERS[kind][1], f"{field}.args", of)
    plain = {
        key: decode(value, lambda why, key=key: of.fail(f"{field}.args.{key}", why, "plain values"))  # type: ignore[misc]
        for key, value in args.items()
    }
    layers = plain.get("num_layers", 1)
    if type(layers) is not int or not 1 <= layers <= len(tensors) + 1:
        # Before it is built: every layer of a recurrent network has tensors of its own.
        raise of.fail(f"{field}.args.num_layers", layers, "as many layers as there are tensors for")
    layer = _build(kind, plain)
    wanted = {k: t.shape for k, t in (*layer.named_parameters(), *layer.named_buffers())}
    if set(wanted) != set(tensors):
        raise of.fail(f"{field}.tensors", sorted(tensors), f"{sorted(wanted)}")
    found = {key: of.tensor(name) for key, name in tensors.items()}
    for key, tensor in found.items():
        if tensor.shape != wanted[key]:
            raise of.fail(f"{field}.tensors.{key}", tuple(tensor.shape), f"{tuple(wanted[key])}")
    return _fill(layer, found)


def _fill(layer: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Put tensors, shared ones too, in the places of those of a layer."""
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        owner = layer.get_submodule(path)
        if name in owner._parameters:
            if not isinstance(tensor, nn.Parameter):
                raise TypeError(f"{key} is a parameter, not a buffer")
            owner._parameters[name] = tensor
        else:
            owner._buffers[name] = tensor
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()
    return layer.eval()


def _read_spiking(
    kind: str, args: dict[str, Any], field: str, of: Reader, clock: Clock
) -> SpikingActivation:
    cls, own = _SPIKING[kind]
    _exactly(
        args, ("node", "label", "constant", "counts", "channel_dim", "scale", *own),
        f"{field}.args", of,
    )  # fmt: skip
    extra: dict[str, Any] = {}
    for name in own:
        value: Any = args.get(name)
        if name == "how":
            if not isinstance(value, dict):
                raise of.fail(f"{field}.args.how", value, "an object")
            _exactly(value, [f.name for f in dataclasses.fields(DSR)], f"{field}.args.how", of)
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
    return cls(
        _read_node(args.get("node"), f"{field}.args.node", of),
        args["label"],
        constant=args["constant"],
        counts=args["counts"],
        scale=scale,
        channel_dim=args["channel_dim"],
        clock=clock,
        **extra,
    ).eval()


def _exactly(given: dict[str, Any], names: Iterable[str], field: str, of: Reader) -> None:
    """Refuse what lacks a field, which would silently be its default, or has another."""
    names = set(names)
    if set(given) != names:
        lacks, more = sorted(names - set(given)), sorted(map(str, set(given) - names))
        got = f"no {', '.join(lacks)}" if lacks else ", ".join(more)
        raise of.fail(field, got, f"exactly {', '.join(sorted(names))}")


def _refuse_not_finite(value: Any, field: str, of: Reader) -> None:
    number = type(value) in (int, float) and not math.isfinite(value)
    if number or (isinstance(value, Tensor) and not bool(torch.isfinite(value.detach()).all())):
        raise of.fail(field, "a value that is not finite", "finite numbers")


def _read_node(given: Any, field: str, of: Reader) -> IFNode:
    if not isinstance(given, dict) or given.get("kind") not in _NODES:
        raise of.fail(field, given, "an IFNode or LIFNode")
    floor = given.get("floor")
    known = {"kind", "surrogate", "signed", "probe", *_OPERANDS, *_OPTIONS}
    _exactly(given, known | {"floor"} if "floor" in given else known, field, of)

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
    _exactly(given, kind._fields, field, of)
    made = kind(**given)
    made.check()
    return made
