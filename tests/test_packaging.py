"""The package as a whole: layout of params, what an import does, floors, one OpenMP, sanitizers."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support import (
    CSRC,
    PACKAGE,
    PURE,
    ROOT,
    HostShim,
    check_call,
    compiler,
    extension,
    in_a_process,
    optional,
)

from snnkernels.kernels import backends, params, reference

# ---- params.h and its mirror ---------------------------------------------------------------------


def layout_of(dtype: np.dtype) -> dict[str, int]:
    assert dtype.fields is not None
    return {"": dtype.itemsize, **{name: field[1] for name, field in dtype.fields.items()}}


def flat_fields(dtype: np.dtype, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The way to every number of a record, in order."""
    if dtype.names:
        return [p for name in dtype.names for p in flat_fields(dtype[name], (*path, name))]
    if dtype.shape:
        return [(*path, i) for i in range(dtype.shape[0])]
    return [path]


def same_layout(module: ModuleType) -> None:
    assert {
        "Operand": layout_of(params.OPERAND),
        "Rows": layout_of(params.ROWS),
        "IFForward": layout_of(params.IF_FORWARD),
        "IFGeneral": layout_of(params.IF_GENERAL),
        "IFBackward": layout_of(params.IF_BACKWARD),
        "IFBackwardGeneral": layout_of(params.IF_BACKWARD_GENERAL),
    } == module.LAYOUT


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_layout_of_the_extensions(name: str) -> None:
    module = extension(name)
    if module is None:
        pytest.skip(f"snnkernels.{name} is not installed")
    same_layout(module)


@pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: nothing is compiled")
def test_layout_of_the_sources(host_shim: HostShim) -> None:
    same_layout(host_shim.module)


def test_packed_bytes_are_the_numpy_records() -> None:
    plain, backward = params.pack_forward, params.pack_backward
    for packs, dtype in (
        ((plain,), params.IF_FORWARD),
        ((plain, params.pack_general), params.IF_GENERAL),
        ((backward,), params.IF_BACKWARD),
        ((backward, params.pack_backward_general), params.IF_BACKWARD_GENERAL),
    ):
        paths = flat_fields(dtype)
        record = np.zeros((), dtype)
        values: list[float] = []
        for i, path in enumerate(paths):
            inner = record
            for step in path[:-1]:
                inner = inner[step]
            values.append(i + 0.5 if np.asarray(inner[path[-1]]).dtype.kind == "f" else i + 1)
            inner[path[-1]] = values[-1]
        # A general struct is the plain one and what follows it.
        base = len(flat_fields(dtype["base"])) if len(packs) > 1 else 0
        parts = (values[:base], values[base:]) if base else (values,)
        packed = b"".join(pack(*part) for pack, part in zip(packs, parts, strict=True))
        assert packed == record.tobytes()


def test_codes_are_those_of_params_h() -> None:
    text = (CSRC / "params.h").read_text()
    code = {name: int(value) for name, value in re.findall(r"\b(k\w+) = (\d+)", text)}
    for name, dtype in (
        ("kFloat32", torch.float32),
        ("kFloat64", torch.float64),
        ("kFloat16", torch.float16),
        ("kBFloat16", torch.bfloat16),
    ):
        assert params.DTYPE_CODES[dtype] == code[name]
    options = (
        "Strict HardReset InputScale DetachReset Smooth Beta Bias FireLevel Burst Signed Mask "
        "ProbeMask ProbeShift Parallel ResetDelay Clip"
    )
    for option in options.split():
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", option).upper()
        assert getattr(params, name) == code[f"k{option}"]
    assert code["kChunk"] == params.CHUNK
    assert code["kCountTimes"] == params.COUNT_TIMES
    assert code["kWordSteps"] == reference.WORD_STEPS
    from snnkernels import surrogate

    for cls in surrogate.BY_KIND:
        assert code[f"k{cls.__name__}"] == cls.kind
        assert surrogate.BY_KIND[cls.kind] is cls


# ---- importing -----------------------------------------------------------------------------------


def test_import_is_lean() -> None:
    code = (
        "import subprocess, sys, warnings; warnings.simplefilter('error')\n"
        "import torch\n"
        "def never(*a, **k): raise AssertionError(f'a process was started: {a}')\n"
        "subprocess.Popen.__init__ = never\n"
        "before = set(sys.modules)\n"
        "import snnkernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'cupy', 'matplotlib', 'sklearn', 'rich', 'triton', 'pandas', 'scipy', 'PIL',\n"
        "         'tqdm', 'safetensors', 'torchvision', 'spikingjelly', 'pytest'}\n"
        "assert not new & heavy, new & heavy\n"
        "assert 'snnkernels._cuda' not in sys.modules\n"
        "sys.stderr.write(snnkernels.__file__)\n"
    )
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    # Nothing but what the script itself wrote: the copy under test.
    assert done.stderr == str(PACKAGE / "__init__.py")


def test_public_names_exist_and_are_documented() -> None:
    import snnkernels

    for name in snnkernels.__all__:
        assert getattr(snnkernels, name).__doc__, name
    assert (PACKAGE / "py.typed").exists()


