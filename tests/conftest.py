"""What is tested (report header), back ends as parameters, poisoned memory, hypothesis profiles."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from support import (
    HYPOTHESIS,
    PACKAGE,
    PURE,
    Backend,
    HostShim,
    build_host_shim,
    compiler,
    extension,
    optional,
)

import snnkernels
from snnkernels import ConvertedNetwork, Plan
from snnkernels.interop import checks
from snnkernels.kernels import backends, plan

# Tests of test_fuzz*.py draw support.FUZZ examples, the other property tests 50, or 20,000 each by
# night: SNNKERNELS_HYPOTHESIS=nightly (or HYPOTHESIS_PROFILE).
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=50,
    # The same examples for every change, other ones every night.
    derandomize=os.environ.get("CI") == "true" and HYPOTHESIS != "nightly",
    # The `backend` fixture is one thing for all examples of a test.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
for _name, _examples in (("ci", 50), ("thorough", 500), ("nightly", 20_000)):
    hypothesis.settings.register_profile(
        _name, hypothesis.settings.get_profile("default"), max_examples=_examples
    )
hypothesis.settings.load_profile(HYPOTHESIS)


def pytest_configure(config: pytest.Config) -> None:
    if extension("_cpu") is None and not PURE:
        raise pytest.UsageError(
            "the CPU extension snnkernels._cpu is missing from "
            f"{PACKAGE}: build it (pip install .), or set SNNKERNELS_TEST_PURE=1 to test the pure "
            "PyTorch package on purpose"
        )
    # Fresh tensors are full of NaN: an output that is not written shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"snnkernels {snnkernels.__version__} from {PACKAGE}"]
    lines += str(snnkernels.backend_info()).splitlines()
    lines.append(
        "host shim: "
        + ("the GPU kernels run on the CPU too" if not PURE and compiler() else "not built")
    )
    if PURE:
        lines.append("SNNKERNELS_TEST_PURE=1: only the reference is tested")
    return lines


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What torch.compile says there of the interpreter. A mark: `-W error` is stronger than a filter
    # of the configuration.
    if sys.version_info[:3] == (3, 13, 0):
        for item in items:
            item.add_marker(
                pytest.mark.filterwarnings(r"ignore:Guards may run slower on Python 3\.13\.0")
            )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def host_shim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HostShim:
    """The GPU kernels as a CPU module; built once and kept between sessions."""
    if compiler() is None:
        pytest.skip("the host shim needs a C++ compiler (CXX or c++)")
    optional("pybind11")
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("host_shim") if cache else tmp_path_factory.mktemp("host_shim")
    return build_host_shim(folder)


# Without extensions "auto" would warn that only the reference is left.
_DEFAULT = "reference" if PURE else "auto"


@pytest.fixture(autouse=True)
def _clean_backend() -> Iterator[None]:
    if backends.get_backend() != _DEFAULT:
        backends.set_backend(_DEFAULT)
    torch.manual_seed(0)
    yield
    if backends.get_backend() != _DEFAULT:
        backends.set_backend(_DEFAULT)


def _ready(given: Backend, request: pytest.FixtureRequest) -> Iterator[Backend]:
    before, full = None, plan.FULL
    if given.name == "host_shim":
        shim = request.getfixturevalue("host_shim")
        backends._MAKERS["host_shim"] = shim.kernels
        backends._made.pop("host_shim", None)
        # Wide threads wherever they fit: small tests would never see them.
        plan.FULL = 0
    elif given.isa is not None:
        before = extension("_cpu").isa()
        extension("_cpu").set_isa(given.isa)
    try:
        backends.set_backend(given.name)
    except RuntimeError as error:
        if given.name in ("cuda", "nvrtc"):
            pytest.skip(str(error))
        raise
    yield given
    backends.set_backend(_DEFAULT)
    plan.FULL = full
    if given.name == "host_shim":
        backends._MAKERS.pop("host_shim")
        backends._made.pop("host_shim")
    if before is not None:
        extension("_cpu").set_isa(before)


def _gpu(name: str) -> object:
    return pytest.param(Backend(name, "cuda"), marks=pytest.mark.gpu, id=name)


_COMPILED = [] if PURE else [Backend("cpu"), Backend("host_shim")]
_ISAS = [] if PURE or extension("_cpu") is None else extension("_cpu").isas()
_GPU = [] if PURE else [_gpu("cuda"), _gpu("nvrtc")]


@pytest.fixture(params=[Backend("reference"), *_COMPILED, *_GPU], ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Forces one implementation after the other."""
    yield from _ready(request.param, request)


@pytest.fixture(params=[*_COMPILED, *_GPU] or [Backend("reference")], ids=str)
def kernel(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """As ``backend``, without the reference where anything else is there."""
    yield from _ready(request.param, request)


@pytest.fixture(
    params=[
        Backend("reference"),
        *(Backend("cpu", isa=isa) for isa in _ISAS),
        *_COMPILED[1:],
        *_GPU,
    ],
    ids=str,
)
def level(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """As ``backend``, and every SIMD level of the CPU extension."""
    yield from _ready(request.param, request)


@pytest.fixture
def everything_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What patched neurons warn of once is said again; the same random numbers for each test."""
    monkeypatch.setattr(checks, "_said", set())
    torch.manual_seed(0)


# These run twice: converted networks as they are, and lowered by the engine.
BOTH_WAYS = ("test_conversion_", "test_methods_", "test_any_network", "test_worked_examples")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    alone = metafunc.definition.get_closest_marker("converted_only")
    if metafunc.module.__name__.startswith(BOTH_WAYS) and not alone:
        metafunc.parametrize("run_as", ["converted", "lowered"], indirect=True)


@pytest.fixture(autouse=True)
def run_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``lowered``, calls of converted networks without gradients go through plans."""
    if getattr(request, "param", "converted") == "converted":
        return
    plans: dict[int, tuple[ConvertedNetwork, Plan]] = {}
    inside = []

    def through(name: str) -> None:
        original = getattr(ConvertedNetwork, name)

        def call(self: ConvertedNetwork, *args: Any, **named: Any) -> Any:
            if inside:  # a plan's own calls
                return original(self, *args, **named)
            plan = plans.setdefault(id(self), (self, snnkernels.lower(self)))[1]
            inside.append(self)
            try:
                return getattr(plan, name)(*args, **named)
            finally:
                inside.pop()

        monkeypatch.setattr(ConvertedNetwork, name, call)

    through("forward")
    through("predict_curve")


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
