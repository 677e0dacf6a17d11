"""csrc/launch.cu itself: launches, streams, devices, errors, and which kernel it chooses."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import PURE, HostShim, assert_same_bits, currents, dyadic, spy

from snnkernels.functional import if_count, if_multi_step, if_packed, if_rate, if_run
from snnkernels.kernels import backends, layouts, nvrtc, params, plan
from snnkernels.options import Probe

pytestmark = pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: nothing is compiled")


@pytest.fixture
def shim(host_shim: HostShim, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostShim]:
    """The back end in force, its log empty, wide threads wherever they fit."""
    monkeypatch.setattr(plan, "FULL", 0)
    monkeypatch.setitem(backends._MAKERS, "host_shim", host_shim.kernels)
    monkeypatch.setitem(backends._made, "host_shim", host_shim.kernels())
    host_shim.take_log()
    with backends.use_backend("host_shim"):
        yield host_shim


def launches(shim: HostShim) -> list[str]:
    return [line for line in shim.take_log() if line.startswith("launch")]


def test_one_launch_a_call(shim: HostShim) -> None:
    x = currents(17, 1000).requires_grad_()
    with torch.no_grad():
        for call in (
            lambda: if_multi_step(x),
            lambda: if_multi_step(x, v_reset=0.0, store_v_seq=True),
            lambda: if_count(x),
            lambda: if_multi_step(x[0], T=100),
            lambda: if_packed(x),
            lambda: if_run(x, outputs=("spikes", "packed", "count"), count_at=(3, 5)),
            lambda: if_run(x, probe=Probe(3, "shift", iterations=2)),
        ):
            call()
            assert len(launches(shim)) == 1
    spikes = if_multi_step(x)[0]
    assert len(launches(shim)) == 1
    spikes.sum().backward()
    assert len(launches(shim)) == 1


@pytest.mark.parametrize(
    ("size", "blocks"), [(1, 1), (255, 1), (256, 1), (257, 2), (1024, 1), (1028, 2), (4096, 4)]
)
def test_blocks_cover_the_neurons_once(shim: HostShim, size: int, blocks: int) -> None:
    # A multiple of 4 float32 that is 16-byte aligned goes 4 to a thread.
    x = torch.zeros(2, size)
    assert x.data_ptr() % 16 == 0
    if_multi_step(x)
    (line,) = launches(shim)
    assert line.startswith(f"launch {blocks} blocks of 256 ")


def test_nothing_is_launched_without_neurons(shim: HostShim) -> None:
    record = np.zeros((), params.IF_FORWARD)
    record["spike_bytes"], record["vec"] = 4, 1
    for name in ("threshold", "amplitude", "v_init"):
        record[name]["inner"] = record[name]["count"] = 1
    shim.module.if_forward(record.tobytes(), 0, 0)
    assert shim.take_log() == []


@pytest.fixture
def cuda(host_shim: HostShim, monkeypatch: pytest.MonkeyPatch) -> backends.Kernels:
    """The back end "cuda" as it is, with the shim in place of the compiled extension."""
    monkeypatch.setattr(backends, "extension", lambda name: host_shim.module)
    monkeypatch.setattr(backends, "_need_device", lambda: None)
    monkeypatch.setattr(backends, "_stream", lambda device: 4711 + device.index)
    # torch's own guard comes first; here it changes nothing, so that the C++ guard shows.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: host_shim.device)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return backends._cuda()


def packed(monkeypatch: pytest.MonkeyPatch, call: Any, gpu: bool = True) -> list[tuple[str, bytes]]:
    """What a call hands to its kernels."""
    seen: list[tuple[str, bytes]] = []
    watcher = spy("spy", lambda kernel, p, device: seen.append((kernel, p)), gpu)
    monkeypatch.setitem(backends._MAKERS, "spy", lambda: watcher)
    monkeypatch.setitem(backends._made, "spy", watcher)
    with backends.use_backend("spy"):
        call()
    return seen


def test_stream_and_device_are_the_tensors(
    host_shim: HostShim, cuda: backends.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = currents(5, 8).requires_grad_()
    kept: list[Any] = []

    def call() -> None:
        spikes, v, _ = if_multi_step(x)
        kept.extend([spikes, v, *torch.autograd.grad(spikes.sum(), x)])

    (_, forward), _ = packed(monkeypatch, call)
    host_shim.take_log()
    for index in (0, 1, 3):
        cuda.forward(forward, torch.device("cuda", index))
        log = host_shim.take_log()
        # The device is made current for the launch and what was current before comes back.
        switch = [] if index == 0 else [f"device {index}"]
        back = [] if index == 0 else ["device 0"]
        assert [re.sub(" kernel .*", "", line) for line in log] == [
            *switch,
            f"launch 1 blocks of 256 on device {index} stream {4711 + index}",
            *back,
        ]
        assert host_shim.device == 0


def test_errors_come_with_their_text(
    host_shim: HostShim, cuda: backends.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[Any] = []
    x = currents(5, 8)
    ((_, forward),) = packed(monkeypatch, lambda: outputs.append(if_multi_step(x)))
    with pytest.raises(RuntimeError, match="if_forward: invalid device ordinal"):
        cuda.forward(forward, torch.device("cuda", 7))
    assert host_shim.device == 0
    host_shim.fail("cudaGetLastError", 719)
    try:
        with pytest.raises(RuntimeError, match="if_forward: unspecified launch failure"):
            cuda.forward(forward, torch.device("cuda", 2))
        # Also after a failure the device is the one from before.
        assert host_shim.device == 0
    finally:
        host_shim.fail("cudaGetLastError", 0)
    host_shim.fail("cudaGetDevice", 719)
    try:
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            cuda.forward(forward, torch.device("cuda", 0))
    finally:
        host_shim.fail("cudaGetDevice", 0)


def test_parameters_outside_the_closed_list(host_shim: HostShim) -> None:
    for field, value in (("vec", 3), ("spike_bytes", 3), ("dtype", 9)):
        record = np.zeros((), params.IF_FORWARD)
        record["spikes"], record["spike_bytes"], record["vec"], record["N"] = 64, 4, 1, 8
        record[field] = value
        with pytest.raises(RuntimeError, match="if_forward: no kernel was compiled for these"):
            host_shim.module.if_forward(record.tobytes(), 0, 0)
    general = np.zeros((), params.IF_GENERAL)
    general["base"]["N"], general["options"] = 8, params.SMOOTH
    with pytest.raises(RuntimeError, match="if_general: no kernel was compiled for these"):
        host_shim.module.if_general(general.tobytes(), 0, 0)
    for field, value in (("dtype", 9), ("x", 0)):
        backward = np.zeros((), params.IF_BACKWARD_GENERAL)
        backward["base"]["N"], backward["base"]["T"], backward["base"]["x"] = 8, 1, 64
        backward["base"][field] = value
        with pytest.raises(RuntimeError, match="if_backward_general: no kernel was compiled"):
            host_shim.module.if_backward_general(backward.tobytes(), 0, 0)
    for field, value in (("vec", 3), ("surrogate", 9), ("dtype", -1)):
        record = np.zeros((), params.IF_BACKWARD)
        record["vec"], record["N"], record["T"] = 1, 8, 1
        record[field] = value
        with pytest.raises(RuntimeError, match="if_backward: no kernel was compiled for these"):
            host_shim.module.if_backward(record.tobytes(), 0, 0)


def test_structs_of_another_size_are_refused(host_shim: HostShim) -> None:
    with pytest.raises(ValueError, match=r"params: 5 bytes, expected \d+"):
        host_shim.module.if_forward(b"12345", 0, 0)
    with pytest.raises(ValueError, match=r"params: 5 bytes, expected \d+"):
        host_shim.module.if_backward(b"12345", 0, 0)
    with pytest.raises(ValueError, match=r"params: 5 bytes, expected \d+"):
        host_shim.module.if_general(b"12345", 0, 0)
    with pytest.raises(ValueError, match=r"params: 5 bytes, expected \d+"):
        host_shim.module.if_backward_general(b"12345", 0, 0)


def test_more_neurons_than_a_launch_covers(host_shim: HostShim) -> None:
    record = np.zeros((), params.IF_FORWARD)
    record["vec"], record["N"] = 1, 2**40
    with pytest.raises(RuntimeError, match="if_forward: more neurons than one launch can cover"):
        host_shim.module.if_forward(record.tobytes(), 0, 0)
    with pytest.raises(RuntimeError, match="more neurons than one launch can cover"):
        nvrtc.if_forward(record.tobytes(), torch.device("cuda", 0))


# ---- which kernel --------------------------------------------------------------------------------

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="names need binutils' nm")


@needs_nm
def test_the_two_closed_lists_agree(host_shim: HostShim) -> None:
    compiled = sorted(host_shim.kernel_names().values())
    listed = sorted(nvrtc.instances())
    assert compiled == listed
    assert len(set(listed)) == len(listed)
    assert len(nvrtc.plain_instances()) <= 150


def calls() -> Iterator[Any]:
    """Calls that between them need every kernel."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        state = torch.float64 if dtype == torch.float64 else torch.float32
        for size, steps in itertools.product((64, 33), (1, 2, 4, 8, 9, 16, 32)):
            x = dyadic(steps, size, seed=size).to(dtype)
            th = torch.ones(size, dtype=state)
            for threshold in (1.0, th):
                run = lambda row=x, t=threshold, **g: if_run(row, 0.5, t, **g)  # noqa: E731
                yield run
                yield lambda r=run: r(outputs="packed")
                yield lambda r=run: r(outputs="count")
                yield lambda r=run: r(outputs=("spikes", "count"))
                yield lambda r=run: r(outputs=("spikes", "packed"))
                yield lambda r=run: r(spike_dtype=torch.uint8)
                yield lambda r=run, a=th: r(amplitude=a)
                yield lambda r=run, row=x[0]: r(row=row, T=3)
                if steps == 9:
                    yield lambda r=run: r(v_reset=0.0)
                    yield lambda r=run: r(outputs="v_seq")
        for size in (64, 33):
            x = dyadic(9, size, seed=size).to(dtype).requires_grad_()
            learned = torch.ones(size, dtype=state, requires_grad=True)

            def grads(x: Any = x, th: Any = 1.0, **given: Any) -> Any:
                leaves = [t for t in (x, th) if isinstance(t, torch.Tensor)]
                return torch.autograd.grad(if_multi_step(x, 0.5, th, **given)[0].sum(), leaves)

            for kind in ("atan", "sigmoid", "triangle", "rectangle"):
                for detach in (False, True):
                    yield lambda g=grads, k=kind, d=detach: g(surrogate_function=k, detach_reset=d)
                    yield lambda x=x, k=kind: torch.autograd.grad(
                        if_rate(x, surrogate_function=k)[0].sum(), x
                    )
            for th in (1.0, learned):
                yield lambda g=grads, t=th: g(th=t, save="bits", surrogate_function="rectangle")
                yield lambda g=grads, t=th: g(th=t, save="trace")
                yield lambda g=grads, t=th: g(th=t)
                yield lambda g=grads, t=th: g(th=t, tie=">")
            yield lambda x=x: torch.autograd.grad(if_multi_step(x[0], T=3)[0].sum(), x)