def test_kernel_sources_ship_without_framework_headers() -> None:
    """What a GPU compiles includes only our own headers."""
    for name in (
        "numeric.h",
        "params.h",
        "neuron.h",
        "kernels.cuh",
        "launch.h",
        "maps.h",
        "maps.cuh",
        "maps_launch.h",
    ):
        included = re.findall(r"#include\s+(\S+)", (CSRC / name).read_text())
        assert all(re.fullmatch(r'"[\w.]+"', i) for i in included), (name, included)
    for path in CSRC.iterdir():
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            assert "torch/" not in path.read_text()
            assert "ATen" not in path.read_text()


# ---- floors --------------------------------------------------------------------------------------

# Data falls through the floors: a module imports its own floor and those below.
FLOORS = {
    "surrogate": 0, "surrogate_foreign": 0, "options": 0, "bound": 0, "files": 0,
    "kernels.reference": 0, "kernels.maps_reference": 0, "_cpu": 0, "_cuda": 0, "_csrc": 0,
    "functional": 1, "maps": 1, "kernels": 1, "packed": 1, "memory": 1, "scan": 1,
    "distributed": 1,
    "joined": 2, "neurons": 2, "monitors": 2, "models": 2, "data": 2, "image_folder": 2,
    "state": 2,
    "conversion": 3, "metrics": 3,
    "engine": 4,
    "interop": 5, "compat": 5, "hub": 5,
    "cli": 6, "commands": 6, "plots": 6, "html_report": 6, "sweep": 6, "tensorboard": 6,
    "__main__": 6,
}  # fmt: skip


def floor(module: str) -> int:
    """The floor of a module below snnkernels, by its longest known prefix."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if (name := ".".join(parts[:n])) in FLOORS:
            return FLOORS[name]
    raise AssertionError(f"snnkernels.{module} has no floor: add it to FLOORS")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if module_name(path) and "_csrc" not in path.parts
}


def imports(name: str, path: Path) -> list[tuple[int, str]]:
    """Modules below snnkernels that a file imports anywhere, with line numbers."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [a.name for a in node.names if a.name.split(".")[0] == "snnkernels"]
            found += [(node.lineno, t.partition(".")[2]) for t in targets]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "snnkernels":
                base = []
            else:
                continue
            module = (node.module or "").split(".") if node.module else []
            if not node.level:
                module = module[1:]
            here = [*base, *module]
            for alias in node.names:
                full = ".".join([*here, alias.name])
                # A name inside a module counts as the module.
                found.append((node.lineno, full if full in MODULES else ".".join(here)))
    return [(line, target) for line, target in found if target]


def test_every_module_has_a_floor() -> None:
    assert MODULES
    for name in MODULES:
        floor(name)


@pytest.mark.parametrize("name", MODULES)
def test_floors_only_import_downwards(name: str) -> None:
    for line, target in imports(name, MODULES[name]):
        if target in FLOORS or target in MODULES:
            assert floor(target) <= floor(name), (
                f"{name}:{line} (floor {floor(name)}) imports {target} (floor {floor(target)})"
            )


def test_the_floor_walker_sees_imports() -> None:
    found = {target for _, target in imports("functional", MODULES["functional"])}
    assert {"options", "packed", "kernels.call", "kernels.spec"} <= found
    inner = {target for _, target in imports("kernels.backends", MODULES["kernels.backends"])}
    assert "kernels.nvrtc" in inner


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: no CPU extension")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime() -> None:
    code = (
        "import torch, snnkernels, re\n"
        "torch.set_num_threads(2)\n"
        "snnkernels.functional.if_count(torch.ones(8, 100_000))\n"
        "from snnkernels.kernels import backends\n"
        "assert backends.extension('_cpu').threads() == 2\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(sorted(set(re.findall(r'\\S*/lib(?:g|i|)omp[^/\\s]*', maps))))\n"
    )
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
    found = ast.literal_eval(done.stdout)
    assert len(found) == 1, found


# ---- sanitizers ----------------------------------------------------------------------------------

# Runs in a process with the sanitizers preloaded: shapes around the block size, every layout, every
# option, forward and backward, against the reference.
SANITIZED = """
import importlib.util, random, sys
import torch
spec = importlib.util.spec_from_file_location("snnkernels._cpu", {path!r})
module = importlib.util.module_from_spec(spec)
sys.modules["snnkernels._cpu"] = module
spec.loader.exec_module(module)
sys.path.insert(0, {tests!r})
import support, test_backward, test_forward, test_maps, test_spike_conv
import snnkernels
from snnkernels.kernels import backends
assert backends.extension("_cpu") is module
snnkernels.set_backend("cpu")
backend = support.Backend("cpu")
torch.set_num_threads(2)
for isa in module.isas():
    module.set_isa(isa)
    for case in support.sampled(150, seed=101):
        test_forward.check(backend, case)
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-10), (torch.bfloat16, 2e-2)):
        for case in test_backward.sampled(20, seed=103, dtype=dtype, alpha=0.5):
            test_backward.check(backend, case, rtol)
    for size in (70_001, 1_310_720):
        x = support.currents(4, size).requires_grad_()
        spikes = snnkernels.functional.if_multi_step(x)[0]
        torch.autograd.grad(spikes.sum(), x)
    for dtype in support.DTYPES:
        for shape, layout, form in test_maps.CASES[:-2:2]:
            for check in (
                test_maps.test_qcfs_bits, test_maps.test_dsr_bits, test_maps.test_ttfs_bits,
                test_maps.test_bit_plane_bits,
            ):
                check(backend, shape, layout, form, dtype)
        for pool in test_maps.POOLS:
            test_maps.test_pool_bits(backend, pool, dtype)
        test_maps.test_mmse_bits(backend, dtype)
        test_maps.test_histogram_bits(backend, dtype)
        for T in (7, 33, 64):
            test_maps.test_pack_and_unpack_bits(backend, T, dtype)
    test_maps.test_histogram_stays_inside_its_table(backend)
    test_maps.test_sums_over_whatever_is_shared(backend)
    for seed in range(0, 48, 3):
        test_spike_conv.test_every_level_is_the_reference(isa, seed)
    test_spike_conv.test_more_words_than_a_list_names(isa)
print("clean")
"""


