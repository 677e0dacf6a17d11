"""csrc/launch.cu itself: launches, streams, devices, errors, which kernel it chooses; and every
kernel on the list executed against the reference."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import DTYPES, PURE, HostShim, assert_close, assert_same_bits, currents, dtype_id, spy
from torch import Tensor

from snnkernels import surrogate
from snnkernels.functional import if_count, if_multi_step, if_rate, if_run
from snnkernels.kernels import backends, layouts, nvrtc, params, plan

pytestmark = pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: nothing is compiled")


@pytest.fixture
def shim(host_shim: HostShim, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostShim]:
    """The back end in force, its log empty."""
    monkeypatch.setitem(backends._MAKERS, "host_shim", host_shim.kernels)
    monkeypatch.setitem(backends._made, "host_shim", host_shim.kernels())
    # Wide threads wherever they fit, not only where they fill a device.
    monkeypatch.setattr(plan, "FULL", 0)
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
    for name, dtype in RECORDS.items():
        record = np.zeros((), dtype)
        base = record if name in ("if_forward", "if_backward") else record["base"]
        base["vec"], base["x"] = 1, 8
        getattr(shim.module, name)(record.tobytes(), 0, 0)
    assert shim.take_log() == []


RECORDS = {
    "if_forward": params.IF_FORWARD,
    "if_general": params.IF_GENERAL,
    "if_backward": params.IF_BACKWARD,
    "if_backward_general": params.IF_BACKWARD_GENERAL,
}


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


def plain_record(name: str) -> np.ndarray:
    record = np.zeros((), RECORDS[name])
    base = record if name in ("if_forward", "if_backward") else record["base"]
    base["vec"], base["N"], base["inner"] = 1, 8, 8
    for operand in ("v_init", "threshold", "amplitude"):
        base[operand]["inner"] = base[operand]["count"] = 1
    return record


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("if_forward", {"vec": 3}),
        ("if_forward", {"dtype": 9}),
        ("if_forward", {"spikes": 8, "spike_bytes": 3}),
        ("if_forward", {"spikes": 8, "spike_bytes": 8}),
        ("if_general", {"dtype": -1}),
        ("if_general", {"options": params.SMOOTH}),
        ("if_backward", {"vec": 3}),
        ("if_backward", {"surrogate": 9}),
        ("if_backward", {"dtype": -1}),
        ("if_backward", {"options": params.STRICT}),
        # A sum over the steps is the general kernel's, which needs x.
        ("if_backward", {"grad_x": 8}),
        ("if_backward_general", {"x": 0}),
        ("if_backward_general", {"x": 8, "options": params.SMOOTH}),
    ],
)
def test_parameters_outside_the_closed_list(
    host_shim: HostShim, name: str, fields: dict[str, int]
) -> None:
    record = plain_record(name)
    for field, value in fields.items():
        part = record if field in record.dtype.names else record["base"]
        part[field] = value
    with pytest.raises(RuntimeError, match=r"no kernel was compiled for these parameters"):
        getattr(host_shim.module, name)(record.tobytes(), 0, 0)


@pytest.mark.parametrize("name", RECORDS)
def test_more_neurons_than_a_grid_holds(host_shim: HostShim, name: str) -> None:
    record = plain_record(name)
    base = record if name in ("if_forward", "if_backward") else record["base"]
    base["N"] = base["inner"] = 2**31 * 256
    base["x"] = 8
    with pytest.raises(RuntimeError, match="more neurons than one launch can cover"):
        getattr(host_shim.module, name)(record.tobytes(), 0, 0)
    with pytest.raises(RuntimeError, match="more neurons than one launch can cover"):
        getattr(nvrtc, name)(record.tobytes(), torch.device("cuda", 0))


@pytest.mark.parametrize("name", RECORDS)
def test_structs_of_another_size_are_refused(host_shim: HostShim, name: str) -> None:
    with pytest.raises(ValueError, match=r"params: 5 bytes, expected \d+"):
        getattr(host_shim.module, name)(b"12345", 0, 0)


# ---- which kernel --------------------------------------------------------------------------------

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="names need binutils' nm")


@needs_nm
def test_the_two_closed_lists_agree(host_shim: HostShim) -> None:
    compiled = sorted(host_shim.kernel_names().values())
    listed = sorted(nvrtc.instances())
    assert compiled == listed
    assert len(set(listed)) == len(listed)
    assert len(nvrtc.plain_instances()) <= 150


@pytest.fixture
def launched(
    shim: HostShim, host_shim: HostShim, monkeypatch: pytest.MonkeyPatch
) -> Iterator[set[str]]:
    """Back end "both": through launch.cu, and by name as NVRTC would. The names that agreed."""
    names = host_shim.kernel_names()
    chosen: list[str] = []
    agreed: set[str] = set()
    monkeypatch.setattr(nvrtc, "_launch", lambda name, record, N, vec, device: chosen.append(name))

    def launch(kernel: str, p: bytes, device: torch.device) -> None:
        getattr(shim.module, f"if_{kernel}")(p, 0, 0)
        getattr(nvrtc, f"if_{kernel}")(p, device)
        (line,) = launches(shim)
        assert names[int(line.rsplit(" ", 1)[1])] == chosen[-1]
        agreed.add(chosen[-1])

    both = spy("both", launch, True)
    monkeypatch.setitem(backends._made, "both", both)
    monkeypatch.setitem(backends._MAKERS, "both", lambda: both)
    with backends.use_backend("both"):
        yield agreed


# Shape, whether time comes second in memory, form of the threshold. Halves go 8 to a thread.
FORMS = (
    ((64,), False, "number"),
    ((33,), False, "number"),
    ((33,), False, "full"),
    ((2, 8, 4, 4), False, "channel"),  # runs of 16: one threshold to a thread
    ((2, 8, 3), False, "channel"),  # runs of 3
    ((8, 16), False, "position"),
    ((8, 16), True, "number"),
    ((8, 16), True, "full"),
    ((3, 5), True, "channel"),
)
OUTPUTS = (
    ("spikes",), ("packed",), ("count",), ("spikes", "count"), ("packed", "count"),
    ("spikes", "packed"), ("v_seq", "count"),
)  # fmt: skip


def threshold_of(form: str, shape: tuple[int, ...], state: torch.dtype) -> Any:
    if form == "number":
        return 1.0
    size = {"channel": shape[1:2], "position": shape[1:], "full": shape}[form]
    return (0.75 + currents(*size, seed=5).abs() / 4).to(state)


def against(call: Callable[[], tuple[Tensor | None, ...]]) -> list[tuple[Tensor, Tensor]]:
    """What ``call`` returns by the back end in force and by the reference."""
    got = call()
    with backends.use_backend("reference"):
        want = call()
    pairs = zip(got, want, strict=True)
    return [(g, w) for g, w in pairs if g is not None and w is not None]


@needs_nm
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_forward_kernel_gives_the_references_bits(
    launched: set[str], dtype: torch.dtype
) -> None:
    state = torch.float64 if dtype == torch.float64 else torch.float32
    every = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 15, 16, 17, 31, 32, 33, 36, 63, 64, 65, 70)
    for shape, turned, form in FORMS:
        th = threshold_of(form, shape, state)
        v = (currents(*shape, seed=7) / 4).to(state)
        for T in every if len(shape) == 1 else (1, 2, 4, 6, 8, 16, 17, 32, 33, 64):
            x = currents(T, *shape, seed=T, dtype=dtype)
            if turned:
                x = x.transpose(0, 1).contiguous().transpose(0, 1)
            narrow: dict[str, Any] = {"spike_dtype": torch.uint8}
            given: dict[str, Any]
            for outputs, given in [
                *((o, {}) for o in OUTPUTS),
                *((o, narrow) for o in OUTPUTS[:4]),
                *((o, {"T": T}) for o in OUTPUTS[:2]),
            ]:

                def call(
                    current: Tensor = x[0] if "T" in given else x,
                    outputs: tuple[str, ...] = outputs,
                    given: dict[str, Any] = given,
                    v: Any = v if T % 2 else 0.25,
                    th: Any = th,
                    shape: tuple[int, ...] = shape,
                ) -> tuple[Tensor | None, ...]:
                    run = if_run(
                        current, v, th, amplitude="threshold", outputs=outputs,
                        channel_dim=min(1, len(shape) - 1), **given,
                    )  # fmt: skip
                    words = None if run.packed is None else run.packed.words
                    return run.v, run.spikes, words, run.count, run.v_seq

                for got, want in against(call):
                    assert_same_bits(got, want, f"{shape} {form} T={T} {outputs} {given}")
    name = nvrtc._TYPES[params.DTYPE_CODES[dtype]][0]
    listed = {n for n in nvrtc.instances() if re.match(rf"snn::if_(forward|general)\w*<{name},", n)}
    training = {n for n in listed if f"if_forward<{name}, {nvrtc.TRAINING}" in n}
    assert listed - launched == training | {n for n in listed if "true>" in n and "general" in n}


@needs_nm
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_backward_kernel_gives_the_references_gradients(
    launched: set[str], dtype: torch.dtype
) -> None:
    state = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = ("atan", "sigmoid", "triangle", "rectangle")
    for (shape, turned, form), T in itertools.product(FORMS, (1, 4, 7, 8, 9, 16, 35, 65)):
        size = (T, *shape)
        x, g = currents(*size, seed=T, dtype=dtype), currents(*size, seed=1, dtype=dtype)
        if turned:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        th, g_v = threshold_of(form, shape, state), currents(*shape, seed=2, dtype=state)
        learned = isinstance(th, Tensor) and T % 2 == 0
        combinations = itertools.product(kinds, ("recompute", "trace", "bits"), ("seq", "rate"))
        for kind, save, out in combinations:
            if save == "bits" and kind != "rectangle":
                continue

            def call(
                x: Tensor = x, g: Tensor = g, th: Any = th, g_v: Tensor = g_v, kind: str = kind,
                save: str = save, out: str = out, learned: bool = learned,
                dim: int = min(1, len(shape) - 1),
            ) -> tuple[Tensor, ...]:  # fmt: skip
                leaf = x.detach().requires_grad_()
                v = torch.full(x.shape[1:], 0.25, dtype=state, requires_grad=True)
                leaves = [leaf, v]
                if learned:
                    th = th.detach().clone().requires_grad_()
                    leaves.append(th)
                given: dict[str, Any] = {
                    "channel_dim": dim, "surrogate_function": kind, "save": save,
                    "amplitude": "threshold", "detach_reset": kind == "triangle",
                }  # fmt: skip
                if out == "rate":
                    spikes, last = if_rate(leaf, v, th, **given)
                    return torch.autograd.grad((spikes, last), leaves, (g[0], g_v))
                spikes, last, _ = if_multi_step(leaf, v, th, **given)
                return (spikes.detach(), *torch.autograd.grad((spikes, last), leaves, (g, g_v)))

            for got, want in against(call):
                close = {torch.float64: 1e-12, torch.float32: 2e-6}.get(got.dtype, 1e-2)
                assert_close(got, want, close, f"{shape} {form} T={T} {kind} {save} {out}")
    name = nvrtc._TYPES[params.DTYPE_CODES[dtype]][0]
    listed = {n for n in nvrtc.plain_instances() if f"if_backward<{name}," in n}
    listed |= {n for n in nvrtc.plain_instances() if f"if_backward_bits<{name}," in n}
    listed |= {n for n in nvrtc.instances() if f"if_forward<{name}, {nvrtc.TRAINING}" in n}
    assert listed <= launched


@needs_nm
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_general_kernels_know_every_surrogate_and_bursts(
    launched: set[str], dtype: torch.dtype
) -> None:
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x, g = currents(19, 3, 5, dtype=dtype), currents(19, 3, 5, seed=1, dtype=dtype)
    more: tuple[dict[str, Any], ...] = (
        {},
        {"max_spikes": 3},
        {"beta": 0.75, "max_spikes": 2**24},
        {"v_min": -0.2},
    )
    for cls, given, T in itertools.product(surrogate.BY_KIND, more, (None, 19)):

        def call(cls: Any = cls, given: dict[str, Any] = given, T: int | None = T) -> Any:
            leaf = (x if T is None else x[0]).detach().requires_grad_()
            th = threshold_of("channel", (3, 5), state).requires_grad_()
            how = cls(scale=0.5)
            run = if_run(leaf, 0.25, th, surrogate_function=how, T=T, channel_dim=1, **given)
            grads = torch.autograd.grad((run.spikes, run.v), (leaf, th), (g, g[0].to(state)))
            return (run.spikes.detach(), *grads)

        spikes, *grads = against(call)
        assert_same_bits(*spikes)
        for got, want in grads:
            close = {torch.float64: 1e-12, torch.float32: 1e-5}.get(got.dtype, 1e-2)
            assert_close(got, want, close, f"{cls.__name__} {given} {T}")
    name = nvrtc._TYPES[params.DTYPE_CODES[dtype]][0]
    assert f"snn::if_backward_general<{name}, false>" in launched


@needs_nm
def test_gradients_of_a_constant_current_are_the_general_kernels(launched: set[str]) -> None:
    x = currents(64)

    def call() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(if_multi_step(leaf, T=9)[0].sum(), leaf)

    for got, want in against(call):
        assert_close(got, want, 1e-6)
    assert "snn::if_backward_general<float, false>" in launched


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
    monkeypatch.setattr(plan, "FULL", 0)
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


@pytest.mark.parametrize(
    ("size", "element", "vec"),
    [(264 * 256 * 4, 4, 4), (264 * 256 * 4 - 4, 4, 1), (264 * 256 * 4 + 1, 4, 1)],
)
def test_wide_threads_only_where_they_fill_a_device(size: int, element: int, vec: int) -> None:
    x = torch.empty(1, size)
    layout = layouts.located(x, False)[1]
    assert plan.forward(x, layout, size, x) == vec
    assert plan.forward(x, layout, size, x.view(-1)[1:]) == 1
