"""Shared by the kernel tests: cases, layouts of memory, the comparison of bits, the host shim."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import snnkernels
from snnkernels import surrogate
from snnkernels.kernels import backends, reference

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(snnkernels.__file__).resolve().parent
# The kernel sources of the copy under test.
CSRC = PACKAGE / "_csrc" if (PACKAGE / "_csrc" / "params.h").exists() else ROOT / "csrc"
PURE = os.environ.get("SNNKERNELS_TEST_PURE") == "1"
# Set where everything optional is installed, so that nothing is left out unseen.
ALL = os.environ.get("SNNKERNELS_TEST_ALL") == "1"

# The profile of hypothesis (conftest.py), and how many examples a fuzz test draws.
HYPOTHESIS = (
    os.environ.get("SNNKERNELS_HYPOTHESIS") or os.environ.get("HYPOTHESIS_PROFILE") or "default"
)
FUZZ = {"ci": 200, "thorough": 2000, "nightly": 20_000}.get(HYPOTHESIS, 50)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# With kernels of their own in the plain neuron, and those of the general kernel.
PLAIN_SURROGATES = ("atan", "sigmoid", "triangle", "rectangle")
SURROGATES = (*PLAIN_SURROGATES, "superspike", "exponential", "erf", "periodic_exponential")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_id(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def optional(module: str) -> Any:
    """The module; without it the test is skipped, or fails with SNNKERNELS_TEST_ALL=1.

    At the top of a file it is the file that is skipped.
    """
    return importlib.import_module(module) if ALL else pytest.importorskip(module)


# Older compilers of torch raise where neurons are compiled or exported.
compiles = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="torch.compile and torch.export of neurons are supported from torch 2.11 on",
)


# ---- comparing ---------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers, so that -0.0 differs from 0.0."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(_INTEGERS[tensor.element_size()])


def assert_same_bits(got: Tensor, want: Tensor, what: str = "output") -> None:
    """Same dtype, shape and bits; where both are NaN any NaN will do."""
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, expected {tuple(want.shape)}"
    differ = bits(got) != bits(want)
    if got.dtype.is_floating_point:
        differ &= ~(got.detach().cpu().isnan() & want.detach().cpu().isnan())
    if bool(differ.any()):
        at = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} elements differ, first at {at}: "
            f"{got.detach()[at].item()!r}, expected {want.detach()[at].item()!r}"
        )


def assert_close(
    got: Tensor, want: Tensor, rtol: float, what: str = "gradient", scale: float = 0.0
) -> None:
    """Largest error against the largest magnitude of ``want`` (or ``scale`` if that is larger)."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert bool(torch.isfinite(got).all()), f"{what}: not finite"
    error, scale = (got - want).abs().max().item(), max(scale, want.abs().max().item())
    assert error <= rtol * scale, f"{what}: error {error:.3e} at magnitude {scale:.3e}"


# ---- what is tested ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """One implementation, the device of its tensors, and for "cpu" the SIMD level."""

    name: str
    device: str = "cpu"
    isa: str | None = None

    def __str__(self) -> str:
        return self.name if self.isa is None else f"{self.name}-{self.isa}"


def extension(name: str) -> ModuleType | None:
    """The compiled extension ``_cpu`` or ``_cuda`` of the copy under test, or None."""
    try:
        return backends.extension(name)
    except backends.Missing:
        return None


