"""Which implementation serves a tensor, and why.

========== ======= ===========================================================================
name       serves  what it is
========== ======= ===========================================================================
cpu        CPU     compiled extension, SIMD level chosen at run time, OpenMP threads
cuda       CUDA    compiled extension, static CUDA runtime
nvrtc      CUDA    the same source compiled at run time by NVRTC through CuPy
reference  any     plain PyTorch
========== ======= ===========================================================================

``auto`` takes the first that is there and warns once when only the reference is left. A forced one
raises instead of falling back.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAMES = ("auto", "cpu", "cuda", "nvrtc", "reference")
_VARIABLE = "SNNKERNELS_BACKEND"
_FOLDER = Path(__file__).resolve().parents[1]
# Where warnings do not point to: this package, torch and context managers, as their code objects
# name files.
_INSIDE = (
    str(Path(__file__).parents[1]) + os.sep,
    str(Path(torch.__file__).parent) + os.sep,
    contextlib.__file__,
)


Launch = Callable[[bytes, torch.device], None]


@dataclass(frozen=True, eq=False)
class Kernels:
    """One compiled implementation: the four kernels, each told what to do by packed params.

    ``gpu``: it runs csrc/kernels.cuh and needs its launch plan. ``check`` raises :class:`Missing`
    for a device it cannot serve.
    """

    name: str
    device_type: str
    gpu: bool
    forward: Launch
    general: Launch
    backward: Launch
    backward_general: Launch
    check: Callable[[torch.device], None] = lambda device: None
    map: Callable[[str, bytes, torch.device], None] | None = None  # the small kernels, by name
    spike_conv: Callable[[bytes, bytes], None] | None = None  # its struct, those of its branches


def entries(module: Any, wrap: Callable[[Any], Launch]) -> dict[str, Any]:
    """The four kernels of a binding, as the fields of :class:`Kernels`."""
    fields = ("forward", "general", "backward", "backward_general")
    return {field: wrap(getattr(module, f"if_{field}")) for field in fields}


@dataclass(frozen=True)
class Row:
    """One line of :func:`backend_info`."""

    name: str
    available: bool
    reason: str
    remedy: str
    version: str


@dataclass(frozen=True)
class BackendInfo:
    """What is there, what is not, why, and the remedy; ``str()`` is a table."""

    rows: tuple[Row, ...]
    forced: str
    torch: str
    package: str

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("back end", "there", "version", "why / remedy")
        lines = [head]
        for row in self.rows:
            lines.append((row.name, "yes" if row.available else "no", row.version, row.reason))
            if row.remedy:
                lines.append(("", "", "", "remedy: " + row.remedy))
        width = [max(len(line[i]) for line in lines) for i in range(3)]
        table = [
            "  ".join(
                [*(cell.ljust(w) for cell, w in zip(line, width, strict=False)), line[3]]
            ).rstrip()
            for line in lines
        ]
        table.insert(1, "-" * max(map(len, table)))
        about = f"snnkernels in {self.package}, torch {self.torch}; back end: {self.forced}"
        return "\n".join([about, *table])


class Missing(RuntimeError):
    """A back end cannot run here; ``remedy`` says what would make it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason, self.remedy = reason, remedy


