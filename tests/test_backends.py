"""Which implementation runs, forcing one, what is said when one is missing."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import PACKAGE, PURE, assert_same_bits, currents, spy

import snnkernels
from snnkernels import IFNode
from snnkernels.functional import if_count, if_multi_step, if_rate, if_step, qcfs
from snnkernels.kernels import backends, params
from snnkernels.kernels import nvrtc as nvrtc_kernels

needs_cpu = pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: no CPU extension")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing found out yet about any back end, and nothing remembered afterwards."""
    monkeypatch.setattr(backends, "_made", {})
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_forced", "auto")
    # As installed, whichever copy is tested.
    monkeypatch.setattr(backends, "_FOLDER", Path("/no/such/folder"))
    backends.extension.cache_clear()
    yield monkeypatch
    backends.extension.cache_clear()


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Lets the import of these modules fail as if they were not installed."""
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name in modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, with the copy under test."""
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=sys.prefix,  # in a clone, python -c would import the source folder
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


# ---- forcing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpus", "", "AUTO", "triton", None])
def test_unknown_back_ends(name: Any) -> None:
    before = snnkernels.get_backend()
    with pytest.raises(ValueError, match=r"name=.* is no back end; allowed are 'auto', 'cpu'"):
        snnkernels.set_backend(name)
    assert snnkernels.get_backend() == before


@needs_cpu
def test_set_get_and_use() -> None:
    assert snnkernels.get_backend() == "auto"
    snnkernels.set_backend("cpu")
    with snnkernels.use_backend("reference"):
        assert snnkernels.get_backend() == "reference"
        assert backends.choose(torch.device("cpu")) is None
    assert snnkernels.get_backend() == "cpu"
    with pytest.raises(KeyError), snnkernels.use_backend("reference"):
        raise KeyError
    assert snnkernels.get_backend() == "cpu"
    assert backends.choose(torch.device("cpu")).name == "cpu"


def test_a_forced_back_end_that_cannot_run_raises(fresh: pytest.MonkeyPatch) -> None:
    hide(fresh, "snnkernels._cpu", "snnkernels._cuda", "cupy", "cupy.cuda")
    for name, remedy in (
        ("cpu", r"_cpu is not installed; reinstall snnkernels where a C\+\+17 compiler"),
        ("cuda", "_cuda is not installed; reinstall snnkernels where nvcc is on PATH"),
        ("nvrtc", r"CuPy does not import: .*; pip install cupy-cuda1\dx"),
    ):
        with pytest.raises(RuntimeError, match=f"back end '{name}' cannot run here: .*{remedy}"):
            snnkernels.set_backend(name)
        assert snnkernels.get_backend() == "auto"


@needs_cpu
def test_a_forced_back_end_serves_its_device_only() -> None:
    snnkernels.set_backend("cpu")
    with pytest.raises(RuntimeError, match=r"'cpu' was forced but the input is on a meta device"):
        backends.choose(torch.device("meta"))


def test_a_forced_gpu_serves_no_cpu_tensors(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, cuda="13.0", device=True)
    for name in ("cuda", "nvrtc"):
        snnkernels.set_backend(name)
        with pytest.raises(RuntimeError, match=f"'{name}' was forced but .* is on a cpu device"):
            backends.choose(torch.device("cpu"))


def test_what_was_missing_is_looked_for_again(fresh: pytest.MonkeyPatch) -> None:
    """Installed while Python runs: forcing it is enough."""
    pretend(fresh, cuda="13.0", device=False)
    with pytest.raises(RuntimeError, match="no CUDA device is visible"):
        snnkernels.set_backend("nvrtc")
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    snnkernels.set_backend("nvrtc")
    assert backends.choose(torch.device("cuda:0")).name == "nvrtc"


def test_a_forced_back_end_never_falls_back(fresh: pytest.MonkeyPatch) -> None:
    """Not even when it breaks at the first call: as from the environment, unchecked at import."""
    hide(fresh, "snnkernels._cpu")
    fresh.setattr(backends, "_forced", "cpu")
    with pytest.raises(RuntimeError, match="_cpu is not installed"):
        if_multi_step(torch.zeros(2, 3))


# ---- the environment variable --------------------------------------------------------------------

