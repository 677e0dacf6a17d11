"""A network that SpikingJelly converted, before and after one line: ``snnkernels.patch(net)``.

    python benchmarks/bench_patch.py [--quick]

ResNet-18 for CIFAR with batch norms that have seen data (``networks.py``), converted by
SpikingJelly's ``RateCodingRecipe`` with half thresholds per channel. Spikes of every layer and the
answer are compared bit for bit. Then its activations, scaler - neuron - scaler, run on the currents
that they get in the network, in turns with the patched ones: ``relative`` is SpikingJelly's time
divided by ours. Rows: results/patch_cpu.csv.
"""

from __future__ import annotations

import os

# Torch's own log would drown the table.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("TQDM_DISABLE", "1")

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import networks
import torch
from common import arguments, save, short, start, table
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.ann2snn import Converter, RateCodingRecipe
from torch import Tensor, fx, nn

import snnkernels

COLUMNS = ("network", "recipe", "kind", "T", "batch", "layers", "differ", "relative", "low", "high")
RECIPE = {"channel_wise": True, "half_threshold": True}


def converted(name: str) -> tuple[nn.Module, Tensor]:
    """The network as SpikingJelly gives it, and images."""
    torch.manual_seed(0)
    make, side = networks.NETWORKS[name]
    images = networks.pictures(None, 32, side, train=True)
    ann = networks._untrained(make(), images)
    recipe = RateCodingRecipe([images], **RECIPE)
    return Converter(recipe=recipe).convert(ann), images


class Recorder(fx.Interpreter):
    """Runs a network and keeps what its first scalers got and its last scalers gave.

    Not by hooks: a patched activation that somebody looks into runs its three parts one by one.
    """

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.currents: dict[str, Tensor] = {}
        self.spikes: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(target, args, kwargs)
        path, _, name = str(target).rpartition(".")
        if name == "scaler0":
            self.currents[path] = args[0]
        elif name == "scaler1":
            self.spikes[path] = out
        return out


def activations(
    net: nn.Module, currents: dict[str, Tensor]
) -> Iterator[tuple[Any, Any, Any, Tensor]]:
    for path, x in currents.items():
        group: Any = net.get_submodule(path)
        yield group.scaler0, group.if_node, group.scaler1, x


def neurons(net: nn.Module, currents: dict[str, Tensor], by_step: bool) -> Callable[[], None]:
    """All activations of a network, each from its start."""
    rows = list(activations(net, currents))

    def run() -> None:
        for first, node, last, x in rows:
            node.reset()
            if by_step:
                for step in x:
                    last(node(first(step)))
            else:
                last(node(first(x)))

    return run


def whole(net: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        functional.reset_net(net)
        net(x)

    return run


def compare(theirs: Callable[[], None], ours: Callable[[], None], rounds: int) -> list[float]:
    """Ratios of their time to ours, measured in turns."""
    ratios = []
    for i in range(rounds + 1):
        begin = time.perf_counter()
        theirs()
        middle = time.perf_counter()
        ours()
        end = time.perf_counter()
        if i:
            ratios.append((middle - begin) / (end - middle))
    return ratios


def main() -> None:
    args = start(arguments(__doc__).parse_args())
    name = "tiny-resnet" if args.quick else "resnet18"
    T, batch = (4, 2) if args.quick else (16, 4)
    theirs, images = converted(name)
    ours = copy.deepcopy(theirs)
    report = snnkernels.patch(ours, on_refused="error")
    print(report)
    x = images[:batch].expand(T, batch, *images.shape[1:])
    rows = []
    with torch.no_grad():
        recorders = []
        for net in (theirs, ours):
            functional.set_step_mode(net, "m")
            functional.reset_net(net)
            recorder: Any = Recorder(net)
            recorder.spikes["answer"] = recorder.run(x)
            recorders.append(recorder)
        spikes = [r.spikes for r in recorders]
        assert spikes[0].keys() == spikes[1].keys()
        differ = sum(int((spikes[0][k] != spikes[1][k]).sum()) for k in spikes[0])
        currents = {k: v.contiguous() for k, v in recorders[0].currents.items()}
        layers = len(currents)
        del recorders, spikes
        cases: dict[str, Callable[[Any], Callable[[], None]]] = {
            "neurons, all steps": lambda net: neurons(net, currents, by_step=False),
            "neurons, step by step": lambda net: neurons(net, currents, by_step=True),
            "whole network, all steps": lambda net: whole(net, x),
        }
        for kind, make in cases.items():
            for net in (theirs, ours):
                functional.set_step_mode(net, "s" if "step by" in kind else "m")
                functional.reset_net(net)
            rounds = args.rounds if "neurons" in kind else min(args.rounds, 3)
            ratios = compare(make(theirs), make(ours), rounds)
            rows.append({
                "network": name, "recipe": "half threshold, per channel", "kind": kind, "T": T,
                "batch": batch, "layers": layers, "differ": differ,
                "relative": short(statistics.median(ratios)), "low": short(min(ratios)),
                "high": short(max(ratios)),
            })  # fmt: skip
    print(table(rows, COLUMNS))
    print(save(f"patch_{args.device}", rows, key=("network", "kind"), folder=args.out))


if __name__ == "__main__":
    main()
