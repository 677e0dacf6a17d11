"""What test_distributed.py has its processes do: ``python distributed_jobs.py FOLDER JOB...``.

A job gets the process group (None alone) and the folder; what it returns goes to ``JOB.RANK``.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import snnkernels
from snnkernels import IFNode, functional, sweep
from snnkernels.conversion import QCFS, convert, convert_modules
from snnkernels.conversion.methods import LTB, Advanced
from snnkernels.distributed import Split, evaluate, passes, shardable
from snnkernels.distributed.team import launched

# CPython before 3.12 can hang when it forks while another thread starts or ends
# (python/cpython#112275), as those of a process group and of earlier loaders do.
FORK_MAY_HANG = sys.version_info < (3, 12)
WORKERS = {"num_workers": 1, "multiprocessing_context": "spawn" if FORK_MAY_HANG else "fork"}

IMAGES, SIZE = 86, 8
STEPS = [1, 4]


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    x = torch.rand(IMAGES, 1, 6, 6, generator=g)
    return x * torch.rand(IMAGES, 1, 1, 1, generator=g) * 9, torch.arange(IMAGES) % 5


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    return list(zip(x.split(SIZE), y.split(SIZE), strict=True))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(45, 12), nn.ReLU(), nn.Linear(12, 5),
    ).eval()  # fmt: skip


def bits(snn: Any) -> dict[str, Any]:
    """All there is to a converted network."""
    return {**snn.state_dict(), "report": str(snn.report)}


METHODS: dict[str, dict[str, Any]] = {
    "mmse": {},
    "mmse per layer": {"per_channel": False, "normalize": "weights"},
    "max": {"threshold": "max"},
    "percentile": {"threshold": "99%"},
    "kl": {"threshold": "kl"},
    "ltb": {"method": LTB(updates=17)},
    "ltb and others": {"threshold": {"2": "ltb", "6": "max"}},
    "mse start": {"v_init": "mse"},
    "drawn start": {"v_init": "uniform"},
    "light": {"method": "light"},
    "advanced": {"method": Advanced(iterations=3, images=40)},
    "datta": {"method": "datta"},
    "given": {"threshold": 2.0},
}


def methods(group: Any, folder: Path, names: Iterable[str] = METHODS) -> dict[str, Any]:
    return {
        name: bits(
            convert(net(), batches(), T=4, process_group=group, progress=False, **METHODS[name])
        )
        for name in names
    }


def some_methods(group: Any, folder: Path) -> dict[str, Any]:
    return methods(group, folder, ("mmse", "kl", "light", "datta"))


class Stream(IterableDataset):
    """Batches that come one after the other."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches()


def loaders(group: Any, folder: Path) -> dict[str, Any]:
    """The same data in every kind of loader."""
    x, y = data()
    both = TensorDataset(x, y)
    kinds: dict[str, Callable[[], Any]] = {
        "list": batches,
        "one tensor": lambda: x,
        "iterator": lambda: iter(batches()),
        "after an empty batch": lambda: [x[:0], *x.split(SIZE)],
        "indices": lambda: DataLoader(both, SIZE),
        "workers": lambda: DataLoader(both, SIZE, **WORKERS),
        "shuffled": lambda: DataLoader(both, SIZE, shuffle=True),
        "stream": lambda: DataLoader(Stream(), batch_size=None),
    }
    found: dict[str, Any] = {"few": few(group, folder)}
    for name, kind in kinds.items():
        torch.manual_seed(3)
        snn = convert(net(), kind(), method="light", T=4, process_group=group, progress=False)
        found[name] = bits(snn)
        if name not in ("one tensor", "after an empty batch"):
            torch.manual_seed(3)
            result = evaluate(snn, kind(), STEPS, process_group=group)
            found[f"{name}, counts"] = (result.correct, result.total)
    own: Any = batches()
    if group is not None:
        own = Split(own[dist.get_rank() :: dist.get_world_size()])
    snn = convert(net(), own, T=4, process_group=group, progress=False)
    result = evaluate(snn, own, STEPS, process_group=group)
    found["split"] = (bits(snn), result.correct, result.total)
    return found


def few(group: Any, folder: Path) -> dict[str, Any]:
    """Fewer batches than ranks."""
    return bits(convert(net(), [data()[0][:SIZE]], T=4, process_group=group, progress=False))