SHOW = (
    "import torch, snnkernels\n"
    "from snnkernels.kernels import backends\n"
    "kernels = backends.choose(torch.device('cpu'))\n"
    "print(snnkernels.get_backend(), kernels and kernels.name)"
)


CALL = "import torch, snnkernels.functional as f\nprint('imported')\nf.if_count(torch.ones(1, 1))"


def test_environment_chooses() -> None:
    assert run(SHOW, SNNKERNELS_BACKEND="reference").stdout == "reference None\n"


@needs_cpu
def test_environment_chooses_cpu_and_auto() -> None:
    assert run(SHOW, SNNKERNELS_BACKEND="cpu").stdout == "cpu cpu\n"
    assert run(SHOW, SNNKERNELS_BACKEND="auto").stdout == "auto cpu\n"


def test_environment_with_a_wrong_name() -> None:
    # Importing raises nothing, so that `python -m snnkernels info` can still be asked.
    done = run(CALL, SNNKERNELS_BACKEND="gpu")
    assert done.stdout == "imported\n"
    assert done.returncode != 0
    assert "SNNKERNELS_BACKEND='gpu' is unknown; allowed are auto, cpu, cuda" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_environment_with_a_back_end_that_cannot_run() -> None:
    # Importing touches no device, so this shows at the first call.
    done = run(CALL, SNNKERNELS_BACKEND="cuda")
    assert done.stdout == "imported\n"
    assert done.returncode != 0
    assert "Missing" in done.stderr or "RuntimeError" in done.stderr


# ---- falling back --------------------------------------------------------------------------------


def test_one_warning_that_names_the_remedy(fresh: pytest.MonkeyPatch) -> None:
    hide(fresh, "snnkernels._cpu")
    x = currents(4, 7)

    def several() -> tuple[torch.Tensor, ...]:
        for _ in range(3):
            if_count(x)
            IFNode()(x)
        return if_multi_step(x, "half")

    with pytest.warns(RuntimeWarning) as caught:
        got = several()
    assert len(caught) == 1
    said = str(caught[0].message)
    for part in (
        "slow PyTorch reference on cpu tensors",
        "_cpu is not installed",
        "reinstall snnkernels",
        "`snnkernels info`",
    ):
        assert part in said
    with backends.use_backend("reference"):
        want = if_multi_step(x, "half")
    assert_same_bits(got[0], want[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda x: if_multi_step(x),
        lambda x: if_multi_step(x, store_v_seq=True, v_reset=0.0),
        lambda x: if_step(x[0]),
        lambda x: IFNode()(x),
        lambda x: torch.nn.Sequential(torch.nn.Sequential(IFNode()))(x),
        lambda x: qcfs(x, 1.0, 4),
    ],
)
def test_the_warning_points_at_the_users_line(
    fresh: pytest.MonkeyPatch, call: Callable[[torch.Tensor], Any]
) -> None:
    """Not at one of the package's or of torch's, however deep the call is."""
    hide(fresh, "snnkernels._cpu")
    x = currents(4, 7)
    with pytest.warns(RuntimeWarning, match="slow PyTorch reference") as caught:
        call(x)
    line = call.__code__.co_firstlineno
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


