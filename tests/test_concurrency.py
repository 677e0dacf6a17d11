"""Many threads, many processes, forks and too few cores: the same bits, and nothing waits for ever.

What would hang is run in a process of its own, or joined, with minutes to spare: no time is
measured here.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import PURE, assert_same_bits, extension, in_a_process
from torch import Tensor, nn

import snnkernels
from snnkernels import IFNode, functional
from snnkernels.conversion import ConvertedNetwork, convert
from snnkernels.kernels import backends

HANG = 300  # seconds, on whatever machine
LARGE = (8, 70_001)  # above the 256 K neuron-steps at which OpenMP's threads join in
# Without the extension nothing ends OpenMP's threads: children of torch alone wait for ever.
forks = pytest.mark.skipif(
    PURE or not hasattr(os, "fork"), reason="no fork, or no extension to prepare one"
)


def current(seed: int, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape or LARGE, generator=g) * 0.7


def together(work: Callable[[int], Any], count: int = 8) -> list[Any]:
    """``work(n)`` in that many threads, all started at once; what they returned."""
    found: list[Any] = [None] * count
    failed: list[BaseException] = []
    gate = threading.Barrier(count)

    def run(n: int) -> None:
        try:
            gate.wait(HANG)
            found[n] = work(n)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
        assert not thread.is_alive(), "a thread hangs"
    if failed:
        raise failed[0]
    return found


def process(code: str, **environment: str) -> str:
    """What Python code prints in a process of its own, with the copy under test."""
    done = in_a_process(code, "-W", "error", timeout=HANG, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


# ---- threads -------------------------------------------------------------------------------------


def neurons(seed: int) -> tuple[Tensor, ...]:
    """Forward, backward, counts, packed words and a small kernel."""
    x = current(seed).requires_grad_()
    theta = torch.full((), 1.0 + seed / 8, requires_grad=True)
    spikes, v, _ = functional.if_multi_step(x, "half", theta)
    grads = torch.autograd.grad((spikes * torch.arange(8.0)[:, None]).sum() + v.sum(), (x, theta))
    with torch.no_grad():
        count, _ = functional.if_count(x, "half", theta)
        words = functional.if_packed(x, "half", theta)[0].unpack()
        levels = functional.qcfs(x, theta, 4)
    return spikes.detach(), v.detach(), *grads, count, words, levels


def test_eight_threads_on_tensors_of_their_own(threads: None) -> None:
    torch.set_num_threads(2)
    wanted = [neurons(n) for n in range(8)]
    for n, found in enumerate(together(neurons)):
        for got, want in zip(found, wanted[n], strict=True):
            assert_same_bits(got, want, f"thread {n}")


def test_eight_threads_with_a_module_each() -> None:
    def chunks(n: int) -> tuple[Tensor, Tensor]:
        """State is carried from chunk to chunk, of different shapes before."""
        node = IFNode(v_init="half", v_threshold=1.0, step_mode="m")
        node(current(n, 4, 33))
        node.reset()
        x = current(n, 12, 1000)
        spikes = torch.cat([node(x[i : i + 4]) for i in range(0, 12, 4)])
        return spikes, node.v

    wanted = [chunks(n) for n in range(8)]
    for n, found in enumerate(together(chunks)):
        for got, want in zip(found, wanted[n], strict=True):
            assert_same_bits(got, want, f"thread {n}")


def small_network() -> nn.Module:
    torch.manual_seed(0)  # the same generator for all threads: not to be called from one
    layers = [
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 5),
    ]  # fmt: skip
    return nn.Sequential(*layers).eval()


def small_snn(net: nn.Module | None = None) -> ConvertedNetwork:
    return convert(net or small_network(), current(0, 16, 2, 6, 6), T=8, progress=False)


def test_eight_threads_convert_and_run() -> None:
    """Tracing, calibration and answers of networks made from one ANN."""
    net = small_network()

    def work(n: int) -> tuple[Tensor, ...]:
        snn, x = small_snn(net), current(n, 3, 2, 6, 6)
        with torch.no_grad():
            return snn(x), snn.predict_curve(x, [2, 8])[8]

    wanted = [work(n) for n in range(8)]
    for n, found in enumerate(together(work)):
        for got, want in zip(found, wanted[n], strict=True):
            assert_same_bits(got, want, f"thread {n}")


def test_conversions_do_not_disturb_each_other() -> None:
    """torch.fx replaces methods of nn.Module while it traces: for its own thread only."""
    torch.manual_seed(0)
    nets = [
        nn.Sequential(*(layer for _ in range(2 + n) for layer in (nn.Linear(6, 6), nn.ReLU())))
        for n in range(6)
    ]
    x = current(0, 4, 6)
    bystander = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    with torch.no_grad():
        want = bystander(x)

    def work(n: int) -> None:
        for _ in range(4):
            if n >= 6:
                with torch.no_grad():
                    for _ in range(50):
                        assert_same_bits(bystander(x), want)
            else:
                convert(nets[n].eval(), x, T=4, progress=False)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        together(work)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("shared", [False, True], ids=["a plan each", "one plan"])
def test_eight_threads_on_plans(shared: bool) -> None:
    """A plan may be shared: calls take turns."""
    snn = small_snn()
    one = snnkernels.lower(snn)
    plans = [one if shared else snnkernels.lower(small_snn()) for _ in range(8)]
    wanted = [plans[0](current(n, 3, 2, 6, 6)) for n in range(8)]

    def work(n: int) -> list[Tensor]:
        return [plans[n](current(n, 3, 2, 6, 6), T=8) for _ in range(5)]

    for n, found in enumerate(together(work)):
        for got in found:
            assert_same_bits(got, wanted[n], f"thread {n}")


def test_first_use_of_everything_from_eight_threads() -> None:
    """Lazy imports, the choice of a back end and the registration of operators."""
    code = """
