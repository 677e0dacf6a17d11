"""The GPU code compiles for every architecture: by nvcc and, as at run time, by NVRTC. No GPU."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import json
import os
import re
import subprocess
import warnings
from functools import lru_cache
from pathlib import Path

import pytest
from support import CSRC, PURE, check_call, extension, find_nvcc

from snnkernels.kernels import nvrtc

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: nothing is compiled"),
]

ARCHS = ("75", "80", "90", "100", "120")
# All kernels for all architectures take minutes: by default nvcc compiles all of them for sm_90,
# and NVRTC every fifth for each architecture, each from another start, so that between them none
# is left out. SNNKERNELS_TEST_THOROUGH=1 takes all.
THOROUGH = os.environ.get("SNNKERNELS_TEST_THOROUGH") == "1"


# Registers of every instance, by nvcc 13.0: an option that costs the plain path shows here.
TABLE = json.loads((Path(__file__).parent / "registers.json").read_text())


def check_kernels(log: str, names: dict[str, str], arch: str, toolkit: str) -> None:
    """Reads ``ptxas -v``: no stack frame, no spill, no register more than the table says.

    ``names``: instance by mangled name.
    """
    # NVRTC puts "ptxas ." before the lines that nvcc indents.
    entries = re.findall(
        r"Function properties for (\S+)\s+(?:ptxas\s*\.\s*)?(.*)\n.*?Used (\d+) registers", log
    )
    assert {mangled for mangled, _, _ in entries} == set(names), log[-2000:]
    # Another compiler may allocate a little differently, but not by much.
    slack = 1.0 if toolkit == "13.0" else 1.15
    column = TABLE["archs"].index(arch)
    for mangled, properties, registers in entries:
        name = names[mangled]
        assert properties.startswith(
            "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
        ), f"{name}: {properties}"
        allowed = TABLE["instances"][name][column]
        assert int(registers) <= allowed * slack, f"{name}: {registers} registers, not {allowed}"


def test_the_table_is_of_the_closed_list() -> None:
    assert set(TABLE["instances"]) == set(nvrtc.instances())
    for name, registers in TABLE["instances"].items():
        # 256 threads of 128 registers still leave two blocks to a multiprocessor. Training in
        # float64 with options is for tests.
        assert max(registers) <= (255 if "backward_general<double" in name else 128), name


# ---- nvcc ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def nvcc_archs() -> set[str]:
    nvcc = find_nvcc()
    if nvcc is None:
        return set()
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return set(re.findall(r"compute_(\d+)\b", listed.stdout))


@pytest.mark.parametrize("arch", ARCHS if THOROUGH else ["90"])
def test_nvcc(arch: str, tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    if arch not in nvcc_archs():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    done = subprocess.run(
        [
            nvcc, "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "-cubin",
            f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(tmp_path / "launch.cubin"),
            str(CSRC / "launch.cu"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning" not in done.stderr.lower()
    mangled = re.findall(r"Function properties for (\S+)", done.stderr)
    plain = check_call(["c++filt"], input="\n".join(mangled)).splitlines()
    names = [re.sub(r"^void |\(.*", "", name) for name in plain]
    release = re.search(r"release (\S+),", check_call([nvcc, "--version"]))
    check_kernels(
        done.stderr, dict(zip(mangled, names, strict=True)), arch, release[1] if release else "?"
    )
    assert sorted(names) == sorted(nvrtc.instances())


def test_the_extension_has_every_architecture() -> None:
    module = extension("_cuda")
    if module is None:
        pytest.skip("the CUDA extension is not installed: it was built without nvcc")
    if os.environ.get("SNNKERNELS_ARCHS"):
        pytest.skip("SNNKERNELS_ARCHS chose the architectures")
    # Whatever compiled it, the newest that today's toolkits share.
    assert {"75", "80", "90"} <= set(module.ARCHS.split())
    if known := nvcc_archs() & set(ARCHS):
        assert known <= set(module.ARCHS.split())


# ---- NVRTC ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """libnvrtc from PyPI's wheel, or the system's."""
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        paths = sorted(str(f.locate()) for f in files if re.search(r"libnvrtc[-.]", f.name))
        # The builtins first: the library looks for them by name.
        for path in paths:
            if "builtins" in path and ".alt." not in path:
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        for path in paths:
            if re.search(r"libnvrtc\.so\.\d+$", path):
                return ctypes.CDLL(path)
    found = ctypes.util.find_library("nvrtc")
    return ctypes.CDLL(found) if found else None


def compile_with_nvrtc(names: list[str], arch: str) -> tuple[bytes, list[str], str]:
    """Cubin, lowered names and log, from exactly what snnkernels hands to NVRTC."""
    lib = library()
    if lib is None:
        pytest.skip("NVRTC was not found: pip install nvidia-cuda-nvrtc")
    program = ctypes.c_void_p()

    def call(function: str, *arguments: object) -> None:
        error = getattr(lib, function)(*arguments)
        assert error == 0, f"{function}: error {error}"

    def text(kind: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{kind}", program, buffer)
        return buffer.raw

    source = nvrtc.source().encode()
    call("nvrtcCreateProgram", ctypes.byref(program), source, b"snnkernels.cu", 0, None, None)
    try:
        for name in names:
            call("nvrtcAddNameExpression", program, name.encode())
        flags = [*nvrtc.FLAGS, f"-arch=sm_{arch}", "--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
        error = lib.nvrtcCompileProgram(program, len(flags), array)
        log = text("ProgramLog").decode().rstrip("\0")
        assert error == 0, log[-3000:]
        lowered = []
        for name in names:
            pointer = ctypes.c_char_p()
            call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(pointer))
            lowered.append((pointer.value or b"").decode())
        return text("CUBIN"), lowered, log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc(arch: str) -> None:
    names = nvrtc.instances()
    if not THOROUGH:
        names = names[ARCHS.index(arch) :: len(ARCHS)]
    cubin, lowered, log = compile_with_nvrtc(names, arch)
    assert cubin[:4] == b"\x7fELF"
    assert len(set(lowered)) == len(names)
    for name in lowered:
        assert name.encode() in cubin
    assert "warning" not in log.lower()
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    version = f"{major.value}.{minor.value}"
    check_kernels(log, dict(zip(lowered, names, strict=True)), arch, version)


def test_nvrtc_source_includes_nothing() -> None:
    source = nvrtc.source()
    assert "#include" not in source
    assert "#pragma once" not in source
    for header in nvrtc._HEADERS:
        assert (CSRC / header).exists()


def test_flags_ask_for_the_same_arithmetic() -> None:
    assert "-fmad=false" in nvrtc.FLAGS
    assert "-ftz=false" in nvrtc.FLAGS
    assert not any("fast" in flag for flag in nvrtc.FLAGS)
    assert len(nvrtc.plain_instances()) <= 150


def test_through_cupy_as_at_run_time() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("cupy", reason="CuPy is not installed")
        name = nvrtc.instances()[0]
        cubin, (lowered,) = nvrtc.compile_cubin([name], "sm_90")
        assert lowered.encode() in cubin
        with pytest.raises(RuntimeError, match="NVRTC cannot compile for sm_90"):
            nvrtc.compile_cubin(["snn::if_forward<float, 3>"], "sm_90")
