"""The plan: a converted network lowered, with the same call."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.inputs import Inputs, as_given, each, leaves, parts_of
from ..conversion.network import ConvertedNetwork, _ends, _steps
from ..conversion.spiking import SpikingActivation
from ..conversion.steps import CAUSAL
from ..kernels.spike_maps import TIMES
from .built import ALL_PASSES, Built, device_of
from .explain import Explanation, explain
from .graphs import Backend, CudaBackend
from .read import mark, settings

__all__ = ["ALL_PASSES", "Plan", "lower"]

# By the type of device.
PRECISIONS = {
    "cpu": ("float32", "int16", "int8"),
    "cuda": ("float32", "float16", "bfloat16", "int8"),
}
_MEMORY = {"cpu": 32 * 2**20, "cuda": 4 * 2**30}
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SHAPES = 8  # shapes of inputs whose plans are kept


def lower(
    snn: ConvertedNetwork,
    *,
    precision: str = "float32",
    without: Sequence[str] = (),
    max_memory: int | str | None = None,
) -> Plan:
    """A converted network as a plan that gives the same answer in a fraction of the time.

    Example::

        fast = snnkernels.lower(snn)
        logits = fast(images)  # as snn(images)
        print(fast.explain(images))

    On CPUs spikes stay packed between layers, 64 channels a word, and a weight is added where there
    is a spike (:mod:`snnkernels.engine`). On CUDA devices they are maps of uint8 with channels
    innermost; a convolution and the neurons behind it are one Triton kernel where there is one for
    them, else cuDNN's and ours, and calls of a shape seen before are replayed as a CUDA graph. What
    the engine has no layer for runs as the converted network runs it; :meth:`Plan.explain` says
    what and why. A plan is for inference: it has no gradients.

    The same answer: given the same spikes, a layer adds the same weights in another order, so a
    neuron can only answer differently where its membrane comes within the rounding of that sum of
    its threshold. With weights and thresholds whose sums are exact all spike counts are equal, bit
    for bit. Given the same currents at the first neurons, spikes depend neither on the batch that
    an image is in nor on threads.

    Args:
        snn: made by :func:`snnkernels.convert`. The plan keeps it, reads its weights at the first
            call, and reads them again when they have changed (writes through ``.data`` or NumPy
            leave no trace: make another plan after them). While forward hooks wait in its body, it
            runs itself, so that they are called.
        precision: ``"float32"``: weights as they are. (On CUDA a convolution of cuDNN may use TF32,
            as everywhere in torch: ``torch.backends.cudnn.allow_tf32``.)

            ``"int16"`` (CPUs): weights as multiples of a 16-bit unit per output channel, sums
            exact; each weight is off by at most half a unit, about 1 / 65,000 of the largest sum
            there can be. Layers whose sums can have more than 10,000 spikes (wide linear layers,
            means of whole maps) keep their 32 bits: the unit would be no smaller than a few times
            a weight.

            ``"float16"``, ``"bfloat16"`` (CUDA): weights rounded to it; membranes, and the sums of
            fused layers, in float32.

            ``"int8"``: all in whole numbers (8-bit weights; thresholds, biases and membranes of 32
            bits; :mod:`.integers`), so that spikes are the same bits whatever adds them up, in
            which order and on which device. Every layer of neurons must be lowered, and one linear
            layer lie between the input and the first; else a call is an error that says so.
        without: names of passes to leave out, of :data:`snnkernels.engine.ALL_PASSES`.
        max_memory: bound on what a call takes for spikes and currents beside weights, in bytes or
            such as ``"256MiB"``: larger batches go through in pieces of as many images as fit, at
            least one. By default 32 MiB on CPUs, 4 GiB on GPUs. Where a part of the answer has no
            row per image they go through whole.

    Raises:
        TypeError: ``snn`` is no converted network.
        ValueError: an argument is not allowed; names it.
    """
    return Plan(snn, precision=precision, without=without, max_memory=max_memory)


def _bytes(value: int | str) -> int:
    if isinstance(value, str):
        for unit, factor in _UNITS.items():
            if value.endswith(unit):
                try:
                    found = int(float(value[: -len(unit)]) * factor)
                except (ValueError, OverflowError):
                    break
                if found > 0:
                    return found
                break
    elif type(value) is int and value > 0:
        return value
    raise ValueError(
        f"max_memory={value!r} must be a positive number of bytes, or such as '256MiB' "
        f"({', '.join(_UNITS)})"
    )


def _backend(device: torch.device) -> Backend | None:
    """What captures graphs on a device, if anything does."""
    return CudaBackend(device) if device.type == "cuda" else None


class Plan(nn.Module):
    """A converted network made fast, made by :func:`lower`; call it like the network.

    Attributes:
        snn: the converted network.
        T: the default number of steps of a call.
        precision: of the weights on spikes.
    """

    def __init__(
        self,
        snn: ConvertedNetwork,
        *,
        precision: str,
        without: Sequence[str],
        max_memory: int | str | None,
    ) -> None:
        super().__init__()
        if not isinstance(snn, ConvertedNetwork):
            raise TypeError(
                f"snn must be a converted network (snnkernels.convert), got {type(snn).__name__}"
            )
        known = dict.fromkeys(name for names in PRECISIONS.values() for name in names)
        if precision not in known:
            allowed = ", ".join(map(repr, known))
            raise ValueError(f"precision={precision!r} is unknown; allowed: {allowed}")
        if not isinstance(without, Iterable):
            raise TypeError(f"without={without!r} must be names of passes: {', '.join(ALL_PASSES)}")
        names = (without,) if isinstance(without, str) else tuple(without)
        unknown = [name for name in names if name not in ALL_PASSES]
        if unknown:
            raise ValueError(
                f"without={unknown!r}: no such pass; there are {', '.join(ALL_PASSES)}"
            )
        self.snn = snn
        self.precision = precision
        self.without = frozenset(names)
        self.max_memory = None if max_memory is None else _bytes(max_memory)
        self._built: dict[Any, Built] = {}
        self._weights: Any = None
        self._alive: list[Tensor] = []
        self._arena: Tensor | None = None
        self._graphs_of: tuple[torch.device, Backend | None] | None = None
        self._lock = threading.RLock()
        self.eval()

    # A plan holds no parameters of its own: what it has made of the weights is made again.
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(_built={}, _weights=None, _alive=[], _arena=None, _graphs_of=None, _lock=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    @property
    def T(self) -> int:
        """The default number of steps of a call."""
        return self.snn.T

    @property
    def report(self) -> Any:
        """The report of the conversion."""
        return self.snn.report

    def latency(self, T: int | None = None) -> int:
        """As of the converted network."""
        return self.snn.latency(T)

    def neurons(self) -> Iterator[tuple[str, SpikingActivation]]:
        """As of the converted network."""
        return self.snn.neurons()

    def train(self, mode: bool = True) -> Plan:
        """Plans are always in evaluation mode."""
        super().train(False)
        return self

    def why_not(self) -> str:
        """Why the network runs as it is, if it does; else nothing."""
        steps = self.snn._clock.steps
        if steps != CAUSAL:
            return "its method runs time otherwise than one spike after another at every step"
        devices = {t.device for t in (*self.snn.parameters(), *self.snn.buffers())}
        if len(devices) != 1 or not {d.type for d in devices} <= set(PRECISIONS):
            found = ", ".join(sorted(map(str, devices))) or "nowhere: it has no tensor"
            return f"it is on {found}, not on one CPU or CUDA device"
        if torch.is_autocast_enabled(next(iter(devices)).type):
            return "autocast is on"
        for name, module in self.snn.body.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return f"a hook of {name or 'the body'} is to be called"
        floats = {t.dtype for t in self.snn.body.parameters() if t.is_floating_point()}
        if floats - {torch.float32}:
            return f"its weights are {', '.join(map(str, floats))}, not float32"
        return ""

    def _as_it_is(self) -> bool:
        reason = self.why_not()
        if reason and self.precision == "int8":
            raise ValueError(f"precision='int8' has no other way to run, but {reason}")
        if not reason and self.precision not in (allowed := PRECISIONS[self._device.type]):
            raise ValueError(
                f"precision={self.precision!r} does not run on {self._device}; there are "
                f"{', '.join(map(repr, allowed))}"
            )
        return bool(reason)

    @property
    def _device(self) -> torch.device:
        return device_of(self.snn)

    @property
    def _most(self) -> int:
        """Bytes that a call may take."""
        return self.max_memory or _MEMORY[self._device.type]

    @torch.compiler.disable  # nothing of it is left to compile
    def forward(self, *inputs: Any, T: int | None = None, **named: Any) -> Any:
        """As :meth:`snnkernels.ConvertedNetwork.forward`, without gradients."""
        if self._as_it_is():
            with torch.no_grad():
                return self.snn(*inputs, T=T, **named)
        T = self.T if T is None else _steps(T)
        one = len(inputs) == 1 and not named
        x = inputs[0] if one and isinstance(inputs[0], (Tensor, Inputs)) else Inputs(inputs, named)
        (out,) = self._answers(self.snn._ports.bind(x), (T,))
        return out

    def predict_curve(self, x: Any, steps: Iterable[int] = (1, 2, 4, 8, 16, 32)) -> dict[int, Any]:
        """The outputs after several numbers of steps, from one run: ``{T: output}``.

        As :meth:`snnkernels.ConvertedNetwork.predict_curve`.

        Args:
            x: ``[B, *]``; of several inputs a tuple by position or a dict by name.
            steps: numbers of steps; order and repetitions do not matter.

        Raises:
            ValueError: ``steps`` is empty, or one is not a whole number of at least 1.
            TypeError: ``steps`` is no iterable of numbers.
        """
        ends = _ends(steps)
        if self._as_it_is():
            with torch.no_grad():
                return self.snn.predict_curve(x, ends)
        bound = self.snn._ports.bind(as_given(x))
        found: dict[int, Any] = {}
        for i in range(0, len(ends), TIMES):
            part = tuple(ends[i : i + TIMES])
            found.update(zip(part, self._answers(bound, part), strict=True))
        return found

    def explain(self, *inputs: Any, **named: Any) -> Explanation:
        """What every pass did for inputs of this shape, and what every layer costs.

        Args:
            inputs: as of a call; with none, those of the last call.

        Raises:
            ValueError: no inputs are given and there was no call yet.
        """
        if self.why_not():
            return Explanation(self.why_not(), {}, [], 0, 0)
        if inputs or named:
            one = len(inputs) == 1 and not named and isinstance(inputs[0], (Tensor, Inputs))
            x = self.snn._ports.bind(inputs[0] if one else Inputs(inputs, named))
            with self._lock, torch.no_grad():
                built = self._plan(x)
        elif self._built:
            built = next(reversed(self._built.values()))
        else:
            raise ValueError(
                "explain() needs inputs: the plan depends on their shape, and there was no call yet"
            )
        if built.graphs is not None and built.graphs.why_not:
            built.notes["capture_graphs"] = [f"none: {built.graphs.why_not}"]
        maps = None
        if not built.packed:
            maps = {layer.name: layer.runs for layer in built.maps}
        return explain(built.before, built.net, built.notes, built.buffers(self.T), self.T, maps)

    def peak_memory(self, batch: int, T: int | None = None) -> int:
        """Bytes that a call on so many images takes for spikes, beside weights, as planned.

        Args:
            batch: number of images, of the shape of the last call's.
            T: number of steps (default: those of the conversion).

        Raises:
            ValueError: there was no call yet; T or batch < 1 or not a whole number.
        """
        T = self.T if T is None else _steps(T)
        if type(batch) is not int or batch < 1:
            raise ValueError(f"batch={batch!r} must be a whole number of at least 1")
        if not self._built:
            raise ValueError("peak_memory needs a call first: the plan depends on the inputs")
        built = next(reversed(self._built.values()))
        image = built.bytes_per_image(T)
        return image * min(batch, max(1, self._most // max(image, 1)))

    # ---- running

    def _answers(self, x: Any, ends: tuple[int, ...]) -> list[Any]:
        with self._lock, torch.no_grad():
            built = self._plan(x)
            batch = len(x)
            image = built.bytes_per_image(ends[-1])
            piece = max(1, self._most // max(image, 1))
            if batch <= piece or not self._in_pieces(built, x):
                return self._run(built, x, ends)
            parts = [self._run(built, x[i : i + piece], ends) for i in range(0, batch, piece)]
            return [_joined([part[i] for part in parts]) for i in range(len(ends))]

    def _in_pieces(self, built: Built, x: Any) -> bool:
        """Whether the answers have one row per image; found out with two images and one step."""
        if built.in_pieces is None:
            (two,) = self._run(built, x[:2], (1,))
            (one,) = self._run(built, x[:1], (1,))
            sizes = [
                [v.shape[:1] for _, v in leaves(answer) if isinstance(v, Tensor)]
                for answer in (one, two)
            ]
            built.in_pieces = all((a, b) == ((1,), (2,)) for a, b in zip(*sizes, strict=True))
        return built.in_pieces

    def _plan(self, x: Any) -> Built:
        tensors = [*self.snn.parameters(), *self.snn.buffers()]
        weights = (
            [(mark(t), t.shape) for t in tensors],
            [settings(layer) for _, layer in self.neurons()],
        )
        if weights != self._weights:
            for old in self._built.values():
                old.close()
            self._built.clear()
            self._weights = weights
            # Kept, so that no other tensor comes to lie where one of these was.
            self._alive = [t.detach() for t in tensors]
        key = _shape(x)
        built: Built | None = self._built.pop(key, None)
        if built is None:
            if self._graphs_of is None or self._graphs_of[0] != self._device:
                self._graphs_of = (self._device, _backend(self._device))
            built = Built(self.snn, x[:1], self.without, self.precision, self._graphs_of[1])
            while len(self._built) >= _SHAPES:
                self._built.pop(next(iter(self._built))).close()
        self._built[key] = built  # the last is that of the last call
        return built

    def _run(self, built: Built, x: Any, ends: tuple[int, ...]) -> list[Any]:
        snn, run = self.snn, built.run
        statics = snn.prefix(x) if built.prefix is None else built.prefix(x)
        inputs = [statics[i] for i in snn._of_body]
        buffers = built.buffers(ends[-1])
        if built.reuse and buffers.words:
            words = buffers.words * len(x)
            if self._arena is None or self._arena.numel() < words:
                self._arena = None  # freed first
                with torch.inference_mode(False):  # it may be written to outside as well
                    self._arena = torch.empty(words, dtype=torch.int64)
            run.arena, run.offsets = self._arena, buffers.offsets
        try:
            if built.graphs is not None and all(isinstance(t, Tensor) for t in inputs):
                counts = built.graphs(*inputs, T=ends)
            else:
                counts = built.compute(*inputs, ends)
        finally:
            run.arena = None
        dtype = next(t.dtype for t in inputs if t.is_floating_point())
        if built.prefix is not None:
            dtype, statics = torch.float32, [t.float() for t in statics]
        return [
            snn._read(statics, [c[i] for c in counts], end, dtype) for i, end in enumerate(ends)
        ]

    def extra_repr(self) -> str:
        """Show precision and passes left out."""
        off = f", without={sorted(self.without)}" if self.without else ""
        return f"precision={self.precision!r}{off}"


def _shape(x: Any) -> Any:
    """What a plan depends on: shapes without the batch, and dtypes."""
    parts = [x] if isinstance(x, Tensor) else x.tensors()
    return tuple((tuple(t.shape[1:]), t.dtype) for t in parts)


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if parts_of(first) is None:
        return first
    columns = zip(*([value for _, value in parts_of(p) or ()] for p in parts), strict=True)
    return each(first, lambda _: _joined(list(next(columns))))
