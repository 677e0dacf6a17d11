"""The small kernels' GPU side without a GPU: launches, structs, closed lists, what compiles."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_compile
import torch
from support import CSRC, DTYPES, PURE, HostShim, check_call, currents, extension, find_nvcc

from snnkernels import maps
from snnkernels.kernels import backends, maps_params, nvrtc, params

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


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One call of every public map; between the dtypes they need every instance."""
    x, x_seq = currents(3, 40, dtype=dtype), currents(4, 1, 2, 9, 9, dtype=dtype)
    counts = torch.zeros(3, 8, dtype=torch.int64)
    tables, scale = (counts, counts.double()), torch.ones(3, dtype=torch.float64)
    words = torch.zeros(1, 7, dtype=torch.uint8)
    return {
        "qcfs": lambda: maps.qcfs(x, 1.0, 4),
        "pool 2": lambda: maps.cumulative_max_pool(x_seq, 2),
        "pool 3": lambda: maps.cumulative_max_pool(x_seq, (1, 3)),
        "pool any": lambda: maps.cumulative_max_pool(x_seq, (2, 4)),
        "histogram": lambda: maps.histogram_update(*tables, x, scale),
        "ttfs_encode": lambda: maps.ttfs_encode(x, 1.0, 8),
        "ttfs_decode": lambda: maps.ttfs_decode(words, 1.0, 8, dtype),
        "bit_planes": lambda: maps.bit_planes(x, 1.0, 4, planes=True),
        "unpack": lambda: maps.unpack_bits(words, 8, dtype),
        "unpack uint8": lambda: maps.unpack_bits(words, 8, torch.uint8),
        "pack": lambda: maps.pack_bits(x),
        "pack uint8": lambda: maps.pack_bits(words),
        "popcount": lambda: maps.popcount(words),
        "mmse": lambda: maps.mmse_errors(x, x.abs() + 1, 4),
    }


@pytest.mark.parametrize("name", calls(torch.float32))
def test_one_launch_a_call(shim: HostShim, name: str) -> None:
    calls(torch.float32)[name]()
    assert len(launches(shim)) == 1