import threading
import torch, snnkernels
gate, found, failed = threading.Barrier(8), [], []
def work():
    try:
        gate.wait(60)
        snn = snnkernels.convert(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(),
            torch.nn.Linear(3, 2)), threshold=1.0, progress=False)
        with torch.no_grad():
            found.append(snnkernels.lower(snn)(torch.ones(2, 4), T=4).shape)
    except BaseException as error:
        failed.append(repr(error))
all_ = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in all_]
[t.join() for t in all_]
assert not failed, failed
print(len(found))
"""
    backend = "reference" if PURE else "auto"
    assert process(code, SNNKERNELS_BACKEND=backend, OMP_NUM_THREADS="1") == "8"


def test_the_number_of_threads_changes_between_and_during_calls(threads: None) -> None:
    wanted = [neurons(n) for n in range(4)]

    def work(n: int) -> list[tuple[Tensor, ...]]:
        found = []
        for count in (1, 3, 2, 5):
            torch.set_num_threads((count + n) % 5 + 1)
            found.append(neurons(n))
        return found

    for n, runs in enumerate(together(work, 4)):
        for run in runs:
            for got, want in zip(run, wanted[n], strict=True):
                assert_same_bits(got, want, f"thread {n}")


def test_far_more_threads_than_cores() -> None:
    """Every caller has a team of its own: 4 times as many threads as a large machine has cores."""
    count = 4 * min(os.cpu_count() or 1, 8)
    code = f"""
import threading, torch
from snnkernels import functional
torch.set_num_threads({count})
x = [torch.rand(8, 40_000 + n) for n in range(4)]
want = [functional.if_count(t)[0] for t in x]
bad = []
def work(n):
    torch.set_num_threads({count})
    for _ in range(3):
        if not torch.equal(functional.if_count(x[n])[0], want[n]):
            bad.append(n)
