"""ThreadSanitizer over the CPU extension: threads of one call, and calls of several Python threads.

It cannot see libgomp's barriers and would report races that there are none, so the extension is
linked with OpenMP's entry points over plain threads (tests/host_shim/omp_threads.cpp): the same
kernels, checks, partitions and atomics, with another team behind ``#pragma omp parallel``. What is
not covered is libgomp itself.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import CSRC, PACKAGE, PURE, check_call, compiler, optional
from test_packaging import sanitizer_library

SHIM = Path(__file__).parent / "host_shim" / "omp_threads.cpp"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: nothing is compiled"),
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer is preloaded the Linux way"),
]

LOAD = """
import ctypes, importlib.util, sys, threading
import torch
torch.set_num_threads(1)  # torch's own OpenMP would be reported
path = {path!r}
spec = importlib.util.spec_from_file_location("snnkernels._cpu", path)
module = importlib.util.module_from_spec(spec)
sys.modules["snnkernels._cpu"] = module
spec.loader.exec_module(module)
"""

RACE = LOAD + "print(ctypes.CDLL(path).shim_race(int(sys.argv[1])))"

# Every kernel that splits its work, above the size at which it does; a backward pass whose sums are
# shared; calls from four Python threads at once.
EVERYTHING = (
    LOAD
    + """
import snnkernels
from snnkernels import functional, maps
from snnkernels.kernels import backends
from snnkernels.options import Probe, Signed
assert backends.extension("_cpu") is module
assert module.threads() == 4
snnkernels.set_backend("cpu")
def current(*shape):
    return torch.linspace(0, 1.3, torch.Size(shape).numel()).view(shape)
wide = current(4, 70_001)
for x in (wide, wide.bfloat16(), current(70_001, 4).t()):
    functional.if_run(x, "half", outputs=("spikes", "packed", "count"))
    functional.if_multi_step(x, torch.full((70_001,), 0.5), torch.full((70_001,), 1.1))
for options in (
    {"beta": 0.5, "bias": 0.1, "v_reset": 0.0}, {"max_spikes": 3}, {"signed": Signed(high=4)},
    {"mask": current(70_001) > 0.5}, {"probe": Probe(2)}, {"probe": Probe(2, "shift")},
    {"parallel": True}, {"outputs": ("v_seq", "charge_seq"), "count_at": (1, 3)},
):
    functional.if_run(wide, **options)
for given in ({}, {"v_reset": 0.0}, {"save": "trace"},
              {"save": "bits", "surrogate_function": "rectangle"}):
    leaves = [t.clone().requires_grad_() for t in
              (current(4, 70, 1000), torch.full((70,), 1.0), torch.zeros(70, 1000))]
    spikes, v, _ = functional.if_multi_step(leaves[0], leaves[2], leaves[1], channel_dim=0, **given)
    torch.autograd.grad(spikes.sum() + v.sum(), leaves)
x = current(2, 150_000)
theta = torch.tensor([0.5, 0.9])[:, None].requires_grad_()
y = x.clone().requires_grad_()
torch.autograd.grad(maps.qcfs(y, theta, 4).sum(), (y, theta))
maps.cumulative_max_pool(current(4, 2, 4, 96, 96), 3, 2, 1)
maps.dsr_backward(current(4, 70_001), current(4, 70_001), 1.0)
maps.mmse_errors(x, current(2, 3) + 0.1, 8)
counts, sums = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.float64)
maps.histogram_update(counts, sums, x, torch.full((2,), 8.0, dtype=torch.float64))
times = maps.ttfs_encode(current(300_000), 1.0, 9)
maps.ttfs_decode(times, 1.0, 9)
maps.bit_planes(current(300_000), 1.0, 4, planes=True)
words = maps.pack_bits(wide > 0.5)
maps.unpack_bits(words, 4)
maps.popcount(current(300_000)[None].to(torch.int32))
net = torch.nn.Sequential(
    torch.nn.Conv2d(2, 70, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
    torch.nn.Conv2d(70, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),
    torch.nn.Linear(8 * 25, 4))
image = current(3, 2, 12, 12)
snn = snnkernels.convert(net, image, T=4, progress=False)
def plans(precision):
    with torch.no_grad():
        snnkernels.lower(snn, precision=precision)(image)
for precision in ("float32", "int16", "int8"):
    plans(precision)
def work():
    functional.if_count(wide)
    plans("float32")
    maps.qcfs(x, 1.0, 4)
together = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in together]
[t.join() for t in together]
print("clean")
"""
)


@pytest.fixture(scope="module")
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension with ThreadSanitizer, one SIMD level at -O1; kept between sessions."""
    if sanitizer_library("libtsan.so") is None:
        pytest.skip("the compiler has no libtsan")
    pybind11 = optional("pybind11")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = sorted(p for p in CSRC.iterdir() if p.suffix in (".h", ".cpp"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in [*sources, SHIM]) + suffix.encode())
    cache = getattr(request.config, "cache", None)
    top = cache.mkdir("race_free") if cache else tmp_path_factory.mktemp("race_free")
    folder = top / digest.hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    built = folder / f"_cpu{suffix}"
    if not built.exists():
        names = ("cpu_isa", "bind_cpu", "maps_isa", "bind_maps_cpu", "spike_conv_isa")
        part = folder / "part.so"
        check_call(
            [
                *(compiler() or []), "-O1", "-g1", "-std=c++17", "-fPIC", "-fvisibility=hidden",
                "-ffp-contract=off", "-fopenmp", "-fno-trapping-math", "-fsanitize=thread",
                f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}",
                "-DSNN_ISA=baseline", "-shared", *(CSRC / f"{name}.cpp" for name in names),
                CSRC / "bind_spike_conv_cpu.cpp", SHIM, "-o", part,
            ]
        )  # fmt: skip
        part.rename(built)
    return built


def run(built: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", code.replace("{path!r}", repr(str(built))), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        cwd=sys.prefix,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "LD_PRELOAD": str(sanitizer_library("libtsan.so")),
            # Of Python and torch, which are not instrumented, nothing can be said.
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:exitcode=66:halt_on_error=1",
        },
    )


def test_races_are_seen(watched: Path) -> None:
    """A region that counts without an atomic is reported, with one it is not."""
    racy = run(watched, RACE, "0")
    if "unexpected memory mapping" in racy.stderr:
        pytest.skip("this kernel's address layout is not ThreadSanitizer's")
    assert racy.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in racy.stderr
    fine = run(watched, RACE, "1")
    assert fine.returncode == 0, fine.stderr[-4000:]
    assert fine.stdout.strip() == "4000"


def test_kernels_are_free_of_races(watched: Path) -> None:
    done = run(watched, EVERYTHING)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is not ThreadSanitizer's")
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.strip() == "clean"
