"""Modules of a converted network as data: layers of torch, and what knows of time."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.fold import ChannelAffine
from ..conversion.means import FromMeans, RunningMean
from ..conversion.pools import CumulativeMaxPool
from ..conversion.spiking import CountSpikes, Repeat, SpikingActivation, TimeShape
from ..conversion.steps import Clock
from .spiking import SPIKING, read_spiking, write_spiking
from .store import Reader, Writer
from .tables import LAYERS
from .values import FormatError, decode, encode

__all__ = ["read_module", "write_module"]

_TIMED: dict[str, type[nn.Module]] = {"RunningMean": RunningMean, "FromMeans": FromMeans}
_PLAIN: dict[str, type[nn.Module]] = {"Repeat": Repeat, "TimeShape": TimeShape}
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
    if SPIKING.get(kind) is type(module):
        return {**entry, "args": write_spiking(module, name, to)}
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
    with torch.device("meta"), warnings.catch_warnings():
        # Weights come from the file: that torch has none to draw for an empty layer is no news.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
        return LAYERS[kind][0](**args).eval()


# ---- reading -------------------------------------------------------------------------------------


def read_module(entry: Any, number: int, of: Reader, clock: Clock) -> nn.Module:
    """The module that :func:`write_module` described."""
    field = f"modules[{number}]"
    if not isinstance(entry, dict):
        raise of.fail(field, entry, "an object")
    kind = entry.get("kind")
    try:
        return _read(entry, kind, field, of, clock)
    except FormatError:
        raise
    except Exception as error:  # what constructors of torch raise for anything: asserts, divisions
        raise of.fail(f"{field} ({kind})", error, "arguments that it takes") from error


def _read(entry: dict[str, Any], kind: Any, field: str, of: Reader, clock: Clock) -> nn.Module:
    args = entry.get("args", {})
    if not isinstance(args, dict):
        raise of.fail(f"{field}.args", args, "an object")
    if kind in SPIKING:
        return read_spiking(kind, args, field, of, clock)
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
        known = ", ".join(sorted({*LAYERS, *SPIKING, *_TIMED, *_PLAIN, "ChannelAffine"}))
        raise of.fail(f"{field}.kind", kind, f"one of {known}")
    of.exactly(args, LAYERS[kind][1], f"{field}.args")
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
