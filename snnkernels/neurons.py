"""Integrate-and-fire neurons as modules that hold state and parameters."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import surrogate as _surrogate
from .kernels import arguments, call, operands
from .kernels.arguments import NO_OPTIONS, Options
from .kernels.spec import SPIKES, Asked
from .options import Probe, Signed
from .packed import PackedSpikes

_OUTPUTS = ("spikes", "packed", "count", "rate")
_STEP_MODES = ("s", "m")
# By output, store_v_seq, store_count, store_packed, store_charge_seq.
_ASKED: dict[tuple[str, bool, bool, bool, bool], Asked] = {
    (output, v_seq, count, words, charge_seq): Asked(
        spikes=output == "spikes",
        words=words or output == "packed",
        count=count or output in ("count", "rate"),
        v_seq=v_seq,
        charge_seq=charge_seq,
    )
    for output in _OUTPUTS
    for v_seq, count, words, charge_seq in itertools.product((False, True), repeat=4)
}
_ASKED["spikes", False, False, False, False] = SPIKES
# A learned threshold never falls below this fraction of where it started.
_FLOOR = 1e-3


class IFNode(nn.Module):
    """Integrate-and-fire neurons; words and defaults as in SpikingJelly where both have them.

    ``m = v + x``, fire at ``m >= v_threshold``, reset by subtraction, all T steps in one launch
    (:func:`snnkernels.functional.if_multi_step`). The membrane ``v`` is carried from call to call
    until :meth:`reset`; a call with another neuron shape starts at ``v_init`` again.

    Args:
        v_threshold: positive and finite: a number, or a tensor that is scalar, per channel (with
            ``channel_dim``) or broadcasts to the neurons' shape. Tensors are buffers.
        v_reset: ``None`` resets by subtraction; a number is what v becomes after a spike.
        surrogate_function: see :func:`snnkernels.surrogate.resolve`; default ATan, alpha 2.
        detach_reset: no gradient through the spike in the reset.
        step_mode: ``"m"``: inputs are ``[T, *shape]``; ``"s"``: one step, ``[*shape]``.
        v_init: membrane at start and after :meth:`reset`: a number, a tensor as for
            ``v_threshold``, or ``"half"`` for half the threshold (OPI, Bu et al., AAAI 2022), which
            follows a threshold that is learned.
        channel_dim: dimension of per-channel tensors in the neurons' shape, counted without T.
        amplitude: what a spike weighs: ``None`` (1), a number, a tensor, or ``"threshold"``.
        input_scale: ``m = v + round(x * input_scale)``; a number or a tensor.
        tie: ``">="`` fires at the threshold, ``">"`` only above.
        learn_threshold, learn_v_init: make them parameters. The threshold in force is
            ``max(v_threshold, 0.001 * its start)``.
        output: ``"spikes"`` ``[T, *shape]``; ``"packed"``, :class:`snnkernels.PackedSpikes` of that
            shape, a bit a spike; ``"count"`` (int32) or ``"rate"`` (``amplitude * count / T``),
            both ``[*shape]`` with no ``[T, ...]`` tensor in between.
        spike_dtype: dtype of the spikes: the input's (default) or ``torch.uint8``.
        store_v_seq: keep the membranes after each step in ``v_seq``.
        store_count: keep the spike counts of the last call in ``count``, int32 ``[*shape]``.
        store_packed: keep the spikes of the last call in ``packed``, whatever ``output`` is: a
            :class:`snnkernels.PackedSpikes`, made in the same launch. Not of ``max_spikes`` and
            ``signed``, whose spikes are no bits.
        store_charge_seq: keep the membranes of each step before it fires in ``charge_seq``, as
            ``v_seq``.
        save: what is kept for the backward pass, see
            :func:`snnkernels.functional.if_multi_step`.
        layout: where time is in inputs and outputs of step mode ``"m"``: ``"T,N"`` (default),
            ``"N,T"`` (Sinabs, Rockpool), ``"T*N"`` or ``"N*T"`` (merged, with ``T``).
        T: number of steps of merged layouts.
        bias, fire_level, max_spikes, signed, probe, parallel: what methods ask of a neuron, see
            :func:`snnkernels.functional.if_run`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range, or an unknown word; the message names it.

    The attribute ``mask`` (None) may be set to a bool or uint8 tensor that broadcasts to
    ``[*shape]``: where it is 0 a neuron emits nothing.

    Thresholds and initial membranes keep their float32 through ``.half()`` and ``.bfloat16()``.
    Given as numbers they belong to the code, like every other argument, and are not in the state
    dict; given as tensors they are.

    In a training loop call :meth:`reset` (or :func:`reset_net`) before each batch, or
    :meth:`detach` to carry the membrane on: otherwise the next backward pass runs into the last
    one's graph.
    """

    # Numbers, or tensors where the constructor was given tensors.
    v_threshold: Any
    v_init: Any
    amplitude: Any
    input_scale: Any
    beta: Any
    bias: Any
    fire_level: Any
    _floor: Tensor
    _v: Any

    def __init__(
        self,
        v_threshold: float | Tensor = 1.0,
        v_reset: float | None = None,
        surrogate_function: Any = None,
        detach_reset: bool = False,
        step_mode: str = "m",
        *,
        v_init: float | Tensor | str = 0.0,
        channel_dim: int | None = None,
        amplitude: float | Tensor | str | None = None,
        input_scale: float | Tensor | None = None,
        tie: str = ">=",
        learn_threshold: bool = False,
        learn_v_init: bool = False,
        output: str = "spikes",
        spike_dtype: torch.dtype | None = None,
        store_v_seq: bool = False,
        store_count: bool = False,
        store_packed: bool = False,
        store_charge_seq: bool = False,
        save: str = "recompute",
        layout: str = "T,N",
        T: int | None = None,
        bias: float | Tensor | None = None,
        fire_level: float | Tensor | None = None,
        max_spikes: int | None = None,
        signed: Signed | None = None,
        probe: Probe | None = None,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        if output not in _OUTPUTS:
            raise ValueError(f"output={output!r} is unknown; allowed are {', '.join(_OUTPUTS)}")
        if tie not in (">=", ">"):
            raise ValueError(f"tie={tie!r} is unknown; allowed are '>=' and '>'")
        if isinstance(v_init, str) and v_init != "half":
            raise ValueError(f"v_init={v_init!r} is unknown; the only string allowed is 'half'")
        if isinstance(amplitude, str) and amplitude != "threshold":
            raise ValueError(f"amplitude={amplitude!r} is unknown; only 'threshold' is allowed")
        if v_reset is not None and not _finite(v_reset):
            raise ValueError(f"v_reset={v_reset!r} must be finite or None")
        if channel_dim is not None and type(channel_dim) is not int:
            raise TypeError(f"channel_dim={channel_dim!r} must be an int or None")
        whole = (torch.uint8,) if signed is None else (torch.int8,)
        if spike_dtype not in (None, *whole, *arguments.FLOATS):
            raise ValueError(
                f"spike_dtype={spike_dtype!r} is not offered; allowed are None (the input's) and "
                f"{whole[0]}"
            )
        if save not in arguments.SAVES:
            raise ValueError(f"save={save!r} is unknown; allowed: {', '.join(arguments.SAVES)}")
        if layout not in arguments.LAYOUTS:
            allowed = ", ".join(arguments.LAYOUTS)
            raise ValueError(f"layout={layout!r} is unknown; allowed: {allowed}")
        if T is not None:
            arguments.check_steps(T)
            if "*" not in layout:
                raise ValueError(f"T={T} is for merged layouts, not layout={layout!r}")
        self.step_mode = step_mode
        self.v_reset = None if v_reset is None else float(v_reset)
        self.surrogate_function = _surrogate.resolve(surrogate_function)
        self.detach_reset = detach_reset
        self.channel_dim = channel_dim
        self.tie = tie
        self.output = output
        self.spike_dtype = spike_dtype
        self.store_v_seq = store_v_seq
        self.store_count = store_count
        self.store_packed = store_packed
        self.store_charge_seq = store_charge_seq
        self.save = save
        self.layout = layout
        self.T = T
        self.max_spikes = max_spikes
        self.signed = signed
        self.probe = probe
        self.parallel = parallel
        self.mask: Tensor | None = None
        self.v_seq: Tensor | None = None
        self.charge_seq: Tensor | None = None
        self.count: Tensor | None = None
        self.packed: PackedSpikes | None = None
        self._v = None
        self._carried = False  # _v comes from a call
        self.learn_threshold = learn_threshold

        _check_built(v_threshold)
        self._hold("v_threshold", v_threshold, learn_threshold)
        if learn_threshold:
            self.register_buffer("_floor", _FLOOR * self.v_threshold.detach().clone())
        if learn_v_init and isinstance(v_init, str):
            v_init = 0.5 * v_threshold
        self._hold("v_init", v_init, learn_v_init)
        self._hold("amplitude", amplitude, False)
        self._hold("input_scale", input_scale, False)
        self._hold("beta", None, False)
        self._hold("bias", bias, False)
        self._hold("fire_level", fire_level, False)

    def _hold(self, name: str, value: Any, learn: bool) -> None:
        """Keeps numbers as attributes, tensors as buffers, learned ones as parameters."""
        if learn:
            tensor = (
                value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value))
            )
            self.register_parameter(name, nn.Parameter(_at_least_float32(tensor)))
        elif isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Tensor):
            self.register_buffer(name, _at_least_float32(value.detach().clone()))
        elif (isinstance(value, str) and name in ("v_init", "amplitude")) or (
            value is None and name != "v_init"
        ):
            setattr(self, name, value)
        else:
            setattr(self, name, operands.number(name, value))

    @property
    def step_mode(self) -> str:
        """``"m"`` (many steps) or ``"s"`` (a single one)."""
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value not in _STEP_MODES:
            raise ValueError(f"step_mode={value!r} is unknown; allowed are 's' and 'm'")
        self._step_mode = value

    def supported_step_mode(self) -> tuple[str, ...]:
        """The step modes there are, as in SpikingJelly."""
        return _STEP_MODES

    @property
    def threshold(self) -> float | Tensor:
        """The threshold in force: ``v_threshold``, kept above its floor while it is learned."""
        if self.learn_threshold:
            operands.check_local("v_threshold", self.v_threshold)
            return torch.maximum(self.v_threshold, self._floor)
        return self.v_threshold

    @property
    def v(self) -> Any:
        """The membrane: a tensor ``[*shape]`` after a call, ``v_init`` after :meth:`reset`."""
        if self._v is not None:
            return self._v
        return 0.5 * self.threshold if isinstance(self.v_init, str) else self.v_init

    @v.setter
    def v(self, value: Tensor | float | None) -> None:
        self._v = value
        self._carried = False  # broadcasts to whatever shape comes

    def reset(self) -> None:
        """Forgets the membrane: the next call starts at ``v_init``."""
        # Not through nn.Module.__setattr__, which costs more than the kernel of a small layer.
        self.__dict__.update(
            _v=None, _carried=False, v_seq=None, charge_seq=None, count=None, packed=None
        )

    def detach(self) -> None:
        """Cuts the membrane from the graph of earlier calls (truncated back-propagation)."""
        if isinstance(self._v, Tensor):
            self._v = self._v.detach()

    def forward(self, x: Tensor, T: int | None = None) -> Any:
        """Runs the neurons.

        Args:
            x: current ``[T, *shape]``, or as ``layout`` says (step mode ``"m"``); ``[*shape]``
                (``"s"``).
            T: with step mode ``"m"``: ``x`` is ``[*shape]``, held constant for T steps; with a
                merged layout the steps it holds.

        Returns:
            What ``output`` says.

        Raises:
            TypeError: ``x`` is no tensor, or a merged layout was not told ``T``.
            ValueError: a shape that does not fit; ``T`` in step mode ``"s"``.
        """
        single = self._step_mode == "s"
        layout = "T,N" if single else self.layout
        if single:
            if T is not None:
                raise ValueError("T is for step_mode='m'; step_mode='s' takes one step a call")
            T = 1
        elif "*" in layout and T is None:
            T = self.T
        v = self._v
        fits = isinstance(x, Tensor) and self._carried and v.shape == _neurons(x, T, layout)
        if v is None or (self._carried and not fits):
            v = self.v_init
        threshold = self.threshold if self.learn_threshold else self.v_threshold
        output = self.output
        asked = _ASKED[
            output, self.store_v_seq, self.store_count, self.store_packed, self.store_charge_seq
        ]
        run = call.run(
            x, asked, v, threshold, self.v_reset, self.surrogate_function, self.detach_reset, T,
            self.channel_dim, self.amplitude, self.input_scale, self.tie, self.spike_dtype,
            output == "rate", None, self.save, layout, self._options(),
        )  # fmt: skip
        # Not through nn.Module.__setattr__, which costs as much as the kernel of a small layer.
        object.__setattr__(self, "_v", run[4])
        if not self._carried:
            object.__setattr__(self, "_carried", True)
        if run[4].requires_grad and not torch.compiler.is_compiling():
            run[4].grad_fn.neuron = weakref.ref(self)  # whom to name if backward comes too late
        if self.store_v_seq:
            self.v_seq = run[5]
        if self.store_charge_seq:
            self.charge_seq = run[6]
        if self.store_count:
            self.count = run[2]
        if asked.words:
            spikes = call.packed(run[1], x, T, layout, self.amplitude, threshold, self.channel_dim)
            if self.store_packed:
                self.packed = spikes
            if output == "packed":
                return spikes
        if output == "count":
            return run[2]
        return call.first_step(run[0]) if single and output == "spikes" else run[0]

    def _options(self) -> Options:
        """What only the general neuron knows; the same object for a plain one."""
        if (
            self.beta is None
            and self.bias is None
            and self.fire_level is None
            and self.max_spikes is None
            and self.signed is None
            and self.mask is None
            and self.probe is None
            and not self.parallel
        ):
            return NO_OPTIONS
        return Options(
            self.beta, self.bias, self.fire_level, self.max_spikes, self.signed, self.mask,
            self.probe, self.parallel,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IFNode:
        kept = {
            name: tensor.detach()
            for store in (self._parameters, self._buffers)
            for name, tensor in store.items()
            if tensor is not None
        }
        super()._apply(fn, recurse)
        # Half-precision thresholds would move spikes: only device and float64 moves are followed.
        for name, before in kept.items():
            tensor = getattr(self, name)
            if tensor.dtype in (torch.float16, torch.bfloat16):
                grad, tensor.grad = tensor.grad, None
                tensor.data = before.to(tensor.device)
                if grad is not None:
                    tensor.grad = grad.to(before.dtype)
        if self.packed is not None:
            self.packed = self.packed.to(fn(self.packed.words).device)
        for name in ("_v", "v_seq", "charge_seq", "mask", "count"):
            state = getattr(self, name)
            if isinstance(state, Tensor):
                moved = fn(state)
                half = moved.dtype in (torch.float16, torch.bfloat16)
                setattr(self, name, state.to(moved.device) if half else moved)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = prefix + "v_threshold"
        if key in state_dict:
            _check_built(state_dict[key])
        # With assign=True a half-precision threshold would take the place of ours.
        own = {prefix + name for name in (*self._parameters, *self._buffers)}
        loaded = {
            name: _at_least_float32(t) if name in own and isinstance(t, Tensor) else t
            for name, t in state_dict.items()
        }
        super()._load_from_state_dict(loaded, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # A graph can be neither copied nor pickled.
        for name in ("_v", "v_seq", "charge_seq"):
            if isinstance(state[name], Tensor):
                state[name] = state[name].detach()
        return state

    def extra_repr(self) -> str:
        """The arguments that differ between nodes."""

        def short(value: Any) -> str:
            return f"Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)

        parts = [f"v_threshold={short(self.v_threshold)}", f"v_reset={self.v_reset}"]
        parts += [f"v_init={short(self.v_init)}", f"step_mode={self.step_mode!r}"]
        if self.amplitude is not None:
            parts.append(f"amplitude={short(self.amplitude)}")
        if self.channel_dim is not None:
            parts.append(f"channel_dim={self.channel_dim}")
        usual = {"output": "spikes", "layout": "T,N", "save": "recompute", "parallel": False}
        options = ("bias", "fire_level", "max_spikes", "signed", "probe")
        for name, value in {**usual, **dict.fromkeys(options)}.items():
            given = getattr(self, name)
            if given is not value and (isinstance(given, Tensor) or given != value):
                parts.append(f"{name}={short(given)}")
        return ", ".join([*parts, f"surrogate_function={self.surrogate_function!r}"])


class LIFNode(IFNode):
    """Leaky integrate-and-fire neurons: ``m = round(beta * v) + round(input_scale * x)``.

    The rest as :class:`IFNode`, arguments too.

    Args:
        beta: leak, what is left of the membrane after a step: a number in [0, 1], or a tensor as
            for ``v_threshold``. A time constant ``tau`` is ``beta = 1 - 1 / tau`` (SpikingJelly's
            ``decay_input=True`` has ``input_scale = 1 / tau`` as well).
        learn_beta: make it a parameter.

    Raises:
        ValueError: a beta outside [0, 1].
    """

    def __init__(
        self,
        beta: float | Tensor = 0.9,
        v_threshold: float | Tensor = 1.0,
        *args: Any,
        learn_beta: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_beta(beta)
        super().__init__(v_threshold, *args, **kwargs)
        if self.parallel:
            raise ValueError("parallel cannot be combined with beta")
        del self.beta
        self._hold("beta", beta, learn_beta)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "beta" in state_dict:
            _check_beta(state_dict[prefix + "beta"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The arguments that differ between nodes."""
        beta = f"Tensor{tuple(self.beta.shape)}" if isinstance(self.beta, Tensor) else self.beta
        return f"beta={beta}, {super().extra_repr()}"