def compiler() -> list[str] | None:
    """The C++ compiler, as setup.py chooses it."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    return command if shutil.which(command[0]) else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    named = os.environ.get("NVCC", "nvcc")
    return shutil.which(named) or shutil.which("nvcc", path=str(Path(home) / "bin"))


def in_a_process(
    code: str, *options: str, timeout: float | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python code, with options of the interpreter, and the copy of the package under test."""
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        cwd=sys.prefix,  # in a clone, python -c would import the source folder
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def check_call(command: Iterable[str | Path], **options: Any) -> str:
    """Runs a command; its output, or an AssertionError that shows it."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{done.args} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


# ---- the GPU kernels on the CPU ----------------------------------------------------------------


class HostShim:
    """csrc/launch.cu and bind_cuda.cpp built for the CPU over tests/host_shim, and its log."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("_cuda", path)
        assert spec is not None
        assert spec.loader is not None
        self.path = path
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._runtime = ctypes.CDLL(str(path))
        self._runtime.shim_take_log.restype = ctypes.c_char_p

    def take_log(self) -> list[str]:
        """What was asked of the CUDA runtime since the last call of this."""
        return self._runtime.shim_take_log().decode().splitlines()

    def fail(self, call: str, error: int) -> None:
        """Lets ``call`` return ``error`` (0: succeed again)."""
        self._runtime.shim_fail(call.encode(), error)

    @property
    def device(self) -> int:
        """The current device."""
        return self._runtime.shim_device()

    def kernel_names(self) -> dict[int, str]:
        """Every kernel in the module: offset -> name as NVRTC spells it."""
        names = {}
        for line in check_call(["nm", "-C", self.path]).splitlines():
            address, _, name = line.partition(" ")
            # g++ may split a cold part off, marked as a clone.
            found = re.search(r"\bsnn::if_\w+<[^()]*>(?=\(snn::IF\w+\)$)", name)
            if found and address.strip():
                names[int(address, 16)] = found[0]
        return names

    def kernels(self) -> backends.Kernels:
        """The back end "host_shim": GPU launch plans, CPU tensors."""

        def run(launch: Any) -> backends.Launch:
            return lambda packed, device: launch(packed, 0, 0)

        launches = backends.entries(self.module, run)

        def small(name: str, packed: bytes, device: torch.device) -> None:
            self.module.map(name, packed, 0, 0)

        return backends.Kernels("host_shim", "cpu", True, **launches, map=small)


def spy(
    name: str, note: Callable[[str, bytes, torch.device], object], gpu: bool
) -> backends.Kernels:
    """A back end for CPU tensors that tells ``note`` which kernel was launched with what."""

    def launch(kernel: str) -> backends.Launch:
        return lambda packed, device: note(kernel, packed, device) and None

    kernels = ("forward", "general", "backward", "backward_general")
    return backends.Kernels(name, "cpu", gpu, *map(launch, kernels))


SHIM_FLAGS = "-O1 -std=c++17 -fPIC -fvisibility=hidden -g0 -Wall -Wextra -Werror -ffp-contract=off"


