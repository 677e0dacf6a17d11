"""Builds the extensions with ninja; needs neither torch nor a GPU.

Environment:
    SNNKERNELS_CUDA   auto (default: when nvcc is found) | 0 (never) | 1 (or fail)
    SNNKERNELS_CPU    auto (default: left out with a warning when it cannot be built) | 0 | 1
    SNNKERNELS_ARCHS  compute capabilities to compile for, e.g. "80 90" (default: all nvcc knows of
                      70 75 80 90 100 120)
    SNNKERNELS_SANITIZE  e.g. "address,undefined": an instrumented CPU extension, for tests
    CXX, NVCC         the compilers
    SOURCE_DATE_EPOCH the time (in seconds) of every file of a source distribution, whose bytes are
                      then the same wherever it is made
"""

import gzip
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Arithmetic must be the same everywhere: no contraction, no fast math. -fno-trapping-math changes
# no result; without it g++ does not turn `m >= theta ? theta : 0` into vector code below AVX-512.
HOST_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fopenmp",
]
DEVICE_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"],
}


def setting(name: str) -> str:
    """An auto | 0 | 1 switch from the environment."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value!r}: allowed are auto, 0 and 1")
    return value


def find_nvcc() -> str | None:
    """The nvcc to use, or None."""
    if setting("SNNKERNELS_CUDA") == "0":
        return None
    named = os.environ.get("NVCC")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which(named or "nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if nvcc is None and setting("SNNKERNELS_CUDA") == "1":
        raise SystemExit(
            "SNNKERNELS_CUDA=1 but nvcc was not found: put it on PATH or set CUDA_HOME"
        )
    return nvcc


class Cuda:
    """What an nvcc offers: where its toolkit lies and which architectures it compiles for."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        # Asking nvcc also works where it is a wrapper script far from its toolkit.
        dry = self.ask("--dryrun", "-c", "x.cu")
        top = re.search(r"^#\$ (?:_?TOP|TOP)=(.*)$", dry, re.M)
        if top is None:
            raise RuntimeError(f"{nvcc} --dryrun does not say where the toolkit lies")
        self.top = Path(top[1].strip())
        known = set(re.findall(r"compute_(\d+)\b", self.ask("--list-gpu-arch")))
        wanted = os.environ.get("SNNKERNELS_ARCHS", "70 75 80 90 100 120").split()
        self.archs = [a for a in wanted if a in known]
        if not self.archs:
            raise RuntimeError(f"{nvcc} knows none of SNNKERNELS_ARCHS={' '.join(wanted)}")

    def ask(self, *args: str) -> str:
        done = subprocess.run([self.nvcc, *args], capture_output=True, text=True, cwd=ROOT)
        return done.stdout + done.stderr

    @property
    def gencode(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        # PTX at 90 too: a device between 100 and 120 without a cubin cannot run PTX of 120.
        for a in sorted({"90", self.archs[-1]} & set(self.archs)):
            flags.append(f"-gencode=arch=compute_{a},code=compute_{a}")
        return flags

    @property
    def libraries(self) -> list[str]:
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (self.top / folder / "libcudart_static.a").exists():
                return [f"-L{self.top / folder}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        raise RuntimeError(f"libcudart_static.a is not below {self.top}")


def quote(words: list[str]) -> str:
    """Words as one ninja-safe shell command."""
    return " ".join(shlex.quote(str(w)) for w in words).replace("$", "$$")


class NinjaFile:
    """Collects build edges: objects from sources, shared objects from objects."""

    def __init__(self) -> None:
        self.lines = [
            "rule run",
            "  command = $cmd",
            "  description = $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cmd",
            "  description = $out",
        ]

    def edge(self, rule: str, out: Path, inputs: list[Path], command: list[str]) -> None:
        path = lambda p: str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
        self.lines.append(f"build {path(out)}: {rule} {' '.join(map(path, inputs))}")
        self.lines.append(f"  cmd = {quote(command)}")

    def compile(self, out: Path, source: Path, command: list[str]) -> Path:
        self.edge(
            "run", out, [source], [*command, "-MD", "-MF", f"{out}.d", "-c", source, "-o", out]
        )
        return out


def ninja() -> str:
    """The ninja executable: the PyPI package's, else one on PATH."""
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise RuntimeError("ninja was not found: pip install ninja") from None
        return found


class BuildExt(build_ext):
    """Hands all translation units to ninja at once: parallel, and only what changed."""

    def run(self) -> None:
        # What an earlier build left here would be packed into this wheel.
        for name in ("snnkernels._cpu", "snnkernels._cuda"):
            if name not in {ext.name for ext in self.extensions}:
                Path(self.build_lib, self.get_ext_filename(name)).unlink(missing_ok=True)
        for ext in self.extensions:
            name = ext.name.rsplit("_", 1)[1]
            try:
                self.build(ext, getattr(self, f"plan_{name}"))
            except Exception as error:
                Path(self.build_lib, self.get_ext_filename(ext.name)).unlink(missing_ok=True)
                if setting(f"SNNKERNELS_{name.upper()}") == "1":
                    raise
                print(
                    f"warning: the {name.upper()} extension is left out ({error}); "
                    "the package works without it, see `snnkernels info`",
                    file=sys.stderr,
                )
        if self.inplace:
            self.copy_extensions_to_source()

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.exists():
                # Renamed into place: a process that has the old one loaded keeps it.
                fresh = ROOT / "snnkernels" / f".{built.name}.new"
                shutil.copy2(built, fresh)
                fresh.replace(ROOT / "snnkernels" / built.name)

    def build(self, ext: Extension, plan) -> None:
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        out = Path(self.build_lib, self.get_ext_filename(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        file = NinjaFile()
        plan(file, folder, out)
        (folder / "build.ninja").write_text("\n".join(file.lines) + "\n")
        subprocess.run(
            [ninja(), "-C", str(folder), "-v" if self.verbose > 1 else "--quiet"], check=True
        )

    @property
    def cxx(self) -> list[str]:
        return shlex.split(os.environ.get("CXX", "c++"))

    @property
    def python_headers(self) -> list[str]:
        import pybind11

        return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    @property
    def sanitize(self) -> list[str]:
        kinds = os.environ.get("SNNKERNELS_SANITIZE")
        return [f"-fsanitize={kinds}", "-fno-omit-frame-pointer", "-g1"] if kinds else []

    def plan_cpu(self, file: NinjaFile, folder: Path, out: Path) -> None:
        source = ROOT / "csrc"
        base = [*self.cxx, *HOST_FLAGS, *self.sanitize]
        objects = [
            file.compile(
                folder / f"{unit}_{isa}.o",
                source / f"{unit}_isa.cpp",
                [*base, f"-DSNN_ISA={isa}", *flags],
            )
            for unit in ("cpu", "maps", "spike_conv")
            for isa, flags in ISA_FLAGS.items()
            if X86 or isa == "baseline"
        ]
        binding = [*base, *(["-DSNN_X86"] if X86 else []), *self.python_headers]
        for unit in ("bind_cpu", "bind_maps_cpu", "bind_spike_conv_cpu"):
            objects.append(file.compile(folder / f"{unit}.o", source / f"{unit}.cpp", binding))
        # libgomp is torch's own, loaded before this module: never a second OpenMP runtime.
        link = [*self.cxx, "-shared", "-fopenmp", *self.sanitize]
        file.edge("link", out, objects, [*link, *objects, "-o", out])

    def plan_cuda(self, file: NinjaFile, folder: Path, out: Path) -> None:
        source = ROOT / "csrc"
        cuda = Cuda(find_nvcc())
        objects = [
            file.compile(
                folder / f"{unit}.o",
                source / f"{unit}.cu",
                [cuda.nvcc, *DEVICE_FLAGS, "-t2", *cuda.gencode],
            )
            for unit in ("launch", "maps_launch")
        ]
        objects += [
            file.compile(
                folder / f"{unit}.o",
                source / f"{unit}.cpp",
                [
                    *self.cxx,
                    *HOST_FLAGS,
                    f'-DSNN_ARCHS="{" ".join(cuda.archs)}"',
                    *self.python_headers,
                ],
            )
            for unit in ("bind_cuda", "bind_maps_cuda")
        ]
        file.edge(
            "link", out, objects, [*self.cxx, "-shared", *objects, "-o", out, *cuda.libraries]
        )


class Sdist(sdist):
    """With SOURCE_DATE_EPOCH: no time, owner or umask of this machine in the archive."""

    def make_archive(
        self, base_name: str, format: str, root_dir: Any = None, base_dir: Any = None, **owner: Any
    ) -> str:
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar" or root_dir is not None:
            return super().make_archive(base_name, format, root_dir, base_dir, **owner)

        def same(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.mtime, info.uid, info.gid, info.uname, info.gname = int(epoch), 0, 0, "", ""
            info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
            return info

        target = f"{base_name}.tar.gz"
        with (
            open(target, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch)) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=same)
        return target


extensions = []
if setting("SNNKERNELS_CPU") != "0":
    extensions.append(Extension("snnkernels._cpu", []))
if find_nvcc():
    extensions.append(Extension("snnkernels._cuda", []))

setup(
    # csrc travels inside the wheel: NVRTC compiles it at run time where there is no _cuda.
    packages=[
        "snnkernels",
        "snnkernels._csrc",
        *(
            ".".join(p.parent.relative_to(ROOT).parts)
            for p in sorted((ROOT / "snnkernels").glob("*/**/__init__.py"))
        ),
    ],
    package_dir={"snnkernels._csrc": "csrc"},
    package_data={
        "snnkernels": ["py.typed"],
        "snnkernels.html_report": ["*.css", "*.js"],
        "snnkernels._csrc": ["*.h", "*.cuh", "*.cu", "*.cpp"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExt, "sdist": Sdist},
)