all_ = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in all_]
[t.join() for t in all_]
print(bad)
"""
    backend = "reference" if PURE else "cpu"
    assert process(code, SNNKERNELS_BACKEND=backend) == "[]"


# ---- processes -----------------------------------------------------------------------------------

# What a child must give again: kernels with and without OpenMP, torch's own layers, a plan.
FORK = """
import hashlib, os, signal, sys, threading, torch, snnkernels, warnings
from snnkernels import functional
# Python 3.12 warns where a process with threads forks: what this is about.
warnings.filterwarnings("ignore", category=DeprecationWarning)
torch.manual_seed(0)
torch.set_num_threads(2)
x, a = torch.rand(8, 70_001), torch.rand(600, 600)
net = torch.nn.Sequential(torch.nn.Conv2d(2, 70, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                          torch.nn.Linear(70 * 16 * 16, 5))
image = torch.rand(4, 2, 18, 18)
plan = snnkernels.lower(snnkernels.convert(net, image, T=4, progress=False))
def everything():
    with torch.no_grad():
        parts = [functional.if_count(x)[0], functional.qcfs(x, 1.0, 4), plan(image), a.exp() * 2]
    y = x.clone().requires_grad_()
    parts.append(torch.autograd.grad(functional.if_multi_step(y)[0].sum(), y)[0])
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()
def child(work):
    pid = os.fork()
    if not pid:
        signal.alarm(120)  # a child that waits for threads it has not is killed
        try:
            os._exit(0 if work() else 3)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(4)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, (work, status)
"""


@forks
def test_fork_after_use() -> None:
    code = """
want = everything()
child(lambda: everything() == want)  # after our kernels, torch's and a plan
assert everything() == want          # the parent goes on
child(lambda: everything() == want)
def grandchild():
    child(lambda: everything() == want)
    return everything() == want
child(grandchild)
print("same")
"""
    assert process(FORK + code) == "same"


@forks
def test_fork_before_our_first_use_and_after_torchs() -> None:
    """The extension is loaded at the fork, so that a child's first kernel finds no lost threads."""
    code = """
from snnkernels import functional
torch.set_num_threads(2)
x = torch.rand(600, 600)
x.exp()
assert "snnkernels._cpu" not in sys.modules
def count():
    return functional.if_count(torch.ones(8, 70_001))[0].eq(8).all()
child(count)
print("done")
"""
    start = FORK[: FORK.index("torch.manual_seed")]
    helper = FORK[FORK.index("def child") :]
    assert process(start + helper + code) == "done"


@forks
def test_fork_while_other_threads_compute() -> None:
    code = """
want, stop = everything(), threading.Event()
def busy():
    y = torch.rand(8, 70_001)
    while not stop.is_set():
        functional.if_count(y)
others = [threading.Thread(target=busy) for _ in range(2)]
[t.start() for t in others]
try:
    for _ in range(3):
        child(lambda: everything() == want)
    inside = threading.Thread(target=child, args=(lambda: everything() == want,))
    inside.start()
    inside.join()
finally:
    stop.set()
    [t.join() for t in others]
print("same")
"""
    assert process(FORK + code) == "same"


@forks
def test_fork_inside_a_parallel_region() -> None:
    """OpenMP's threads cannot be ended there; the child's kernels do without them."""
    code = """
import ctypes, re
from snnkernels.kernels import backends
maps = re.findall(r"\\S*/libgomp[^/\\s]*", open("/proc/self/maps").read())
if not maps:
    raise SystemExit(print("no libgomp"))
gomp = ctypes.CDLL(maps[0])
want = functional.if_count(x)[0]
threads = backends.extension("_cpu").threads
found = []
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def region(_):
    if gomp.omp_get_thread_num() == 0:
        try:
            child(lambda: threads() == 1 and torch.equal(functional.if_count(x)[0], want))
            found.append("same")
        except BaseException as error:
            found.append(repr(error))
gomp.GOMP_parallel(region, None, 2, 0)
assert threads() == 2  # of the parent
print(*found)
"""
    said = process(FORK + code)
    if said == "no libgomp":
        pytest.skip("torch's OpenMP is not GNU's here")
    assert said == "same"


class Counted(torch.utils.data.Dataset):
    """Examples that are computed by our kernels, in a worker."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, n: int) -> Tensor:
        return neurons(n)[4]


# Where this process may use one core, torch advises against two workers.
MORE_THAN_CORES = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create 2 worker processes:UserWarning"
)


@forks
@MORE_THAN_CORES
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: fork beside threads
def test_workers_of_a_data_loader(threads: None) -> None:
    torch.set_num_threads(2)
    data = Counted()
    wanted = [data[n] for n in range(len(data))]  # OpenMP's threads are there before the fork
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=HANG
    )
    found = list(loader)
    assert len(found) == len(wanted)
    for n, got in enumerate(found):
        assert_same_bits(got, wanted[n], f"example {n}")


@forks
@MORE_THAN_CORES
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_calibration_from_a_loader_with_workers() -> None:
    x = current(0, 16, 2, 6, 6)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x),
        batch_size=4,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=HANG,
    )
    net = small_network()
    got = convert(net, loader, T=8, progress=False)
    want = convert(net, list(x.split(4)), T=8, progress=False)
    with torch.no_grad():
        assert_same_bits(got(x), want(x), "answers")


@pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: no CPU extension")
def test_what_a_fork_needs_is_asked_of_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    module = extension("_cpu")
    assert module is not None
    torch.rand(8).sum()
    module.before_fork()
    assert functional.if_count(current(0))[0].shape == LARGE[1:]
    module.after_fork_in_child()  # nothing was lost: threads stay
    assert module.threads() == torch.get_num_threads()

    def missing(name: str) -> Any:
        raise backends.Missing("not there", "")

    monkeypatch.setattr(backends, "extension", missing)
    backends._at_fork("before_fork")  # the pure package has nothing to do


# ---- devices and streams, without a device -------------------------------------------------------


def test_threads_launch_on_their_own_device_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device and stream are those of the caller's thread, and the device before is back after."""
    local = threading.local()
    log: list[tuple[int, int, int, int]] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, local.device = local.device, wanted.index
        try:
            yield
        finally:
            local.device = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: local.device)
    monkeypatch.setattr(backends, "_stream", lambda d: 100 * local.name + d.index)

    def launch(packed: bytes, index: int, stream: int) -> None:
        log.append((local.name, local.device, index, stream))
        if packed == b"fails":
            raise RuntimeError("launch failed")

    run = backends.on_device(launch)

    def work(n: int) -> None:
        local.name, local.device = n + 1, n % 4
        for i in range(20):
            wanted = torch.device("cuda", (n + i) % 4)
            if i % 5 == 4:
                with pytest.raises(RuntimeError, match="launch failed"):
                    run(b"fails", wanted)
            else:
                run(b"", wanted)
            assert local.device == n % 4

    together(work)
    assert len(log) == 160
    for name, current_, index, stream in log:
        assert current_ == index
        assert stream == 100 * name + index