def test_no_warning_when_the_reference_is_asked_for(fresh: pytest.MonkeyPatch) -> None:
    hide(fresh, "snnkernels._cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with backends.use_backend("reference"):
            if_multi_step(torch.zeros(2, 3))


def test_a_broken_extension_is_no_missing_one(fresh: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name == "snnkernels._cpu":
            raise ImportError("libgomp.so.1: cannot open shared object file")
        return real(name, package)

    fresh.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match=r"_cpu does not load: libgomp.so.1"):
        snnkernels.set_backend("cpu")


@pytest.mark.parametrize("name", ["absent", "zzz"])
def test_what_an_extension_needs_and_lacks_is_said_as_it_is(
    fresh: pytest.MonkeyPatch, name: str
) -> None:
    """Not as if the extension itself were missing: no remedy of ours would help."""

    def needs(module: str, package: str | None = None) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    fresh.setattr(importlib, "import_module", needs)
    with pytest.raises(ModuleNotFoundError, match=f"^No module named '{name}'$"):
        backends.extension("_cpu")


# ---- backend_info --------------------------------------------------------------------------------


def rows() -> dict[str, backends.Row]:
    return {row.name: row for row in snnkernels.backend_info().rows}


def test_info_lists_every_back_end() -> None:
    info = snnkernels.backend_info()
    assert [row.name for row in info.rows] == ["cpu", "cuda", "nvrtc", "reference"]
    for row in info.rows:
        assert row.reason
        assert row.available or row.remedy
    assert info.torch == torch.__version__
    assert info.forced == snnkernels.get_backend()
    assert info.package == str(PACKAGE)
    assert info.to_dict()["rows"][-1]["name"] == "reference"
    for row in info.rows:
        assert row.name in str(info)
        assert row.remedy in str(info)


def test_info_is_a_table() -> None:
    info = backends.BackendInfo(
        (
            backends.Row("cpu", True, "serves CPU tensors", "", "avx2, 4 threads"),
            backends.Row("cuda", False, "no CUDA device is visible", "check nvidia-smi", "-"),
        ),
        "auto",
        "2.13.0",
        "site-packages/snnkernels",
    )
    assert str(info).split("\n") == [
        "snnkernels in site-packages/snnkernels, torch 2.13.0; back end: auto",
        "back end  there  version          why / remedy",
        "-" * 59,
        "cpu       yes    avx2, 4 threads  serves CPU tensors",
        "cuda      no     -                no CUDA device is visible",
        "                                  remedy: check nvidia-smi",
    ]
    for told, field in ((info, "forced"), (info.rows[0], "available")):
        with pytest.raises(FrozenInstanceError):
            setattr(told, field, "other")


@needs_cpu
def test_info_on_this_machine_is_true() -> None:
    found = rows()
    assert found["cpu"].available
    assert backends.extension("_cpu").isa() in found["cpu"].version
    assert found["cuda"].available <= torch.cuda.is_available()
    assert found["nvrtc"].available <= torch.cuda.is_available()


def test_info_without_anything(fresh: pytest.MonkeyPatch) -> None:
    hide(fresh, "snnkernels._cpu", "snnkernels._cuda", "cupy", "cupy.cuda")
    found = rows()
    assert [row.available for row in found.values()] == [False, False, False, True]
    assert "C++17 compiler" in found["cpu"].remedy
    assert "nvcc" in found["cuda"].remedy
    assert "pip install cupy-cuda" in found["nvrtc"].remedy
    assert found["cpu"].version == found["cuda"].version == found["nvrtc"].version == "-"


class _FakeModule:
    ARCHS = "75 90"

    def versions(self) -> tuple[int, int]:
        return 13000, 13010

    def if_forward(self, *args: Any) -> None: ...

    if_general = if_backward = if_backward_general = if_forward


def pretend(monkeypatch: pytest.MonkeyPatch, *, cuda: str | None, device: bool) -> None:
    """A torch with or without CUDA and a device, with _cuda and CuPy installed."""
    real = importlib.import_module
    nvrtc = SimpleNamespace(getVersion=lambda: (13, 0), getSupportedArchs=lambda: [75, 80, 90, 100])
    fakes = {
        "snnkernels._cuda": _FakeModule(),
        "cupy": SimpleNamespace(__version__="14.0"),
        "cupy.cuda": SimpleNamespace(nvrtc=nvrtc),
    }
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name, package=None: fakes.get(name) or real(name, package),
    )
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("cuda", "device", "reason", "remedy"),
    [
        (None, False, "was built without CUDA", "install a CUDA build of torch"),
        ("13.0", False, "no CUDA device is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES"),
    ],
)
def test_info_without_a_gpu(
    fresh: pytest.MonkeyPatch, cuda: str | None, device: bool, reason: str, remedy: str
) -> None:
    pretend(fresh, cuda=cuda, device=device)
    found = rows()
    for name in ("cuda", "nvrtc"):
        assert not found[name].available
        assert reason in found[name].reason
        assert found[name].remedy == remedy
    assert found["cuda"].version == "sm 75 90"
    assert found["nvrtc"].version == "cupy 14.0"


def test_info_and_choice_with_a_gpu(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, cuda="13.0", device=True)
    found = rows()
    assert found["cuda"].available
    assert found["nvrtc"].available
    # The compiled extension comes before NVRTC.
    assert backends.choose(torch.device("cuda:0")).name == "cuda"
    with backends.use_backend("nvrtc"):
        assert backends.choose(torch.device("cuda:0")).name == "nvrtc"


