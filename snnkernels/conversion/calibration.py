"""Thresholds from data: one pass over the loader, then a rule per layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Dataset, IterableDataset

from ..distributed.passes import bar_of
from .balancing import Balancing
from .divergence import kl_threshold
from .errors import ConversionError
from .histogram import Histogram
from .inputs import as_given
from .ops import Activation

if TYPE_CHECKING:
    from .source import Source

__all__ = [
    "SAMPLE",
    "Statistics",
    "batch_of",
    "batches",
    "check_loader",
    "collect",
    "mmse_threshold",
    "parse_rule",
    "rule_threshold",
]

SAMPLE = 32  # inputs kept for the report's rates and errors
GRID = 95  # candidates max * (1 - 0.01 i), i = 0..94, as in SNN Calibration (ICML 2021)


class Statistics:
    """What calibration saw at one activation.

    Attributes:
        histogram: of the ANN's activation values, per channel or (one channel) per layer.
        channels: size of the channel dimension.
        channel_dim: its index, the batch being 0; given as 1, or -1 for the last dimension.
        dtype: of the activation.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, channel_dim: int = 1) -> None:
        self.channel_dim = channel_dim % len(shape) if len(shape) > 1 else 0
        self.shape = shape
        self.channels = shape[self.channel_dim] if len(shape) > 1 else 1
        self.dtype = dtype
        self.histogram: Histogram | None = None

    def prepare(self, device: torch.device, per_channel: bool | None) -> None:
        """An empty histogram, unless ``per_channel`` is None."""
        if per_channel is not None:
            channels = self.channels if per_channel else 1
            self.histogram = Histogram(channels, 1024 if per_channel else 8192, device)

    def update(self, label: str, a: Tensor, per_channel: bool | None) -> None:
        """Add one batch of activations ``[B, C, *]``."""
        if not a.is_floating_point():
            raise ConversionError(
                f"{label}: its activations on the calibration data are {a.dtype}, no floating "
                "point numbers; neurons stand for activations of real values"
            )
        # The least and the largest tell, in a tenth of the time of looking at each.
        if a.numel() and not bool(torch.isfinite(torch.stack(a.aminmax())).all()):
            what = "NaN" if bool(torch.isnan(a).any()) else "infinite values"
            raise ConversionError(
                f"{label}: the ANN's activations contain {what} on the calibration data; no "
                "threshold can be found. Check the network's weights and the loader's inputs"
            )
        if per_channel is None:
            return
        a = a.detach()
        if a.dtype in (torch.float16, torch.bfloat16):
            a = a.float()
        table = a.movedim(self.channel_dim, 0).flatten(1) if a.dim() > 1 else a.view(1, -1)
        table = table if per_channel else table.reshape(1, -1)
        if self.histogram is None:
            self.prepare(a.device, per_channel)
        assert self.histogram is not None
        if len(table) != len(self.histogram.counts):
            raise ConversionError(
                f"{label}: {len(table)} channels in one batch, {len(self.histogram.counts)} in "
                "another; per-channel thresholds need one number. Pass per_channel=False"
            )
        self.histogram.update(table)


def check_loader(loader: Any, inputs: Any = None) -> None:
    """Refuse what is no loader of batches.

    Raises:
        TypeError: ``loader`` cannot be iterated over, or is a data set or an (inputs, labels) pair
            rather than batches.
    """
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"loader is a Dataset ({type(loader).__name__}), whose items are single samples; "
            "pass torch.utils.data.DataLoader(dataset, batch_size=64)"
        )
    if inputs is None and isinstance(loader, (tuple, list)) and len(loader) == 2:
        x, y = loader
        if (
            isinstance(x, Tensor)
            and isinstance(y, Tensor)
            and (x.dim(), x.is_floating_point()) != (y.dim(), y.is_floating_point())
        ):
            raise TypeError(
                f"loader is a {type(loader).__name__} of two different tensors, {x.dtype} "
                f"{tuple(x.shape)} and {y.dtype} {tuple(y.shape)}, so inputs and labels rather "
                "than two batches; pass the inputs alone, or [(inputs, labels)]"
            )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            "loader must be an iterable of input batches or one tensor, got "
            f"{type(loader).__name__}"
        )