def sanitizer_library(name: str) -> str | None:
    command = compiler()
    if command is None:
        return None
    found = check_call([*command, f"-print-file-name={name}"]).strip()
    return found if os.path.isabs(found) else None


@pytest.mark.slow
@pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: nothing is compiled")
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded the Linux way")
def test_sanitized_extension(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizers over the CPU extension.

    One SIMD level at -O1, which takes seconds; SNNKERNELS_TEST_THOROUGH=1 has setup.py build all.
    """
    asan, ubsan = sanitizer_library("libasan.so"), sanitizer_library("libubsan.so")
    if asan is None or ubsan is None:
        pytest.skip("the compiler has no libasan and libubsan")
    pybind11 = optional("pybind11")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = sorted(p for p in CSRC.iterdir() if p.suffix in (".h", ".cpp"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + suffix.encode())
    cache = getattr(request.config, "cache", None)
    folder = (cache.mkdir("sanitized") if cache else tmp_path) / digest.hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    if os.environ.get("SNNKERNELS_TEST_THOROUGH") == "1" and (ROOT / "setup.py").exists():
        built = folder / "all" / "snnkernels" / f"_cpu{suffix}"
        environment = {
            **os.environ,
            "SNNKERNELS_SANITIZE": "address,undefined",
            "SNNKERNELS_CPU": "1",
            "SNNKERNELS_CUDA": "0",
        }
        places = ["--build-lib", folder / "all", "--build-temp", tmp_path / "objects"]
        command = [sys.executable, "setup.py", "-q", "build_ext", *places]
        check_call(command, cwd=ROOT, env=environment)
    else:
        built = folder / f"_cpu{suffix}"
        if not built.exists():
            flags = [
                "-O1",
                "-g1",
                "-std=c++17",
                "-fPIC",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-fopenmp",
                "-fno-trapping-math",
                "-fsanitize=address,undefined",
                "-fno-omit-frame-pointer",
            ]
            headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
            part = folder / "part.so"
            check_call(
                [
                    *(compiler() or []), *flags, *headers, "-DSNN_ISA=baseline", "-shared",
                    CSRC / "cpu_isa.cpp", CSRC / "bind_cpu.cpp", CSRC / "maps_isa.cpp",
                    CSRC / "bind_maps_cpu.cpp", CSRC / "spike_conv_isa.cpp",
                    CSRC / "bind_spike_conv_cpu.cpp", "-o", part,
                ]
            )  # fmt: skip
            part.rename(built)
    done = in_a_process(
        SANITIZED.format(path=str(built), tests=str(Path(__file__).parent)),
        LD_PRELOAD=f"{asan} {ubsan}",
        # Python and torch never free what they keep for the life of the process.
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "clean"
    assert "runtime error" not in done.stderr, done.stderr[-4000:]


# ---- documented promises of the reference --------------------------------------------------------


def test_reference_needs_only_torch_and_surrogates() -> None:
    used = {target for _, target in imports("kernels.reference", Path(reference.__file__))}
    assert used <= {"surrogate", "options", "kernels", ""}


def test_backend_names_are_documented() -> None:
    assert backends.NAMES == ("auto", "cpu", "cuda", "nvrtc", "reference")
    assert backends.set_backend.__doc__ is not None
    for name in backends.NAMES:
        assert name in backends.set_backend.__doc__


def test_what_mutation_testing_names_is_there() -> None:
    """A module or test that is renamed would otherwise show late in a run of `.ci/mutation`."""
    settings = ROOT / ".ci" / "mutation.toml"
    if not settings.exists():
        pytest.skip("the source distribution has no .ci")
    text = settings.read_text(encoding="utf-8")
    modules = re.findall(r'^"(\S+)" = \[', text, re.M)
    tests = re.findall(r'^    "(tests/[^":]+)(?:::(\w+))?",', text, re.M)
    assert len(modules) >= 5
    assert len(tests) == text.count('"tests/')
    for module in modules:
        assert (ROOT / module).is_file(), module
    for file, name in tests:
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), (file, name)