def test_launches_of_gradients(shim: HostShim) -> None:
    """One, and one more (two above a thousand elements) to sum what thresholds share."""
    for size, expected in ((40, 2), (3000, 3)):
        x, th = torch.ones(size, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        out = maps.qcfs(x, th, 4)
        launches(shim)
        torch.autograd.grad(out.sum(), (x, th))
        assert len(launches(shim)) == expected
        maps.dsr_backward(torch.ones(2, size), torch.ones(2, size), 1.0)
        assert len(launches(shim)) == expected
    x = torch.ones(40, requires_grad=True)
    maps.qcfs(x, 1.0, 4).sum().backward()
    assert len(launches(shim)) == 2


@pytest.mark.parametrize(("size", "blocks"), [(1, 1), (256, 1), (257, 2), (1024, 4)])
def test_blocks_cover_the_elements_once(shim: HostShim, size: int, blocks: int) -> None:
    maps.qcfs(torch.zeros(size), 1.0, 4)
    (line,) = launches(shim)
    assert line.startswith(f"launch {blocks} blocks of 256 ")


def test_more_blocks_than_a_grid_holds_are_refused(shim: HostShim) -> None:
    for name, record in maps_params.RECORDS.items():
        packed = record.pack(N=256 << 32, **({"spike_bytes": 1} if "bits" in name else {}))
        with pytest.raises(RuntimeError, match=f"{name}: more neurons than one launch can cover"):
            shim.module.map(name, packed, 0, 0)
    assert shim.take_log() == []


def test_nothing_is_launched_for_nothing(shim: HostShim) -> None:
    maps.qcfs(torch.zeros(0), 1.0, 4)
    maps.pack_bits(torch.zeros(3, 0))
    maps.cumulative_max_pool(torch.zeros(3, 0, 1, 4, 4), 2)
    assert shim.take_log() == []


def test_gpu_sums_are_kept_only_when_asked_for(
    shim: HostShim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running sums of a pool cost memory traffic that only a converted network needs."""
    seen: list[np.void] = []
    real = shim.kernels()

    def spy(name: str, packed: bytes, device: torch.device) -> None:
        seen.append(np.frombuffer(packed, maps_params.RECORDS[name].dtype)[0])
        assert real.map is not None
        real.map(name, packed, device)

    kernels = replace(real, name="spy", map=spy)
    monkeypatch.setitem(backends._MAKERS, "spy", lambda: kernels)
    monkeypatch.setitem(backends._made, "spy", kernels)
    with backends.use_backend("spy"):
        x = torch.ones(2, 1, 1, 4, 4)
        maps.cumulative_max_pool(x, 2)
        maps.pool_steps(x, [2, 2], [2, 2], [0, 0], [1, 1], False, None, None, True)
    assert [bool(p["total"]) for p in seen] == [False, True]


# ---- structs -------------------------------------------------------------------------------------


def same_layout(module: Any) -> None:
    for record in {r.name: r for r in maps_params.RECORDS.values()}.values():
        fields = record.dtype.fields
        assert fields is not None
        mine = {"": record.dtype.itemsize, **{name: f[1] for name, f in fields.items()}}
        assert mine == module.MAP_LAYOUT[record.name], record.name
    assert set(module.MAP_LAYOUT) == {r.name for r in maps_params.RECORDS.values()}


def test_layouts_of_the_extension() -> None:
    module = extension("_cpu")
    assert module is not None
    same_layout(module)


def test_layouts_of_the_sources(host_shim: HostShim) -> None:
    same_layout(host_shim.module)


@pytest.mark.parametrize("record", set(maps_params.RECORDS.values()), ids=lambda r: r.name)
def test_packed_bytes_are_the_numpy_records(record: maps_params.Record) -> None:
    values: dict[str, Any] = {}
    for i, name in enumerate(record.dtype.names or ()):
        kind = record.dtype[name]
        values[name] = (i + 1, i + 2, i + 3, i + 0.5) if kind.names else i + 1
    read = np.frombuffer(record.pack(**values), record.dtype)[0]
    for name, value in values.items():
        got = tuple(read[name]) if isinstance(value, tuple) else read[name]
        assert got == value
    with pytest.raises(AssertionError, match="has no fields"):
        record.pack(nonsense=1)


def test_constants_are_those_of_the_headers() -> None:
    from snnkernels.kernels import maps_reference
    from snnkernels.kernels.maps import pooling

    text = (CSRC / "maps.h").read_text() + (CSRC / "maps.cuh").read_text()
    code = {name: int(value) for name, value in re.findall(r"\b(k\w+) = (\d+)", text)}
    assert code["kMapLanes"] == maps_reference.LANES
    assert code["kPoolTaps"] == pooling.TAPS
    listed = re.findall(r"MAP\((\w+), (\w+)\)", (CSRC / "maps_cpu_api.h").read_text())
    assert dict(listed) == {name: r.name for name, r in maps_params.RECORDS.items()}


def test_wrong_calls_are_refused(host_shim: HostShim) -> None:
    cpu = extension("_cpu")
    assert cpu is not None
    for call in (cpu.map, lambda *given: host_shim.module.map(*given, 0, 0)):
        with pytest.raises(ValueError, match=r"params: 5 bytes, expected \d+"):
            call("qcfs", b"12345")
        with pytest.raises(ValueError, match="map: 'nothing' is unknown"):
            call("nothing", b"")
    for name, bad in (
        ("qcfs", {"dtype": 9}),
        ("sums", {"dtype": 2}),
        ("unpack_bits", {"spike_bytes": 3}),
        ("cumulative_max_pool", {"size": 4}),
        ("cumulative_max_pool", {"kh": 9, "kw": 9}),
    ):
        packed = maps_params.RECORDS[name].pack(N=8, **bad)
        with pytest.raises(RuntimeError, match=f"{name}: no kernel was compiled for these"):
            host_shim.module.map(name, packed, 0, 0)


# ---- devices, streams, errors --------------------------------------------------------------------


def test_stream_and_device_are_the_tensors(
    host_shim: HostShim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "extension", lambda name: host_shim.module)
    monkeypatch.setattr(backends, "_need_device", lambda: None)
    monkeypatch.setattr(backends, "_stream", lambda device: 4711 + device.index)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: host_shim.device)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    launch = backends._cuda().map
    assert launch is not None
    words, counts = torch.full((1, 5), 7, dtype=torch.uint8), torch.zeros(5, dtype=torch.int32)
    packed = maps_params.BITS.pack(
        words=words.data_ptr(), counts=counts.data_ptr(), N=5, W=1, word_bytes=1
    )
    host_shim.take_log()
    for index in (0, 3):
        launch("popcount", packed, torch.device("cuda", index))
        log = [re.sub(" kernel .*", "", line) for line in host_shim.take_log()]
        line = f"launch 1 blocks of 256 on device {index} stream {4711 + index}"
        assert log == ([line] if index == 0 else [f"device {index}", line, "device 0"])
    assert counts.tolist() == [3] * 5
    with pytest.raises(RuntimeError, match="popcount: invalid device ordinal"):
        launch("popcount", packed, torch.device("cuda", 7))
    host_shim.fail("cudaGetLastError", 719)
    try:
        with pytest.raises(RuntimeError, match="popcount: unspecified launch failure"):
            launch("popcount", packed, torch.device("cuda", 2))
        assert host_shim.device == 0
    finally:
        host_shim.fail("cudaGetLastError", 0)


def test_nvrtc_launch_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def function(grid: Any, block: Any, arguments: Any, *, stream: Any) -> None:
        seen.append((grid, block, arguments[0].tobytes(), stream))

    names: list[str] = []
    monkeypatch.setattr(nvrtc, "_function", lambda name, device: names.append(name) or function)
    monkeypatch.setattr(nvrtc, "_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "device", lambda d: contextlib.nullcontext())
    packed = maps_params.QCFS.pack(N=257, dtype=2)
    nvrtc.map_("qcfs_backward", packed, torch.device("cuda", 2))
    assert names == ["snn::shared_map<snn::QcfsBackward<snn::f16>>"]
    assert seen == [((2, 1, 1), (256, 1, 1), packed, "stream of cuda:2")]


# ---- which kernel --------------------------------------------------------------------------------

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="names need binutils' nm")


def kernel_names(shim: HostShim) -> dict[int, str]:
    """Every small kernel in the module: offset -> name as NVRTC spells it."""
    names = {}
    for line in check_call(["nm", "-C", shim.path]).splitlines():
        address, _, name = line.partition(" ")
        found = re.search(r"\bsnn::(?:shared_)?map<.*>(?=\(snn::)", name)
        if found and address.strip():
            names[int(address, 16)] = found[0].replace("> >", ">>")
    return names


@needs_nm
def test_the_two_closed_lists_agree(host_shim: HostShim) -> None:
    listed = maps_params.instances()
    assert len(set(listed)) == len(listed)
    assert sorted(kernel_names(host_shim).values()) == sorted(listed)


@needs_nm
def test_python_and_cpp_choose_the_same_kernel(
    shim: HostShim, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    real = shim.kernels()

    def both(name: str, packed: bytes, device: torch.device) -> None:
        record = np.frombuffer(packed, maps_params.RECORDS[name].dtype)[0]
        chosen.append(maps_params.instance(name, record))
        assert real.map is not None
        real.map(name, packed, device)

    kernels = replace(real, name="both", map=both)
    monkeypatch.setitem(backends._MAKERS, "both", lambda: kernels)
    monkeypatch.setitem(backends._made, "both", kernels)
    with backends.use_backend("both"):
        for dtype in DTYPES:
            for call in calls(dtype).values():
                call()
            x = currents(2, 40, dtype=dtype).requires_grad_()
            th = torch.ones(40, dtype=dtype).requires_grad_()
            torch.autograd.grad(maps.qcfs(x, th, 4).sum(), (x, th))
            maps.dsr_backward(x.detach(), x.detach(), 1.0)
    names = kernel_names(shim)
    launched = [names[int(line.rsplit(" ", 1)[1])] for line in launches(shim)]
    assert launched == chosen
    assert set(launched) == set(maps_params.instances())


# ---- what compiles -------------------------------------------------------------------------------


def nothing_spilled(log: str, kernels: int) -> None:
    """Reads ``ptxas -v``: no stack frame, no spill, at most 128 registers.

    But for pooling windows of any size, whose sums live in local memory anyway.
    """
    entries = re.findall(
        r"Function properties for (\S+)\s+(?:ptxas\s*\.\s*)?(.*)\n.*?Used (\d+) registers", log
    )
    assert len(entries) == kernels, log[-2000:]
    for name, properties, registers in entries:
        assert int(registers) <= 128, name
        if not re.search(r"4PoolI\S*Li0E", name):
            assert properties.startswith(
                "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
            ), f"{name}: {properties}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100", "120"] if test_compile.THOROUGH else ["90"])
def test_nvcc(arch: str, tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    if arch not in test_compile.nvcc_archs():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    done = subprocess.run(
        [
            nvcc, "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "-cubin",
            f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(tmp_path / "maps.cubin"),
            str(CSRC / "maps_launch.cu"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning" not in done.stderr.lower()
    nothing_spilled(done.stderr, len(maps_params.instances()))


@pytest.mark.slow
@pytest.mark.parametrize("arch", test_compile.ARCHS)
def test_nvrtc(arch: str) -> None:
    names = maps_params.instances()
    if not test_compile.THOROUGH:
        names = names[test_compile.ARCHS.index(arch) :: len(test_compile.ARCHS)]
    cubin, lowered, log = test_compile.compile_with_nvrtc(names, arch)
    assert cubin[:4] == b"\x7fELF"
    for name in lowered:
        assert name.encode() in cubin
    assert "warning" not in log.lower()
    nothing_spilled(log, len(names))


def test_the_list_is_small() -> None:
    assert len(maps_params.instances()) <= 60
    assert params.DTYPE_CODES.keys() == set(DTYPES)
