"""csrc/launch.cu itself: launches, streams, devices, errors, and which kernel it chooses."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import PURE, HostShim, currents, dyadic

from snnkernels.functional import if_count, if_multi_step, if_rate
from snnkernels.kernels import backends, nvrtc, params

pytestmark = pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: nothing is compiled")


@pytest.fixture
def shim(host_shim: HostShim, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostShim]:
    """The back end in force, its log empty."""
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
    for name in ("threshold", "amplitude", "v_init", "input_scale"):
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
    spy = backends.Kernels(
        "spy",
        "cpu",
        gpu,
        lambda p, device: seen.append(("forward", p)),
        lambda p, device: seen.append(("backward", p)),
    )
    monkeypatch.setitem(backends._MAKERS, "spy", lambda: spy)
    monkeypatch.setitem(backends._made, "spy", spy)
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
    for field, value in (("vec", 3), ("spike_bytes", 3), ("dtype", 9), ("options", params.SMOOTH)):
        record = np.zeros((), params.IF_FORWARD)
        record["spike_bytes"], record["vec"], record["N"] = 4, 1, 8
        record[field] = value
        with pytest.raises(RuntimeError, match="if_forward: no kernel was compiled for these"):
            host_shim.module.if_forward(record.tobytes(), 0, 0)
    for field, value in (("vec", 3), ("surrogate", 9), ("dtype", -1)):
        record = np.zeros((), params.IF_BACKWARD)
        record["vec"], record["N"], record["T"], record["x_stride"] = 1, 8, 1, 8
        record[field] = value
        with pytest.raises(RuntimeError, match="if_backward: no kernel was compiled for these"):
            host_shim.module.if_backward(record.tobytes(), 0, 0)


def test_structs_of_another_size_are_refused(host_shim: HostShim) -> None:
    with pytest.raises(ValueError, match=r"params: 5 bytes, expected \d+"):
        host_shim.module.if_forward(b"12345", 0, 0)
    with pytest.raises(ValueError, match=r"params: 5 bytes, expected \d+"):
        host_shim.module.if_backward(b"12345", 0, 0)


# ---- which kernel --------------------------------------------------------------------------------

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="names need binutils' nm")


@needs_nm
def test_the_two_closed_lists_agree(host_shim: HostShim) -> None:
    compiled = sorted(host_shim.kernel_names().values())
    listed = sorted(nvrtc.instances())
    assert compiled == listed
    assert len(set(listed)) == len(listed) <= 150


def calls() -> Iterator[Any]:
    """Calls that between them need every kernel."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for size in (64, 33):
            x = dyadic(9, size, seed=size).to(dtype).requires_grad_()
            th = torch.ones(size, dtype=torch.float64 if dtype == torch.float64 else None)
            for threshold in (1.0, th):
                for given in ({}, {"T": 3}, {"spike_dtype": torch.uint8}, {"v_reset": 0.0},
                              {"tie": ">"}, {"input_scale": 2.0}, {"store_v_seq": True},
                              {"store_charge_seq": True}, {"amplitude": th},
                              {"T": 3, "spike_dtype": torch.uint8}):  # fmt: skip
                    row = x[0] if "T" in given else x
                    yield lambda r=row, t=threshold, g=given: if_multi_step(r.detach(), 0.5, t, **g)
                    if "spike_dtype" not in given:
                        yield lambda r=row, t=threshold, g=given: torch.autograd.grad(
                            if_multi_step(r, 0.5, t, **g)[0].sum(), r
                        )
            yield lambda x=x: if_count(x.detach())
            for kind in ("atan", "sigmoid", "triangle", "rectangle"):
                for detach in (False, True):
                    yield lambda x=x, k=kind, d=detach: torch.autograd.grad(
                        if_rate(x, surrogate_function=k, detach_reset=d)[0].sum(), x
                    )
            learned = th.clone().requires_grad_()
            yield lambda x=x, th=learned: torch.autograd.grad(
                if_multi_step(x.detach(), 0.5, th)[0].sum(), th
            )


@needs_nm
def test_python_and_cpp_choose_the_same_kernel(
    shim: HostShim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call, once through launch.cu with its log and once by name as for NVRTC."""
    names = shim.kernel_names()
    chosen: list[str] = []

    def choose(kind: str, p: bytes) -> None:
        dtype = params.IF_FORWARD if kind == "forward" else params.IF_BACKWARD
        pick = nvrtc.forward_name if kind == "forward" else nvrtc.backward_name
        chosen.append(pick(np.frombuffer(p, dtype)[0]))

    real = shim.kernels()
    both = backends.Kernels(
        "both",
        "cpu",
        True,
        lambda p, device: (choose("forward", p), real.forward(p, device)),
        lambda p, device: (choose("backward", p), real.backward(p, device)),
    )
    monkeypatch.setitem(backends._made, "both", both)
    monkeypatch.setitem(backends._MAKERS, "both", lambda: both)
    with backends.use_backend("both"):
        for call in calls():
            call()
    launched = [names[int(line.rsplit(" ", 1)[1])] for line in launches(shim)]
    assert launched == chosen
    # And nothing on the list is out of reach, but for the smooth twin that only tests ask for.
    never = set(nvrtc.instances()) - set(launched)
    assert all("true>" in name and "general" in name for name in never), sorted(never)


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
    want = ((2, 1, 1), (256, 1, 1))
    assert seen == [(*want, p, "stream of cuda:2") for p in (forward, backward)]