def batch_of(item: Any, inputs: Any = None) -> Any:
    """The batch in an item of a loader: a tensor, or :class:`Inputs`.

    Raises:
        TypeError: it is neither a tensor nor starts with one.
    """
    given: Any
    if inputs is not None:
        given = as_given(inputs(item))
    else:
        given = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(given, Tensor) and inputs is None:
        raise TypeError(
            "loader must yield tensors or (input, anything); got "
            f"{type(item).__name__}. Wrap it so that the first element is the input tensor, or "
            "pass inputs=, a function from an item to the network's inputs"
        )
    if isinstance(given, Tensor) and given.dim() == 0:
        raise TypeError("loader yields scalars; it must yield batches of inputs, [B, *]")
    if isinstance(given, Tensor) and given.is_meta:
        raise ValueError(
            f"loader yields {tuple(given.shape)} on the meta device, which holds no values; it "
            "must yield inputs on the CPU or on the network's device"
        )
    return given


def batches(loader: Any, device: torch.device | None, inputs: Any = None) -> Iterator[Any]:
    """The inputs of a loader: tensors, or the first element of tuples and lists.

    A single tensor is one batch. Inputs are moved to ``device``. With ``inputs``, a function, what
    that gives for an item: a tensor, or :class:`Inputs`.

    Raises:
        TypeError: as :func:`check_loader` and :func:`batch_of`.
    """
    check_loader(loader, inputs)
    for item in [loader] if isinstance(loader, Tensor) else loader:
        given = batch_of(item, inputs)
        yield given.to(device) if device is not None else given