class _Compiler:
    """NVRTC as CuPy has it, of a GPU that is none; compiles everything but ``bad``."""

    class NVRTCError(Exception):
        pass

    def __init__(self) -> None:
        self.log: list[Any] = []

    def createProgram(self, source: str, name: str, headers: Any, names: Any) -> str:
        self.log.append(("create", "if_forward" in source, "#include" in source, name))
        return "program"

    def addNameExpression(self, program: str, name: str) -> None:
        self.log.append(("add", name))

    def compileProgram(self, program: str, options: tuple[str, ...]) -> None:
        self.log.append(("compile", options))
        if any(entry == ("add", "bad") for entry in self.log):
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION")

    def getProgramLog(self, program: str) -> str:
        return "error: bad is undefined"

    def getLoweredName(self, program: str, name: str) -> str:
        return f"_{name}"

    def getCUBIN(self, program: str) -> bytes:
        return b"cubin"

    def destroyProgram(self, program: str) -> None:
        self.log.append("destroy")

    def getSupportedArchs(self) -> list[int]:
        return [75, 80, 90, 100]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for CuPy and a device of capability 9.0."""
    nvrtc, real, launches = _Compiler(), importlib.import_module, []

    class Module:
        def load(self, cubin: bytes) -> None:
            assert cubin == b"cubin"

        def get_function(self, name: str) -> Any:
            return lambda *given, **more: launches.append((name, *given, more))

    external = SimpleNamespace(
        nvrtc=nvrtc, Module=Module, Stream=SimpleNamespace(),
        ExternalStream=lambda stream, device: ("stream", stream, device),
    )  # fmt: skip
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name, package=None: external if name == "cupy.cuda" else real(name, package),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    current = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(nvrtc_kernels, "_kernels", {})
    return SimpleNamespace(nvrtc=nvrtc, launches=launches, cuda=external, current=current)


def test_kernels_are_compiled_once_for_a_device(compiler: SimpleNamespace) -> None:
    device, record = torch.device("cuda", 1), np.zeros(1)
    for N in (1, 1024, 1025):
        nvrtc_kernels._launch("snn::f", record, N, 4, device)
    program = [("create", True, False, "snnkernels.cu"), ("add", "snn::f")]
    assert compiler.nvrtc.log[:2] == program
    name, options = compiler.nvrtc.log[2]
    assert (name, options[-1]) == ("compile", "-arch=sm_90")
    assert {"-fmad=false", "-ftz=false"} < set(options)
    assert compiler.nvrtc.log[3:] == ["destroy"]
    blocks = [launch[1] for launch in compiler.launches]
    assert blocks == [(1, 1, 1), (1, 1, 1), (2, 1, 1)]
    for launch in compiler.launches:
        assert launch[0] == "_snn::f"
        assert launch[2] == (256, 1, 1)
        assert launch[3][0] is record
        assert launch[4] == {"stream": ("stream", 77, 1)}
    nvrtc_kernels._launch("snn::f", record, 1, 4, torch.device("cuda", 0))
    assert compiler.nvrtc.log.count("destroy") == 2


def test_streams_of_a_newer_cupy(compiler: SimpleNamespace) -> None:
    compiler.cuda.Stream.from_external = lambda stream: ("taken", stream)
    device = torch.device("cuda", 0)
    assert nvrtc_kernels._stream(device) == ("stream", 77, 0)  # torch's has no protocol
    compiler.current.__cuda_stream__ = lambda: (0, 77)
    assert nvrtc_kernels._stream(device) == ("taken", compiler.current)


def test_what_nvrtc_cannot_do(compiler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    device, record = torch.device("cuda", 0), np.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)for sm_90: .*COMPILATION\nerror: bad is undef"):
        nvrtc_kernels._launch("bad", record, 1, 1, device)
    assert compiler.nvrtc.log[-1] == "destroy"
    assert not nvrtc_kernels._kernels
    with pytest.raises(RuntimeError, match="more neurons than one launch can cover"):
        nvrtc_kernels._launch("snn::f", record, 256 * 2**31, 1, device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured: run once before"):
        nvrtc_kernels._launch("snn::g", record, 1, 1, device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(backends.Missing, match="compiles for sm 75 80 90 100, the device is sm_61"):
        nvrtc_kernels.check(device)
    assert not compiler.launches


def test_very_many_steps_are_not_for_the_plain_kernel() -> None:
    record = np.zeros(1, params.IF_FORWARD)[0]
    record["T"] = 2**31 - 1
    assert nvrtc_kernels.is_plain_forward(record)
    record["T"] = 2**31
    assert not nvrtc_kernels.is_plain_forward(record)


@pytest.mark.parametrize(
    ("capability", "name"), [((9, 0), "cuda"), ((10, 3), "cuda"), ((8, 6), "nvrtc"), ((6, 1), None)]
)
def test_each_device_gets_what_was_built_for_it(
    fresh: pytest.MonkeyPatch, capability: tuple[int, int], name: str | None
) -> None:
    """Cubins run on their major version, PTX of 9.0 on anything later, NVRTC where it compiles."""
    pretend(fresh, cuda="13.0", device=True)
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if name is None:
        with pytest.warns(RuntimeWarning, match=r"built for sm 75 90, the device is sm_61"):
            assert backends.choose(torch.device("cuda:0")) is None
        return
    found = backends.choose(torch.device("cuda:0"))
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        # A cubin: the same major version, from its minor version on.
        ("86", (8, 6), True),
        ("86", (8, 9), True),
        ("86", (8, 0), False),
        ("86 90", (8, 9), True),
        ("80 75", (8, 6), True),
        ("80 75", (7, 5), True),
        ("80 75", (7, 0), False),
        # PTX of the newest, here without a cubin that fits; of nothing else but 9.0.
        ("75 80", (9, 0), True),
        ("75 89", (8, 6), False),
        ("80", (7, 5), False),
        ("90", (8, 9), False),
        ("90", (9, 0), True),
        ("75 80", (12, 1), True),
        ("90 120", (10, 0), True),  # PTX of 9.0 beside a newer one
        ("90 120", (9, 0), True),
        ("100 120", (11, 0), False),
        ("80 120", (9, 0), False),
        ("91 120", (10, 3), False),  # PTX of 9.0 itself, not of what is near it
        ("89 120", (10, 3), False),
        ("100 120", (10, 0), True),
    ],
)
def test_what_a_build_runs_on(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert backends.serves(archs, capability) == runs


@pytest.mark.parametrize(
    ("runtime", "driver", "old"),
    [
        (13000, 12080, True),
        (13990, 12000, True),
        (12000, 11990, True),
        (13010, 13000, False),  # the same major version: NVIDIA's minor version compatibility
        (12990, 12000, False),
        (12990, 13000, False),
        (12080, 13010, False),
    ],
)
def test_a_driver_older_than_the_runtime(
    fresh: pytest.MonkeyPatch, runtime: int, driver: int, old: bool
) -> None:
    pretend(fresh, cuda="13.0", device=True)
    fresh.setattr(_FakeModule, "versions", lambda self: (runtime, driver))
    found = rows()["cuda"]
    assert found.available != old
    if old:
        built, supports = str(runtime)[:2], str(driver)[:2]
        assert found.reason == f"built with CUDA {built}, the driver supports CUDA {supports}"
        assert "update the driver" in found.remedy


@pytest.mark.parametrize(
    ("cuda", "package"),
    [("12.8", "cupy-cuda12x"), ("13.0", "cupy-cuda13x"), (None, "cupy-cuda13x")],
)
def test_the_cupy_of_this_torch_is_named(
    fresh: pytest.MonkeyPatch, cuda: str | None, package: str
) -> None:
    pretend(fresh, cuda=cuda, device=True)

    def broken() -> tuple[int, int]:
        raise RuntimeError("cannot find libnvrtc.so")

    fresh.setattr(importlib.import_module("cupy.cuda").nvrtc, "getVersion", broken)
    found = rows()["nvrtc"]
    assert found.reason == "CuPy finds no NVRTC: cannot find libnvrtc.so"
    assert found.remedy == f"pip install '{package}[ctk]'"
    hide(fresh, "cupy.cuda")
    backends._made.clear()
    assert rows()["nvrtc"].remedy == f"pip install {package}"


@needs_cpu
def test_only_gpus_need_a_launch_plan(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, cuda="13.0", device=True)
    fresh.setattr(_FakeModule, "map", lambda *args: None, raising=False)
    for name, device, gpu in (
        ("cpu", "cpu", False), ("cuda", "cuda", True), ("nvrtc", "cuda", True),
    ):  # fmt: skip
        found = backends.kernels(name)
        assert (found.name, found.device_type, found.gpu) == (name, device, gpu)


def test_a_source_folder_says_so(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python started in a clone imports the clone, which has no extensions."""
    hide(fresh, "snnkernels._cpu")
    (tmp_path / "setup.py").touch()
    fresh.setattr(backends, "_FOLDER", tmp_path / "snnkernels")
    assert "this is the source folder" in rows()["cpu"].remedy