@needs_nm
@pytest.mark.parametrize("full", [0, plan.FULL])
def test_python_and_cpp_choose_the_same_kernel(
    shim: HostShim, monkeypatch: pytest.MonkeyPatch, full: int
) -> None:
    """Every call, once through launch.cu with its log and once as for NVRTC."""
    names = shim.kernel_names()
    chosen: list[str] = []

    def launched_by_python(name: str, record: Any, N: int, vec: int, device: Any) -> None:
        chosen.append(f"{name} {-(-N // (vec * nvrtc.THREADS))} blocks")

    monkeypatch.setattr(nvrtc, "_launch", launched_by_python)
    monkeypatch.setattr(plan, "FULL", full)
    real = shim.kernels()

    def both(kernel: str, packed: bytes, device: torch.device) -> None:
        getattr(nvrtc, f"if_{kernel}")(packed, device)
        getattr(real, kernel)(packed, device)

    pair = spy("both", both, True)
    monkeypatch.setitem(backends._made, "both", pair)
    monkeypatch.setitem(backends._MAKERS, "both", lambda: pair)
    with backends.use_backend("both"):
        for call in calls():
            call()
    launched = []
    for line in launches(shim):
        words = line.split()
        launched.append(f"{names[int(words[-1])]} {words[1]} blocks")
    assert launched == chosen
    reached = {name.rsplit(" ", 2)[0] for name in launched}
    # And nothing on the list is out of reach, but for the smooth twin that only tests ask for, and
    # wide threads where neurons are few.
    never = set(nvrtc.instances()) - reached
    wide = re.compile(r"if_forward(_steps)?<\S+ \d, [248], |if_backward(_bits)?<.*, [24]>")
    twin = re.compile(r"general<double, true>")
    unexpected = [n for n in never if not twin.search(n) and not (full and wide.search(n))]
    assert not unexpected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_few_neurons_have_the_same_bits(shim: HostShim, monkeypatch: pytest.MonkeyPatch,
                                        dtype: torch.dtype) -> None:  # fmt: skip
    """Threads of one neuron, as a device gets them below FULL blocks."""
    monkeypatch.setattr(plan, "FULL", 1 << 40)
    for steps in (1, 2, 4, 7, 8, 16, 31, 32, 33, 64, 65):
        x = currents(steps, 3, 64, seed=steps, dtype=dtype)
        for outputs in ("spikes", "packed", ("spikes", "count"), ("count", "packed")):
            got = if_run(x, "half", 0.75, outputs=outputs, amplitude=0.3)
            with backends.use_backend("reference"):
                want = if_run(x, "half", 0.75, outputs=outputs, amplitude=0.3)
            for a, b in zip(got, want, strict=True):
                if isinstance(b, torch.Tensor):
                    assert_same_bits(a, b)
                else:
                    assert a == b