class Loop(nn.Module):
    """Calls its inner network as often as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


def other_calls(group: Any, folder: Path) -> dict[str, Any]:
    snn = convert_modules(
        Loop().eval(), ["inner"], batches(), T=4, process_group=group, progress=False
    )
    ann = evaluate(net(), batches(), process_group=group)
    rows = sweep.sweep(
        net(), Digits(), [b for b, _ in batches()], TRIALS, STEPS, network="net", data="digits",
        batch_size=5, process_group=group, store=folder / f"{_size(group)}.csv",
    )  # fmt: skip
    return {
        "modules": {**snn.state_dict(), "report": str(snn.report)},
        "ann": (ann.correct, ann.total, ann.accuracy),
        "rows": [{**row, "commit": ""} for row in rows],  # somebody may be at work
    }


def _size(group: Any) -> int:
    return 1 if group is None else dist.get_world_size(group)


class Digits:
    """The data as a sweep takes them; rank 1 dies at a slice if it is told to."""

    def __init__(self, dies_at: int = -1) -> None:
        self.x, self.y = data()
        self.left = dies_at

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left == 0 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[index], self.y[index]


TRIALS = [sweep.parse_trial(text) for text in ("opi", "opi:threshold=max", "qcfs:threshold=kl")]


def swept(group: Any, folder: Path, dies_at: int = -1) -> list[dict[str, Any]]:
    return sweep.sweep(
        net(), Digits(dies_at), [b for b, _ in batches()], TRIALS, STEPS, network="net",
        data="digits", batch_size=5, process_group=group, store=folder / "sweep.csv",
    )  # fmt: skip


def killed_sweep(group: Any, folder: Path) -> None:
    swept(group, folder, dies_at=22)  # in the second trial: 9 slices of the ANN, 9 of each trial


def _dying(at: int) -> Iterator[Tensor]:
    for i, (x, _) in enumerate(batches()):
        if i == at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield x


def killed_calibration(group: Any, folder: Path) -> None:
    """Batches 0 to 7 are in the file when rank 1 dies."""
    passes.EVERY, passes.SECONDS = 2, -1.0
    convert(net(), _dying(9), T=4, process_group=group, checkpoint=folder / "calibration")


def resumed_calibration(group: Any, folder: Path) -> dict[str, Any]:
    """The rest, and then nothing but the file, for another rule and T."""
    read: list[int] = []

    class Counted(list):
        def __iter__(self) -> Iterator[Any]:
            for i, item in enumerate(super().__iter__()):
                read.append(i)
                yield item

    path = folder / "calibration" if group is not None else None
    first = convert(net(), batches(), T=4, process_group=group, checkpoint=path)
    done = None if path is None else torch.load(path, weights_only=True)["done"]
    other = convert(
        net(), Counted(batches()), T=8, threshold="max", process_group=group, checkpoint=path
    )
    return {"first": bits(first), "other": bits(other), "done": done, "read": len(read)}


def errors(group: Any, folder: Path) -> dict[str, str]:
    """What is refused, and what fails on one rank only, is the same error on all."""
    rank = dist.get_rank()
    x, y = data()
    poisoned = [b.clone() for b, _ in batches()]
    poisoned[3][0] = float("nan")

    def raising() -> Iterator[Tensor]:
        for i, b in enumerate(x.split(SIZE)):
            if rank == 1 and i == 5:
                raise OSError("the disk is gone")
            yield b

    def fails_at_once() -> Iterator[Tensor]:
        if rank == 1:
            raise OSError("no such file")
        yield from x.split(SIZE)

    other = x.clone()
    other[40] += rank
    padded = DataLoader(TensorDataset(x, y), SIZE, sampler=DistributedSampler(TensorDataset(x, y)))
    unseeded = DataLoader(
        TensorDataset(x, y), SIZE, shuffle=True, generator=torch.Generator().manual_seed(rank)
    )
    ltb_of_parts = {"loader": Split([x[rank::2]]), "method": "ltb"}
    torch.manual_seed(rank)
    another = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
    calls: dict[str, Callable[[], Any]] = {
        "another network": lambda: convert(another, x, process_group=group),
        "another network's test": lambda: evaluate(another, batches(), process_group=group),
        "another T": lambda: convert(net(), x, T=4 + rank, process_group=group),
        "nan": lambda: convert(net(), poisoned, process_group=group, progress=False),
        "raising": lambda: convert(net(), raising(), process_group=group, progress=False),
        "at once": lambda: convert(net(), fails_at_once(), process_group=group, progress=False),
        "other data": lambda: convert(
            net(), list(other.split(SIZE)), process_group=group, progress=False
        ),
        "own parts": lambda: convert(
            net(), list(x[rank::2].split(SIZE)), process_group=group, progress=False
        ),
        "own labels": lambda: evaluate(
            net(), [(b, t + rank) for b, t in batches()], process_group=group
        ),
        "unseeded": lambda: convert(net(), unseeded, process_group=group, progress=False),
        "padded": lambda: evaluate(net(), padded, process_group=group),
        "empty": lambda: convert(net(), [], process_group=group),
        "ltb of parts": lambda: convert(net(), process_group=group, **ltb_of_parts),
        "no group": lambda: convert(net(), x, process_group="gloo"),
        "wrong checkpoint": lambda: convert(
            net(), x, process_group=group, checkpoint=folder / "wrong"
        ),
        "checkpoint nowhere": lambda: convert(
            net(), x, process_group=group, checkpoint=folder / "no" / "such" / "folder"
        ),
    }
    (folder / "wrong").write_bytes(b"not a checkpoint")
    found = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "no error"
    return found


# ---- training ------------------------------------------------------------------------------------


def spiking(threshold: Any) -> nn.Module:
    torch.manual_seed(1)
    channel_dim = 1 if isinstance(threshold, Tensor) else None
    node = IFNode(
        threshold, learn_threshold=True, amplitude="threshold", v_init="half", output="rate",
        channel_dim=channel_dim,
    )  # fmt: skip
    return nn.Sequential(nn.Linear(36, 16), node, nn.Linear(16, 8), QCFS(4, 1.0), nn.Linear(8, 5))


class OverTime(nn.Module):
    """The current of the first layer is held for four steps."""

    def __init__(self, threshold: Any) -> None:
        super().__init__()
        self.layers = spiking(threshold)

    def forward(self, x: Tensor) -> Tensor:
        snnkernels.reset_net(self)
        first, node, *others = self.layers
        z = node(first(x.flatten(1)).expand(4, -1, -1))
        for layer in others:
            z = layer(z)
        return z.clone()


def trained(net: nn.Module, group: Any) -> dict[str, Tensor]:
    """Two steps of SGD; each rank has its share of the batch. Parameters and last gradients."""
    x, y = data()
    rank, size = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    x, y = x[:80], y[:80]
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(x[rank::size]), y[rank::size]).backward()
        optimizer.step()

    def whole(t: Any) -> Tensor:
        return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()

    found = {}
    for name, p in net.named_parameters():
        name = name.removeprefix("module.")
        found[name], found[f"{name}.grad"] = whole(p), whole(p.grad)
    return found


def training(group: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, threshold in (("scalar", 0.5), ("per channel", torch.linspace(0.3, 1.2, 16))):
        ddp = OverTime(threshold)
        if group is not None:
            ddp = nn.parallel.DistributedDataParallel(ddp)  # type: ignore[assignment]
        found[f"ddp {name}"] = trained(ddp, group)
        right = evaluate(ddp, [(b, t) for b, t in batches()], process_group=group)
        found[f"ddp {name} right"] = right.total
        net = OverTime(threshold)
        if group is not None:
            net = _sharded(net, found, name)
        found[f"fsdp {name}"] = trained(net, group)
    return found


def _sharded(net: Any, found: dict[str, Any], name: str) -> nn.Module:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    try:
        fully_shard(OverTime(0.5), mesh=mesh)
    except ValueError as error:
        found["scalars"] = str(error)
    fully_shard(shardable(net), mesh=mesh)
    x = data()[0].flatten(1)
    ann = nn.Sequential(nn.Linear(36, 8), QCFS(4, 1.0), nn.Linear(8, 5))
    fully_shard(shardable(ann), mesh=mesh)
    for what, call in {
        "inside": lambda: net.layers[1](torch.rand(2, 3, 16)),
        "operand": lambda: functional.if_multi_step(x[None], ann[0].weight),
        "convert": lambda: convert(ann, x),
        "evaluate": lambda: evaluate(ann, [(x, x[:, 0].long())], process_group=dist.group.WORLD),
    }.items():
        try:
            call()
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"
    whole = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    OverTime(torch.ones(16) if name == "per channel" else 1.0).load_state_dict(whole)
    return net


# ---- memory --------------------------------------------------------------------------------------


def peak() -> int:
    """Bytes this process has had in memory at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def streamed(group: Any, folder: Path) -> dict[str, int]:
    """240 MB of batches of 2 MB through a calibration and an evaluation: what memory grows by."""
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(4096, 16), nn.ReLU(), nn.Linear(16, 5)).eval()

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(120):
            yield torch.full((128, 4096), i / 100), torch.full((128,), i % 5)

    snn = convert(small, iter([next(stream())]), T=4, process_group=group, progress=False)
    evaluate(snn, iter([next(stream())]), [4], process_group=group)
    before = peak()
    snn = convert(small, stream(), T=4, process_group=group, progress=False)
    found = evaluate(snn, stream(), [4], process_group=group)
    return {"growth": peak() - before, "total": found.total, "right": found.correct[4]}


def main(folder: str, *jobs: str) -> None:
    warnings.simplefilter("ignore")
    with launched() as group:
        rank = 0 if group is None else dist.get_rank()
        for job in jobs:
            torch.save(globals()[job](group, Path(folder)), Path(folder) / f"{job}.{rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
