"""Who runs a whole network: functions of images and a number of steps that return logits.

Everybody takes an image batch and T. What stands beside the plan computes the same network with the
same thresholds (``SpikingJelly, IFNode``; ``unlowered``), another conversion of it (SpikingJelly's
recipes), or the ANN, once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Skip
from network_fold import Neurons, binary, ours
from networks import Subject
from rivals import need
from torch import Tensor, fx
from torch.fx.experimental.optimization import fuse

from snnkernels.conversion.pools import CumulativeMaxPool
from snnkernels.engine import Plan, lower

Run = Callable[[Tensor, int], Tensor]
_LTB_BATCHES = 64
PLAN, ANN, UNLOWERED = "plan", "ANN", "unlowered"


@dataclass(frozen=True)
class Rival:
    """One implementation.

    Attributes:
        name: in rows.
        make: from a network to a function of images and steps.
        differs: why its logits are others than the unlowered network's, where they are.
        held: values of T steps it keeps at a time, in the largest layer's size: whether it fits.
        timeless: one dense pass, whatever T.
    """

    name: str
    make: Callable[[Subject], Run]
    differs: str = ""
    held: float = 3.0
    timeless: bool = False


# ---- ours ----------------------------------------------------------------------------------------


def plan_of(
    subject: Subject, precision: str = "float32", without: Sequence[str] = ()
) -> tuple[Plan, str]:
    """A plan, and what had to be left out of it for it to run."""
    key = f"plan {precision} {sorted(without)}"
    if key not in subject.made:
        plan, note = lower(subject.snn, precision=precision, without=without), ""
        try:
            plan(subject.images[:1], T=1)
        except Exception as error:
            # A pass in the way of others is named in the row; a benchmark is no place to end.
            note = f"without choose_convolution ({type(error).__name__}: {error})"
            off = [*without, "choose_convolution"]
            plan = lower(subject.snn, precision=precision, without=off)
            plan(subject.images[:1], T=1)
        subject.made[key] = plan, note
    return subject.made[key]


def _plan(subject: Subject, precision: str) -> Run:
    plan, _ = plan_of(subject, precision)
    return lambda x, T: plan(x, T=T)


def _unlowered(subject: Subject) -> Run:
    return lambda x, T: subject.snn(x, T=T)


def _channels_last(subject: Subject, dtype: torch.dtype) -> Run:
    snn = copy.deepcopy(subject.snn).to(dtype).to(memory_format=torch.channels_last)

    def run(x: Tensor, T: int) -> Tensor:
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        return snn(x, T=T).float()

    return run


# ---- the ANN -------------------------------------------------------------------------------------


def _ann(subject: Subject, dtype: torch.dtype, layout: torch.memory_format) -> Run:
    # Batch norms in the weights, as in everything else here.
    net = fuse(copy.deepcopy(subject.ann)).to(dtype).to(memory_format=layout)
    return lambda x, T: net(x.to(dtype).contiguous(memory_format=layout)).float()


# ---- SpikingJelly --------------------------------------------------------------------------------


def _if_node() -> Neurons:
    """SpikingJelly's neurons of threshold 1, all steps at once."""
    neuron = need("spikingjelly.activation_based.neuron")
    node = neuron.IFNode(v_threshold=1.0, v_reset=None, step_mode="m")

    def run(x: Tensor) -> Tensor:
        node.reset()
        node.v = torch.full_like(x[0], 0.5)
        return node(x)

    return run


def has_max_pools(subject: Subject) -> bool:
    """Whether the converted network keeps running maxima, which SpikingJelly has not."""
    return any(isinstance(m, CumulativeMaxPool) for m in subject.snn.body.modules())


def _sj_if_node(subject: Subject) -> Run:
    need("spikingjelly")
    mine, theirs = binary(subject, ours), binary(subject, _if_node)
    with torch.no_grad():
        x = subject.images[:2]
        if not torch.equal(mine(x, T=8), theirs(x, T=8)):
            raise RuntimeError("IFNode computes another network than ours with thresholds folded")
    return lambda x, T: theirs(x, T=T)


def _sj_converted(subject: Subject, recipe: str, steps: str, **options: Any) -> Run:
    ann2snn = need("spikingjelly.activation_based.ann2snn")
    functional = need("spikingjelly.activation_based.functional")
    need("loguru").logger.disable("spikingjelly")
    batches = subject.calibration.split(8)
    if recipe == "LocalThresholdBalancingRecipe":
        # Its thresholds rise from 0 batch by batch, to where twice the mean overflow is nothing.
        batches = batches * (_LTB_BATCHES // len(batches))
    loader = [(part, None) for part in batches]
    made = getattr(ann2snn, recipe)(dataloader=loader, **options)
    net: fx.GraphModule = ann2snn.Converter(recipe=made).convert(copy.deepcopy(subject.ann))
    net.eval()
    functional.set_step_mode(net, steps)

    def run(x: Tensor, T: int) -> Tensor:
        functional.reset_net(net)
        if steps == "m":
            return net(x.expand(T, *x.shape).contiguous()).mean(0)
        total = net(x)
        for _ in range(T - 1):
            total = total + net(x)
        return total / T

    return run


# ---- the list ------------------------------------------------------------------------------------

_CL = torch.channels_last
_OTHER = "another conversion: its own thresholds"


def rivals() -> list[Rival]:
    """Everybody, the plan first."""
    f32, bf16 = torch.float32, torch.bfloat16
    recipe = partial(_sj_converted, recipe="RateCodingRecipe", mode="99.9%")
    balanced = partial(_sj_converted, recipe="LocalThresholdBalancingRecipe", steps="m")
    return [
        Rival(PLAN, partial(_plan, precision="float32"), held=0.3),
        Rival(
            "plan, int16", partial(_plan, precision="int16"), "weights as multiples of a unit",
            held=0.3,
        ),
        Rival(UNLOWERED, _unlowered),
        Rival(
            "unlowered, channels_last", partial(_channels_last, dtype=f32),
            "sums in another order: the noise to compare the plan's with",
        ),
        Rival(
            "unlowered, bf16", partial(_channels_last, dtype=bf16),
            "bfloat16 weights and currents, channels_last",
        ),
        Rival("SpikingJelly, IFNode", _sj_if_node, held=7),
        Rival(
            "SpikingJelly, RateCodingRecipe", partial(recipe, steps="m"),
            _OTHER + ", membranes from 0", held=7,
        ),
        Rival(
            "SpikingJelly, RateCodingRecipe, step by step", partial(recipe, steps="s"),
            _OTHER + ", membranes from 0", held=0.5,
        ),
        Rival("SpikingJelly, LTB recipe", balanced, _OTHER, held=7),
        Rival(
            ANN, partial(_ann, dtype=f32, layout=torch.contiguous_format), "the ANN's answer",
            timeless=True,
        ),
        Rival(
            "ANN, channels_last", partial(_ann, dtype=f32, layout=_CL), "the ANN's answer",
            timeless=True,
        ),
        Rival(
            "ANN, bf16, channels_last", partial(_ann, dtype=bf16, layout=_CL),
            "the ANN's answer in bfloat16", timeless=True,
        ),
    ]  # fmt: skip


def made(rival: Rival, subject: Subject) -> Run:
    """The function of a rival, made once a network; a failure is said once and kept."""
    if rival.name not in subject.made:
        try:
            subject.made[rival.name] = rival.make(subject)
        except Skip as error:
            subject.made[rival.name] = error
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            subject.made[rival.name] = Skip(f"{type(error).__name__}: {reason}")
    found = subject.made[rival.name]
    if isinstance(found, Skip):
        raise found
    return found