def build_host_shim(cache: Path) -> HostShim:
    """Builds the shim under ``cache``, once per content of the sources."""
    import pybind11

    command = compiler()
    assert command is not None
    here = Path(__file__).resolve().parent / "host_shim"
    sources = sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *here.iterdir()])
    sources += [CSRC / name for name in ("launch.cu", "bind_cuda.cpp")]
    sources += [CSRC / name for name in ("maps_launch.cu", "bind_maps_cuda.cpp")]
    digest = hashlib.sha256(repr((command, SHIM_FLAGS, sysconfig.get_platform())).encode())
    for source in sources:
        digest.update(source.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    digest.update(f"{suffix} {pybind11.__version__}".encode())
    folder = cache / digest.hexdigest()[:16]
    built = folder / f"_cuda{suffix}"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        base = [*command, *SHIM_FLAGS.split(), f"-I{here}", f"-I{CSRC}"]
        headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        jobs = {
            "launch.o": ["-x", "c++", CSRC / "launch.cu"],
            "maps_launch.o": ["-x", "c++", CSRC / "maps_launch.cu"],
            "bind.o": [*headers, CSRC / "bind_cuda.cpp"],
            "bind_maps.o": [*headers, CSRC / "bind_maps_cuda.cpp"],
            "runtime.o": [here / "runtime.cpp"],
        }
        running = [
            subprocess.Popen(
                [str(word) for word in (*base, *words, "-c", "-o", folder / name)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for name, words in jobs.items()
        ]
        for job in running:
            output = job.communicate()[0]
            assert job.returncode == 0, f"the host shim does not build:\n{output}"
        # Under another name first: a build that was cut short must not be found next time.
        part = folder / "part.so"
        check_call([*command, "-shared", *(folder / name for name in jobs), "-o", part])
        part.rename(built)
    return HostShim(built)


# ---- cases -------------------------------------------------------------------------------------


def from_values(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def currents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Half multiples of 1/8, so that thresholds are met exactly, half normal numbers."""
    g = generator(seed)
    grid = torch.randint(-8, 17, shape, generator=g) / 8
    noise = torch.randn(shape, generator=g, dtype=torch.float64) * 0.7 + 0.3
    return torch.where(torch.rand(shape, generator=g) < 0.5, grid.double(), noise).to(dtype)


def sixteenths(*shape: int, scale: float = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers rounded so that many sums land on the threshold, from torch's generator."""
    return (torch.randn(*shape) * scale).round().div(16).to(dtype)


def dyadic(*shape: int, seed: int = 0, low: int = -16, high: int = 24, scale: int = 16) -> Tensor:
    """Multiples of 1/scale in float64: sums of thousands are exact in float32."""
    return torch.randint(low, high + 1, shape, generator=generator(seed)).double() / scale


LAYOUTS = ("contiguous", "transposed", "step2", "expanded", "narrow", "misaligned")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` (for "expanded" its first slice, repeated) in another memory layout."""
    if layout == "transposed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    if layout == "step2":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded":
        return x[..., :1].expand(x.shape)
    if layout == "narrow":
        flat = torch.full((x.numel() + 2,), float("nan"), dtype=x.dtype)
        flat[1:-1] = x.reshape(-1)
        return flat[1:-1].view(x.shape)
    if layout == "misaligned" and x.numel():
        raw = bytearray(1) + bytearray(x.contiguous().view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(raw, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
    return x.clone()


SHAPES = (
    (1,), (19,), (99,), (128,), (129,), (989,), (2, 3), (3, 5, 4), (2, 4, 3, 8), (2, 8, 4, 4),
    (0,), (3, 0, 2), (),
)  # fmt: skip
STEPS = (0, 1, 2, 3, 7, 8, 9, 33, 200)
FORMS = ("number", "0-d", "ones", "channel", "position", "full", "runs", "strided", "float64")


@dataclass(frozen=True)
class Case:
    """One call of if_multi_step, as words; :func:`build` makes the tensors."""

    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (99,)
    layout: str = "contiguous"
    steps: int = 9
    constant: bool = False
    threshold: str = "number"
    v: str = "number"
    amplitude: str = "none"
    input_scale: str = "none"
    v_reset: float | None = None
    tie: str = ">="
    uint8: bool = False
    trace: str = "none"
    out: bool = False

    def __str__(self) -> str:
        default = Case()
        words = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)]
        return "Case(" + ", ".join(words) + ")"


def operand(form: str, shape: tuple[int, ...], values: Callable[..., Tensor]) -> Any:
    """An argument in the given form; ``values(*shape)`` draws float32 elements."""
    if form == "number":
        return values(1).double().item()
    if form == "0-d":
        return values(1).reshape(())
    if form == "ones":
        return values(*(1 for _ in shape))
    if form == "channel":
        return values(shape[min(1, len(shape) - 1)]) if shape else values(1).reshape(())
    if form == "position":
        return values(*shape[1:]) if len(shape) > 1 else values(*shape)
    if form == "runs" and len(shape) == 4:
        return values(shape[0], 1, *shape[2:])
    if form == "strided":
        return laid_out(values(*shape), "transposed")
    if form == "float64":
        return values(*shape).double() * (1 + 1e-9)
    return values(*shape)


def expanded(value: Any, form: str, shape: tuple[int, ...]) -> Tensor:
    """What every neuron should read, independently of snnkernels' own broadcasting."""
    if not isinstance(value, Tensor):
        return torch.full(shape, value, dtype=torch.float64)
    if form == "channel" and len(shape) > 1:
        value = value.reshape(-1, *(1 for _ in shape[2:]))
    return torch.broadcast_to(value, shape).contiguous()


@dataclass
class Built:
    """Tensors of a case: the call's arguments and the operands as every neuron reads them."""

    case: Case
    x: Tensor
    arguments: dict[str, Any]
    v: Tensor
    threshold: Tensor
    amplitude: Tensor
    input_scale: Tensor | None

    def reference(self) -> reference.Result:
        """The truth, through none of the code that checks, broadcasts or packs arguments."""
        c = self.case
        with torch.no_grad():
            return reference.if_forward(
                self.x.clone(memory_format=torch.contiguous_format),
                self.v,
                self.threshold,
                self.amplitude,
                T=c.steps if c.constant else None,
                input_scale=self.input_scale,
                v_reset=c.v_reset,
                strict=c.tie == ">",
                spike_dtype=torch.uint8 if c.uint8 else c.dtype,
            )


@lru_cache(maxsize=4096)
def built(case: Case, seed: int = 0) -> tuple[Built, reference.Result]:
    """The tensors of a case and the truth, once for all back ends."""
    result = build(case, seed)
    return result, result.reference()


def build(case: Case, seed: int = 0) -> Built:
    c, shape = case, case.shape
    full = shape if c.constant else (c.steps, *shape)
    x = laid_out(currents(*full, seed=seed, dtype=c.dtype), c.layout if full else "contiguous")
    g = generator(seed + 1)

    def around(centre: float, grid: float = 0.125) -> Callable[..., Tensor]:
        def draw(*size: int) -> Tensor:
            return centre + grid * torch.randint(-3, 4, size, generator=g)

        return draw

    def odd(*size: int) -> Tensor:
        return torch.rand(size, generator=g) * 1.3 + 0.1  # not exact in half precision

    threshold = operand(c.threshold, shape, around(1.0))
    v = "half" if c.v == "half" else operand(c.v, shape, around(0.25))
    arguments: dict[str, Any] = {"v": v, "v_threshold": threshold, "v_reset": c.v_reset}
    th = expanded(threshold, c.threshold, shape)
    v_full = th / 2 if c.v == "half" else expanded(v, c.v, shape)
    amplitude = torch.ones(shape, dtype=torch.float64)
    if c.amplitude == "threshold":
        arguments["amplitude"], amplitude = "threshold", th
    elif c.amplitude != "none":
        arguments["amplitude"] = operand(c.amplitude, shape, odd)
        amplitude = expanded(arguments["amplitude"], c.amplitude, shape)
    scale = None
    if c.input_scale != "none":
        arguments["input_scale"] = operand(c.input_scale, shape, odd)
        scale = expanded(arguments["input_scale"], c.input_scale, shape)
    if "channel" in (c.threshold, c.v, c.amplitude, c.input_scale) and shape:
        arguments["channel_dim"] = min(1, len(shape) - 1)
    if c.constant:
        arguments["T"] = c.steps
    if c.tie != ">=":
        arguments["tie"] = c.tie
    if c.uint8:
        arguments["spike_dtype"] = torch.uint8
    if c.trace != "none":
        arguments[f"store_{c.trace}"] = True
    return Built(c, x, arguments, v_full, th, amplitude, scale)


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device != "cpu" else value


def possible(case: Case) -> Case:
    """The nearest case that is legal."""
    if case.constant and case.steps == 0:
        case = replace(case, steps=1)
    if case.layout == "misaligned" and case.dtype == torch.float16 and not case.shape:
        case = replace(case, layout="contiguous")
    return case


def sampled(count: int, seed: int, **fixed: Any) -> list[Case]:
    """``count`` cases drawn from the whole grid."""
    r = random.Random(seed)
    cases = []
    for _ in range(count):
        drawn = Case(
            dtype=r.choice(DTYPES),
            shape=r.choice(SHAPES),
            layout=r.choice(LAYOUTS),
            steps=r.choice(STEPS[:-1]),
            constant=r.random() < 0.25,
            threshold=r.choice(FORMS),
            v=r.choice((*FORMS, "half", "half")),
            amplitude=r.choice(("none", "none", "threshold", *FORMS)),
            input_scale=r.choice(("none", "none", "none", *FORMS)),
            v_reset=r.choice((None, None, None, 0.0, -0.25)),
            tie=r.choice((">=", ">=", ">=", ">")),
            uint8=r.random() < 0.25,
            trace=r.choice(("none", "none", "v_seq", "charge_seq")),
            out=r.random() < 0.25,
        )
        cases.append(possible(replace(drawn, **fixed)))
    return cases


def plain_cases(dtype: torch.dtype) -> list[Case]:
    """Every shape with every T, then every layout and every form on a few shapes: no options."""
    base = Case(dtype=dtype)
    cases = [replace(base, shape=s, steps=t) for s in SHAPES for t in STEPS[:-1]]
    cases += [replace(base, shape=s, steps=STEPS[-1]) for s in ((19,), (128,), (3, 5, 4))]
    cases += [
        replace(base, shape=s, layout=layout, constant=constant)
        for s in ((128,), (3, 5, 4), (2, 8, 4, 4))
        for layout in LAYOUTS
        for constant in (False, True)
    ]
    cases += [
        replace(base, shape=s, threshold=th, v=v, constant=constant, uint8=uint8, steps=5)
        for s in ((129,), (2, 3), (2, 8, 4, 4))
        for th in FORMS
        for v in ("half", th)
        for constant in (False, True)
        for uint8 in (False, True)
    ]
    cases += [
        replace(base, shape=s, amplitude=a, threshold=th, steps=5)
        for s in ((256,), (2, 8, 4, 4))
        for a in ("threshold", *FORMS)
        for th in ("number", "channel")
    ]
    return [possible(c) for c in cases]


def surrogate_of(name: str) -> surrogate.Surrogate:
    return surrogate.resolve(name)


@contextlib.contextmanager
def at_level(name: str) -> Iterator[None]:
    """The CPU extension at a SIMD level; ``"reference"``: plain PyTorch."""
    if name == "reference":
        with backends.use_backend("reference"):
            yield
        return
    before = extension("_cpu").isa()
    extension("_cpu").set_isa(name)
    try:
        yield
    finally:
        extension("_cpu").set_isa(before)
