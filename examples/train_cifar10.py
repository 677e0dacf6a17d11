"""Train a CIFAR-10 network with activations that spiking neurons can replace.

    python examples/train_cifar10.py --data cifar10_jpeg.npz --network vgg16 --activation qcfs \\
        --out vgg16_qcfs.safetensors
    torchrun --nproc-per-node 4 examples/train_cifar10.py --data ... --out ...

Crops and flips on tensors, SGD with momentum, a cosine from ``--lr`` to 0, bf16 autocast,
channels_last. After every epoch everything needed to go on is written beside ``--out`` (with
``.state`` behind its name): the same command after a kill, or after ``--minutes``, goes on where
the last epoch ended and gives the weights of an uninterrupted run (on a CPU bit for bit). What is
drawn depends on seed and epoch alone, not on the number of processes. ``--init`` starts from the
weights of a checkpoint: a few epochs make a network of ReLUs one of QCFS.

``--activation ratenorm`` has a second stage (Ding et al., IJCAI 2021) of ``--rate-epochs``: weights
are held, one scale of all thresholds is trained with the rate inference loss, and what costs more
than ``--rate-tolerance`` points of test accuracy is not kept.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from training import Images, Team, draw, load_state, write

from snnkernels import data, models
from snnkernels.cli import progress_bar
from snnkernels.conversion import ACTIVATIONS as STORED
from snnkernels.conversion import (
    QCFS,
    ClipReLU,
    RateNorm,
    ThresholdReLU,
    lock_rates,
    name_activation,
    rate_inference_loss,
    record_rates,
)

ACTIVATIONS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
    "relu": lambda args: nn.ReLU(),
    "clip": lambda args: ClipReLU(4.0 if args.ceiling is None else args.ceiling),
    "qcfs": lambda args: QCFS(
        args.levels, 8.0 if args.ceiling is None else args.ceiling, args.gradient
    ),
    "threshold_relu": lambda args: ThresholdReLU(
        2.0 if args.ceiling is None else args.ceiling, args.shift_steps
    ),
    "ratenorm": lambda args: RateNorm(),
}
WEIGHTED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
NETWORKS = tuple(name for name in models.ARCHITECTURES if name != "small_cnn")
# Of no consequence for the weights: they may change from one part of a run to the next.
FREE = ("data", "out", "minutes", "fresh", "threads")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="PATH", help=".npz bundle, or the archives")
    add("--out", type=Path, required=True, metavar="FILE", help="the checkpoint, .safetensors")
    add("--network", choices=NETWORKS, default="vgg16")
    add("--activation", choices=tuple(ACTIVATIONS), default="relu")
    add("--pool", choices=("avg", "max"), default="avg", help="of the VGGs")
    add(
        "--init",
        metavar="FILE",
        help="start from the weights of this checkpoint; from its ceilings without --ceiling",
    )
    add("--levels", type=int, default=8, metavar="L", help="steps of the staircase of qcfs")
    add("--gradient", choices=("floor_clip", "clip_floor"), default="floor_clip", help="of qcfs")
    add("--ceiling", type=float, help="clip and qcfs start there, threshold_relu stays there")
    add("--shift-steps", type=int, metavar="T", help="the shift of threshold_relu")
    add("--epochs", type=int, default=200)
    add("--batch-size", type=int, default=128, help="of all processes together")
    add("--lr", type=float, default=0.1)
    add("--weight-decay", type=float, default=5e-4)
    add("--precision", choices=("bf16", "fp32"), default="bf16")
    add("--rate-epochs", type=int, default=10, help="of the second stage of ratenorm; 0: none")
    add("--rate-weight", type=float, default=0.1, help="of the rate inference loss")
    add("--rate-tolerance", type=float, default=1.0, metavar="POINTS")
    add("--seed", type=int, default=0)
    add("--limit", type=int, metavar="N", help="the first N images of both sets: a smoke test")
    add("--minutes", type=float, help="stop after the epoch that ends later than this")
    add("--threads", type=int, help="of one process on a CPU")
    add("--device", choices=("cuda", "cpu"), help="the GPU if there is one")
    add("--fresh", action="store_true", help="do not go on from a state beside --out")
    args = parser.parse_args(argv)
    least = {"epochs": 1, "batch_size": 1, "rate_epochs": 0, "limit": 1, "threads": 1}
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            parser.error(f"--{name.replace('_', '-')} must be at least {value}, got {given}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


@dataclass
class Stage:
    """Some epochs with one optimizer."""

    begin: int
    end: int
    lr: float
    weight_decay: float
    scales: bool = False  # the second stage of rate norms


def train_epoch(
    net: nn.Module,
    plain: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    args: argparse.Namespace,
    team: Team,
    stage: Stage,
    epoch: int,
) -> float:
    """One epoch of ``net`` (``plain``, or what makes it parallel); returns the mean loss."""
    torch.manual_seed(1_000_003 * args.seed + epoch)
    net.train(not stage.scales)  # the second stage leaves batch norms alone
    order, rows, columns = draw(len(images), args.seed, epoch)
    size = min(args.batch_size, len(images))
    batches = len(images) // size
    done = torch.zeros((), device=team.device)
    bar = progress_bar(f"epoch {epoch + 1}", batches if team.leads else 0)
    with bar as shown:
        for i in range(batches):
            progress = (epoch - stage.begin + i / batches) / (stage.end - stage.begin)
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * (1 + math.cos(math.pi * progress)) / 2
            part = order[i * size : (i + 1) * size][team.rank :: team.size]
            x, y = images.batch(part, rows[part], columns[part])
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(team.device.type, torch.bfloat16, args.precision == "bf16"):
                if stage.scales:
                    with record_rates(plain) as rates:
                        loss = F.cross_entropy(net(x), y)
                    loss = loss + args.rate_weight * rate_inference_loss(rates)
                else:
                    loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            done += loss.detach()
            if team.leads:
                shown.update(1)
    (total,) = team.total(float(done))
    return total / batches / team.size


@torch.no_grad()
def evaluate(net: nn.Module, images: Images, args: argparse.Namespace, team: Team) -> float:
    """Accuracy in per cent."""
    net.eval()
    right = 0
    for part in torch.arange(len(images))[team.rank :: team.size].split(500):
        x, y = images.batch(part)
        with torch.autocast(team.device.type, torch.bfloat16, args.precision == "bf16"):
            right += int((net(x).argmax(1) == y).sum())
    (total,) = team.total(right)
    return 100 * total / len(images)


def build(args: argparse.Namespace, team: Team) -> nn.Module:
    """The network at its start, the same in every process."""
    torch.manual_seed(args.seed)
    net = models.ARCHITECTURES[args.network](
        activation=lambda: ACTIVATIONS[args.activation](args), **_pool(args)
    )
    if args.init is not None:
        start_from(net, args.init, args.network, learned=args.ceiling is None)
    return net.to(team.device, memory_format=torch.channels_last)


def start_from(net: nn.Module, path: str, network: str, learned: bool = True) -> None:
    """Copy the weights of a checkpoint; of the activations only what both networks have.

    ``learned=False`` leaves the activations as they are.
    """
    found = models.load_checkpoint(path, activations=STORED)
    if found.architecture != network:
        raise ValueError(f"--init {path} is a {found.architecture}, not a {network}")
    of_activations = {
        f"{name}.{key}"
        for model in (net, found.model)
        for name, module in model.named_modules()
        if not list(module.children()) and not isinstance(module, WEIGHTED)
        for key in module.state_dict()
    }
    state = {
        key: value
        for key, value in found.model.state_dict().items()
        if learned or key not in of_activations
    }
    absent, more = net.load_state_dict(state, strict=False)
    if wrong := sorted({*absent, *more} - of_activations):
        raise ValueError(f"--init {path} has not the weights of this {network}: {wrong[:8]}")


def _pool(args: argparse.Namespace) -> dict[str, str]:
    return {"pool": args.pool} if args.network.startswith("vgg") else {}


def train(args: argparse.Namespace, team: Team) -> float | None:
    """Train, writing as it goes; the accuracy of what was kept, or None if time ran out."""
    started = time.monotonic()
    torch.backends.cudnn.benchmark = True
    train_set = data.load_cifar10(args.data, train=True, limit=args.limit)
    images = Images(train_set, team.device)
    test = Images(data.load_cifar10(args.data, train=False, limit=args.limit), team.device)
    if min(args.batch_size, len(images)) % team.size:
        raise ValueError(f"--batch-size {args.batch_size} is no multiple of {team.size} processes")
    net = build(args, team)

    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    settings |= {"device": team.device.type, "processes": team.size, "set": train_set.name}
    state_path = args.out.with_name(args.out.name + ".state")
    state = None if args.fresh else load_state(state_path, settings)
    history: list[list[float]] = state["history"] if state else []
    stages = [Stage(0, args.epochs, args.lr, args.weight_decay)]
    if args.activation == "ratenorm" and args.rate_epochs:
        stages.append(Stage(args.epochs, args.epochs + args.rate_epochs, args.lr, 0.0, True))
    if state and team.leads:
        print(f"going on from {state_path}: {len(history)} of {stages[-1].end} epochs are done")

    for stage in stages:
        trained = lock_rates(net, shared=True) if stage.scales else list(net.parameters())
        optimizer = torch.optim.SGD(
            [p for p in trained if p.requires_grad],
            stage.lr,
            momentum=0.9,
            weight_decay=stage.weight_decay,
        )
        if state and len(history) > stage.begin:
            net.load_state_dict(state["model"])
            if len(history) <= stage.end:
                optimizer.load_state_dict(state["optimizer"])
        parallel = nn.parallel.DistributedDataParallel(net) if team.size > 1 else net
        for epoch in range(max(stage.begin, len(history)), stage.end):
            late = args.minutes is not None and time.monotonic() - started > 60 * args.minutes
            if any(team.total(late)):  # all of them stop, or none
                return None
            clock = time.monotonic()
            loss = train_epoch(parallel, net, optimizer, images, args, team, stage, epoch)
            accuracy = evaluate(net, test, args, team)
            history.append([loss, accuracy])
            if not team.leads:
                continue
            print(
                f"epoch {epoch + 1}/{stages[-1].end}: loss {loss:.4f}, test accuracy "
                f"{accuracy:.2f} %, {time.monotonic() - clock:.1f} s",
                flush=True,
            )
            if kept(history, args)[0] == epoch:
                about = name_activation(ACTIVATIONS[args.activation](args)) | _pool(args)
                about |= {"accuracy": f"{accuracy:.2f}", "epochs": epoch + 1, "seed": args.seed}
                about |= {"set": train_set.name}
                write(
                    args.out, lambda p, a=about: models.save_checkpoint(net, p, args.network, **a)
                )
            state = {"settings": settings, "history": history}
            state |= {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
            write(state_path, lambda p, s=state: torch.save(s, p))
    return kept(history, args)[1]


def kept(history: list[list[float]], args: argparse.Namespace) -> tuple[int, float]:
    """The epoch whose weights are in ``--out``, and its accuracy.

    The last of the first stage, or the last of the second that costs no more than is allowed.
    """
    found = args.epochs - 1
    for epoch in range(args.epochs, len(history)):
        if history[epoch][1] >= history[args.epochs - 1][1] - args.rate_tolerance:
            found = epoch
    return found, history[min(found, len(history) - 1)][1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 when done, 1 for an error told on stderr, 130 when interrupted."""
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        team = Team.gather(args.device)
        kept = train(args, team)
        if team.leads and kept is not None:
            print(f"{args.out}: test accuracy {kept:.2f} %")
        if team.leads and kept is None:
            print("time is up: the same command goes on")
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    finally:
        Team.part()
    return 0


if __name__ == "__main__":
    sys.exit(main())