def test_nvrtc_serves_where_the_extension_is_missing(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, cuda="13.0", device=True)
    inner = importlib.import_module

    def no_cuda(name: str, package: str | None = None) -> Any:
        if name == "snnkernels._cuda":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return inner(name, package)

    fresh.setattr(importlib, "import_module", no_cuda)
    assert backends.choose(torch.device("cuda:0")).name == "nvrtc"


# ---- one call is one launch ----------------------------------------------------------------------


class Counting:
    """A back end that writes nothing and keeps what it was handed."""

    def __init__(self, gpu: bool) -> None:
        self.launches: list[tuple[str, bytes, torch.device]] = []
        self.kernels = spy("counting", lambda *launch: self.launches.append(launch), gpu)

    def take(self) -> list[str]:
        names = [name for name, _, _ in self.launches]
        self.launches.clear()
        return names


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"])
def counting(fresh: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Counting:
    counter = Counting(request.param)
    fresh.setitem(backends._MAKERS, "counting", lambda: counter.kernels)
    backends.set_backend("counting")
    return counter


def test_a_call_is_one_launch(counting: Counting) -> None:
    x = torch.zeros(17, 2, 3, 4)
    th = torch.ones(3)
    for call in (
        lambda: if_multi_step(x),
        lambda: if_multi_step(x, "half", th, channel_dim=1, amplitude="threshold"),
        lambda: if_multi_step(x, 0.5, v_reset=0.0, store_v_seq=True, tie=">", input_scale=2.0),
        lambda: if_multi_step(x[0], T=1000),
        lambda: if_multi_step(x.transpose(1, 2), spike_dtype=torch.uint8),
        lambda: if_count(x),
        lambda: if_rate(x),
        lambda: if_step(x[0]),
        lambda: IFNode()(x),
        lambda: IFNode(output="count")(x),
    ):
        call()
        assert len(counting.take()) == 1


def test_a_backward_is_one_launch(counting: Counting) -> None:
    x = torch.zeros(200, 2, 3, requires_grad=True)
    th = torch.ones(3, requires_grad=True)
    for call in (
        lambda: if_multi_step(x)[0],
        lambda: if_multi_step(x, "half", th, channel_dim=1, v_reset=0.0)[0],
        lambda: if_rate(x)[0],
        lambda: IFNode(learn_threshold=True)(x),
    ):
        call().sum().backward()
        forward, backward = counting.take()
        assert forward.startswith(("forward", "general"))
        assert backward.startswith("backward")


def test_nothing_is_launched_for_nothing(counting: Counting) -> None:
    if_multi_step(torch.zeros(3, 0, 2))
    if_count(torch.zeros(0), T=3)
    assert counting.take() == []


def test_the_device_is_handed_over(counting: Counting) -> None:
    if_multi_step(torch.zeros(3, 2))
    assert counting.launches[0][2] == torch.device("cpu")


def test_the_packed_bytes_are_the_struct(counting: Counting) -> None:
    x = torch.zeros(5, 4, requires_grad=True)
    if_multi_step(x)[0].sum().backward()
    if_multi_step(x, v_reset=0.0)[0].sum().backward()
    sizes = {
        "forward": params.IF_FORWARD.itemsize,
        "general": params.IF_GENERAL.itemsize,
        "backward": params.IF_BACKWARD.itemsize,
        "backward_general": params.IF_BACKWARD_GENERAL.itemsize,
    }
    # A GPU's plan may send a plain call to the general kernel.
    assert {"general", "backward_general"} <= {name for name, _, _ in counting.launches}
    for name, packed, _ in counting.launches:
        assert len(packed) == sizes[name]