@torch.no_grad()
def collect(
    model: fx.GraphModule,
    paths: dict[str, tuple[bool | None, int]],
    source: Source,
    *,
    progress: bool = True,
    once: bool = False,
    currents: bool = False,
) -> dict[str, Statistics]:
    """Run ``model`` over the batches once and gather statistics at the activations ``paths``.

    Args:
        model: the ANN with its activations as :class:`Activation` modules, in eval mode.
        paths: activation path to ``(per channel, channel dimension)``: whether a histogram per
            channel (else per layer) is kept; None: only shape and dtype are noted and the values
            checked. The dimension is 1 or -1.
        source: of the batches; each rank of its team runs its own, all get the statistics of all.
        progress: show a tqdm bar if tqdm is there (``TQDM_DISABLE`` is honoured by tqdm).
        once: the first inputs are enough.
        currents: of the positive part of what the activations receive, rather than of them.

    Returns:
        Statistics by path.

    Raises:
        ConversionError: NaN or infinite activations (names the layer), or a later batch that the
            network does not take.
    """
    found: dict[str, Statistics] = {}

    def watch(path: str, per_channel: bool | None, channel_dim: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            assert isinstance(module, Activation)
            a = torch.relu(args[0]) if currents else out
            if path not in found:
                found[path] = Statistics(a.shape, a.dtype, channel_dim)
                found[path].prepare(a.device, per_channel)
            if counting:
                found[path].update(module.label, a, per_channel)

        return model.get_submodule(path).register_forward_hook(hook)

    def work(i: int, x: Any) -> None:
        try:
            model(x)
        except ConversionError:
            raise
        except RuntimeError as error:
            raise ConversionError(
                f"the network fails on item {i} of loader, of shape {tuple(x.shape)}, "
                f"{x.dtype}: {error}"
            ) from error
        if bar is not None:
            bar.update()

    team, bar = source.team, None
    handles = [watch(path, *how) for path, how in paths.items()]
    try:
        counting = once
        if once or source.apart:  # a rank without a batch of its own knows the shapes
            model(source.first[:SAMPLE])
        if not once:
            counting = True
            show = progress and not isinstance(source.loader, Tensor)
            bar = bar_of(source.loader, team, "calibrating", show)
            source.run(work, found, ".currents" if currents else "")
    finally:
        if bar is not None:
            bar.close()
        for handle in handles:
            handle.remove()
    return found


def parse_rule(rule: str) -> float | str | Balancing:
    """``"mmse"``, ``"max"``, ``"kl"``, ``"ltb"``, or a percentile such as ``"99.9%"`` as a number.

    Raises:
        ValueError: anything else; lists what is allowed.
    """
    if rule in ("mmse", "max", "kl"):
        return rule
    if rule == "ltb":
        return Balancing()
    if rule.endswith("%"):
        try:
            percent = float(rule[:-1])
        except ValueError:
            percent = -1.0
        if 0 < percent <= 100:
            return percent
    raise ValueError(
        f"threshold={rule!r} is not known; allowed: 'mmse', 'max', 'kl', 'ltb' (or a "
        "Balancing), a percentile such as '99.9%', a number, a tensor, or a dict from layer name "
        "to one of these"
    )


def mmse_threshold(histogram: Histogram, T: int, v_init: Tensor | float) -> Tensor:
    """The threshold V whose staircase ``V/T clip(floor((aT + v_init) / V), 0, T)`` fits a best.

    Source: the grid and the criterion are those of SNN Calibration (Li et al., ICML 2021, light
    pipeline); the staircase is the one in force, so it includes the initial potential.

    Args:
        histogram: of the ANN's activations a.
        T: number of steps.
        v_init: absolute potential, a tensor, scalar or ``[C]``; or a number, the part of V.

    Returns:
        float64 ``[C]``; 0 for a channel without a positive value. Of equal candidates the largest.
    """
    value, weight = histogram.points()
    used = weight.sum(0) > 0
    value, weight = value[:, used], weight[:, used]
    silent = (histogram.total - weight.sum(1)).clamp(min=0)
    part = None if isinstance(v_init, Tensor) else v_init
    start = v_init.double().reshape(-1, 1) if isinstance(v_init, Tensor) else torch.zeros(())
    start = start.to(value.device)
    best = torch.full_like(histogram.maximum, torch.inf)
    chosen = torch.zeros_like(histogram.maximum)
    for i in range(GRID):
        candidate = histogram.maximum * (1 - 0.01 * i)
        v = candidate[:, None].clamp(min=torch.finfo(torch.float64).tiny)
        offset = start if part is None else v * part
        steps = torch.floor((value * T + offset) / v).clamp_(0, T)
        error = ((value - v * steps / T).square_() * weight).sum(1)
        at_zero = v * torch.floor(offset / v).clamp(0, T) / T
        error = error + silent * at_zero[:, 0].square()
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, candidate, chosen)
    return chosen


def rule_threshold(
    rule: str, histogram: Histogram, T: int, v_init: Tensor | float
) -> tuple[Tensor, list[int], bool]:
    """Apply a rule: ``(theta float64 [C], channels that took the layer's value, layer silent)``.

    A channel that never fires on the data (or whose percentile is 0) takes its layer's threshold;
    a layer that never fires takes 1.
    """
    parsed = parse_rule(rule)

    def apply(h: Histogram) -> Tensor:
        start = v_init if h is histogram else _typical(v_init)
        if parsed == "mmse":
            return mmse_threshold(h, T, start)
        if parsed == "kl":  # of all channels as one its bins are common to them
            return kl_threshold(histogram, T, start, pooled=h is not histogram)
        assert isinstance(parsed, (str, float))
        return h.maximum.clone() if parsed == "max" else h.percentile(float(parsed))

    theta = apply(histogram)
    dead = torch.nonzero(theta <= 0).flatten().tolist()
    if not dead:
        return theta, [], False
    silent = not bool(histogram.maximum.amax() > 0)
    layer = apply(histogram.pooled()) if not silent else torch.ones_like(theta[:1])
    if not bool(layer > 0):  # the percentile of a layer that hardly ever fires
        layer = histogram.maximum.amax().view(1)
    theta[dead] = layer
    return theta, dead, silent


def _typical(v_init: Tensor | float) -> Tensor | float:
    return v_init.double().mean() if isinstance(v_init, Tensor) else v_init