def _check_beta(beta: Any) -> None:
    if isinstance(beta, Tensor):
        operands.check_real("beta", beta)
        held = beta.detach().cpu()
        bad = held[~((held >= 0) & (held <= 1))]
        if bad.numel():
            raise ValueError(f"beta must be within [0, 1]; it holds {bad.reshape(-1)[0].item()}")
    elif not 0.0 <= operands.number("beta", beta) <= 1.0:
        raise ValueError(f"beta={beta!r} must be within [0, 1]")


def _neurons(x: Tensor, T: int | None, layout: str) -> tuple[int, ...]:
    """The neurons' shape of an input."""
    if layout == "T,N":
        return x.shape[1:] if T is None else x.shape
    if layout == "N,T":
        return (x.shape[0], *x.shape[2:])
    return (x.shape[0] // (T or 1), *x.shape[1:])


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _check_built(threshold: Any) -> None:
    """Checks a threshold on any device: building and loading may wait for it, calls may not."""
    if isinstance(threshold, float) and math.isnan(threshold):
        operands.check_threshold(threshold)
    elif isinstance(threshold, Tensor):
        operands.check_real("v_threshold", threshold)
        operands.check_threshold(threshold.detach().cpu())
    else:
        operands.check_threshold(operands.number("v_threshold", threshold))


def _finite(value: Any) -> bool:
    # NaN is not a number for operands.number, but here the message is about finiteness.
    nan = isinstance(value, float) and math.isnan(value)
    return not nan and math.isfinite(operands.number("v_reset", value))