def test_the_plan_is_wide_where_it_fits() -> None:
    big = 264 * 256 * 4

    def vec(x: torch.Tensor) -> int:
        layout = layouts.of(x, False)
        assert layout is not None
        return plan.forward(x, layout, x.shape[1:].numel(), x)

    assert vec(torch.empty(2, big)) == 4
    assert vec(torch.empty(2, big - 4)) == 1
    assert vec(torch.empty(2, big + 2)) == 1
    assert vec(torch.empty(2, 2 * big, dtype=torch.bfloat16)) == 8
    assert vec(torch.empty(2, big, dtype=torch.bfloat16)) == 1
    assert vec(torch.empty(2, big, dtype=torch.float64)) == 2
    # Rows that are not aligned, or end inside a group.
    assert vec(torch.empty(2 * big + 1)[1:].view(2, big)) == 1
    assert vec(torch.empty(4, 2, big // 4 + 4)[..., : big // 4].transpose(0, 1)) == 4
    assert vec(torch.empty(4, 2, big // 4 + 3)[..., : big // 4].transpose(0, 1)) == 1


def test_nvrtc_launch_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid, arguments, stream and device that the run-time compiled kernels are launched with."""
    seen: list[Any] = []

    def function(grid: Any, block: Any, arguments: Any, *, stream: Any) -> None:
        seen.append((grid, block, arguments[0].tobytes(), stream))

    entered: list[torch.device] = []
    monkeypatch.setattr(nvrtc, "_function", lambda name, device: function)
    monkeypatch.setattr(nvrtc, "_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(
        torch.cuda, "device", lambda d: entered.append(d) or contextlib.nullcontext()
    )
    x = currents(9, 1028).requires_grad_()

    def call() -> None:
        torch.autograd.grad(if_multi_step(x)[0].sum(), x)

    (_, forward), (_, backward) = packed(monkeypatch, call)
    device = torch.device("cuda", 2)
    nvrtc.if_forward(forward, device)
    nvrtc.if_backward(backward, device)
    assert entered == [device, device]
    monkeypatch.setattr(plan, "FULL", 0)
    assert seen == [
        ((blocks, 1, 1), (256, 1, 1), p, "stream of cuda:2")
        for blocks, p in ((5, forward), (5, backward))
    ]