@cache
def extension(name: str) -> ModuleType:
    """The compiled module ``_cpu`` or ``_cuda``; raises :class:`Missing`."""
    try:
        return importlib.import_module(f"snnkernels.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"snnkernels.{name}":
            raise
        raise Missing(f"the compiled extension snnkernels.{name} is not installed", "") from None
    except ImportError as error:
        raise Missing(
            f"snnkernels.{name} does not load: {error}", "reinstall snnkernels"
        ) from error


def _at_fork(step: str) -> None:
    """A step of csrc/threads.h around a fork: OpenMP's threads do not come along."""
    try:
        module = extension("_cpu")
    except Missing:
        return
    getattr(module, step)()


if hasattr(os, "register_at_fork"):
    # The extension is loaded then if it was not: torch's own layers may have made the threads that
    # the child's kernels would wait for.
    os.register_at_fork(
        before=partial(_at_fork, "before_fork"),
        after_in_child=partial(_at_fork, "after_fork_in_child"),
    )


def _need_device() -> None:
    if torch.version.cuda is None:
        raise Missing(
            f"torch {torch.__version__} was built without CUDA", "install a CUDA build of torch"
        )
    if not torch.cuda.is_available():
        raise Missing("no CUDA device is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES")


def _cpu() -> Kernels:
    try:
        module = extension("_cpu")
    except Missing as error:
        raise Missing(error.reason, error.remedy or _remedy("a C++17 compiler", "CPU")) from None

    def run(launch: Callable[[bytes], None]) -> Launch:
        return lambda packed, device: launch(packed)

    def small(name: str, packed: bytes, device: torch.device) -> None:
        module.map(name, packed)

    return Kernels(
        "cpu", "cpu", False, **entries(module, run), map=small, spike_conv=module.spike_conv
    )


def _remedy(tool: str, switch: str) -> str:
    if (_FOLDER.parent / "setup.py").exists():
        return (
            "this is the source folder, not an installed package: the command `snnkernels info` "
            "sees the installed one; or pip install -e ."
        )
    return f"reinstall snnkernels where {tool} is on PATH (SNNKERNELS_{switch}=1 shows why not)"


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def on_device(launch: Callable[[bytes, int, int], None]) -> Launch:
    """``launch(params, device index, stream)`` on torch's current stream of the tensors' device."""

    def run(packed: bytes, device: torch.device) -> None:
        stream = _stream(device)
        if torch.cuda.current_device() == device.index:
            launch(packed, device.index, stream)
        else:
            # torch's guard returns to the device before without creating a context there.
            with torch.cuda.device(device):
                launch(packed, device.index, stream)

    return run


def _cuda() -> Kernels:
    try:
        module = extension("_cuda")
    except Missing as error:
        raise Missing(error.reason, error.remedy or _remedy("nvcc", "CUDA")) from None
    _need_device()
    runtime, driver = module.versions()
    if driver // 1000 < runtime // 1000:
        raise Missing(
            f"built with CUDA {runtime // 1000}, the driver supports CUDA {driver // 1000}",
            "update the driver, or rebuild snnkernels with an older nvcc",
        )

    def check(device: torch.device) -> None:
        capability = torch.cuda.get_device_capability(device)
        if not serves(module.ARCHS, capability):
            arch = "".join(map(str, capability))
            raise Missing(
                f"built for sm {module.ARCHS}, the device is sm_{arch}",
                f"rebuild snnkernels with SNNKERNELS_ARCHS={arch}",
            )

    def small(name: str, packed: bytes, device: torch.device) -> None:
        on_device(partial(module.map, name))(packed, device)

    return Kernels("cuda", "cuda", True, **entries(module, on_device), check=check, map=small)


def serves(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a build for ``archs`` (such as ``"80 90"``) runs on a device of ``capability``.

    A cubin runs on its own major version from its minor on; PTX, which setup.py embeds for 9.0 and
    the newest, on anything later.
    """
    built = [divmod(int(arch), 10) for arch in archs.split()]
    cubin = any(a == capability[0] and b <= capability[1] for a, b in built)
    return cubin or any(ptx <= capability for ptx in ((9, 0), max(built)) if ptx in built)


def _nvrtc() -> Kernels:
    from . import nvrtc

    package = f"cupy-cuda{(torch.version.cuda or '13').split('.')[0]}x"
    try:
        importlib.import_module("cupy.cuda").nvrtc.getVersion()
    except ImportError as error:
        raise Missing(f"CuPy does not import: {error}", f"pip install {package}") from None
    except Exception as error:
        raise Missing(f"CuPy finds no NVRTC: {error}", f"pip install '{package}[ctk]'") from None
    _need_device()
    launches = entries(nvrtc, lambda launch: launch)
    return Kernels("nvrtc", "cuda", True, **launches, check=nvrtc.check, map=nvrtc.map_)


_MAKERS: dict[str, Callable[[], Kernels]] = {"cpu": _cpu, "cuda": _cuda, "nvrtc": _nvrtc}
_made: dict[str, Kernels | Missing] = {}
_chosen: dict[torch.device, Kernels | None] = {}
# Checked when first used: an import must not fail, and must touch no device.
_forced = os.environ.get(_VARIABLE) or "auto"


def kernels(name: str) -> Kernels:
    """The implementation called ``name``; raises :class:`Missing` when it cannot run here."""
    if name not in _made:
        try:
            _made[name] = _MAKERS[name]()
        except Missing as error:
            _made[name] = error
    made = _made[name]
    if isinstance(made, Missing):
        raise made
    return made


def choose(device: torch.device) -> Kernels | None:
    """What serves tensors on ``device``; ``None`` is the reference."""
    try:
        return _chosen[device]
    except KeyError:
        return _chosen.setdefault(device, _choose(device))


def chosen(device: torch.device) -> Kernels | None:
    """What :func:`choose` has found before, if it was no reference."""
    return _chosen.get(device)


def _choose(device: torch.device) -> Kernels | None:
    _check_name()
    if _forced == "reference":
        return None
    if _forced != "auto":
        found = kernels(_forced)
        if found.device_type != device.type:
            raise RuntimeError(
                f"back end {_forced!r} was forced but the input is on a {device.type} device; "
                "snnkernels.set_backend('auto') lets each device have its own"
            )
        found.check(device)
        return found
    missing = []
    for name in {"cpu": ("cpu",), "cuda": ("cuda", "nvrtc")}.get(device.type, ()):
        try:
            found = kernels(name)
            found.check(device)
            return found
        except Missing as error:
            missing.append(f"{name}: {error}")
    warnings.warn(
        f"snnkernels runs its slow PyTorch reference on {device.type} tensors. "
        + (" | ".join(missing) or f"There are no kernels for {device.type} devices.")
        + " | `snnkernels info` shows all; set_backend('reference') silences this.",
        RuntimeWarning,
        stacklevel=outside(),
    )
    return None


def outside() -> int:
    """The stack level, for a warning where this is called, of the first frame of neither our
    package nor torch: the user's line, however deep inside modules and operators the call is.
    """
    # warnings.warn has skip_file_prefixes for it from Python 3.12 on.
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level


def _check_name() -> None:
    if _forced not in NAMES and _forced not in _MAKERS:
        raise ValueError(f"{_VARIABLE}={_forced!r} is unknown; allowed are {', '.join(NAMES)}")


def set_backend(name: str) -> None:
    """Chooses the implementation for all later calls.

    Args:
        name: ``"auto"`` (the best that is there), or one of ``"cpu"``, ``"cuda"``, ``"nvrtc"``,
            ``"reference"``, which is then used or an error raised, never replaced. The environment
            variable ``SNNKERNELS_BACKEND`` sets the start value.

    Raises:
        ValueError: if there is no such back end.
        RuntimeError: if it cannot run on this machine, with the reason and the remedy.
    """
    global _forced
    if name not in NAMES and name not in _MAKERS:
        raise ValueError(f"name={name!r} is no back end; allowed are {', '.join(map(repr, NAMES))}")
    for other in [n for n, made in _made.items() if isinstance(made, Missing)]:
        del _made[other]  # what was missing may have been installed since
    if name in _MAKERS:
        try:
            kernels(name)
        except Missing as error:
            raise RuntimeError(f"back end {name!r} cannot run here: {error}") from None
    _forced = name
    _chosen.clear()


def get_backend() -> str:
    """The name last given to :func:`set_backend` (``"auto"`` at start)."""
    return _forced


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """:func:`set_backend` for a ``with`` block.

    Args:
        name: as there.
    """
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def backend_info() -> BackendInfo:
    """What each back end needs and whether it is there, as ``snnkernels info`` prints."""
    _check_name()
    rows = []
    for name in _MAKERS:
        version = _version(name)
        try:
            kernels(name)
            rows.append(Row(name, True, f"serves {_SERVES.get(name, name)} tensors", "", version))
        except Missing as error:
            rows.append(Row(name, False, error.reason, error.remedy, version))
    rows.append(Row("reference", True, "plain PyTorch, any device; slow", "", torch.__version__))
    return BackendInfo(tuple(rows), _forced, torch.__version__, str(_FOLDER))


_SERVES = {"cpu": "CPU", "cuda": "CUDA", "nvrtc": "CUDA"}


def _version(name: str) -> str:
    try:
        if name == "cpu":
            module = extension("_cpu")
            return f"{module.isa()}, {module.threads()} threads"
        if name == "cuda":
            return "sm " + extension("_cuda").ARCHS
        if name == "nvrtc":
            return "cupy " + importlib.import_module("cupy").__version__
    except (Missing, ImportError, AttributeError):
        pass
    return "-"
