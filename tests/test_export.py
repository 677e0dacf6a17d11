"""torch.export of converted networks: the same bits for any batch, saved, compiled ahead."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import any_networks as nets
import pytest
import torch
from conversion_helpers import Everything, activation_for, images
from support import PURE, compiler, in_a_process
from torch import Tensor, nn

import snnkernels
from snnkernels.conversion.errors import ConversionError
from snnkernels.conversion.methods import DSR, STBIF, BitSerial
from snnkernels.hub import export


def network(act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), act(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(16, 6), act(), nn.Linear(6, 3)),
    ).eval()


X = images(4, size=4)


@pytest.fixture
def snn() -> snnkernels.ConvertedNetwork:
    return snnkernels.convert(network(), X, T=3, progress=False)


def targets(program: Any) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if "snnkernels" in str(n.target)}


@torch.no_grad()
def check(program: Any, snn: Any, x: Tensor, T: int) -> None:
    module = program.module()
    for batch in (1, 2, len(x)):
        assert torch.equal(module(x[:batch]), snn(x[:batch], T=T))


@torch.no_grad()
def test_torch_export_itself(snn: snnkernels.ConvertedNetwork) -> None:
    dims = (({0: torch.export.Dim("batch")},),)
    for shapes in (None, dims):
        program = torch.export.export(snn, (X,), dynamic_shapes=shapes)
        assert torch.equal(program.module()(X), snn(X))
        if shapes is not None:
            assert torch.equal(program.module()(X[:2]), snn(X[:2]))
    assert targets(program) == {"snnkernels.if_forward.default"}


# "advanced" trains: its network is one of "opi" with other weights.
METHODS = [m["name"] for m in snnkernels.methods() if m["name"] != "advanced"]


@pytest.mark.parametrize("method", [*METHODS, STBIF(levels=4), DSR(kind="lif")], ids=str)
@torch.no_grad()
def test_methods_in_our_operators(method: Any) -> None:
    ann = network(activation_for(method))
    snn = snnkernels.convert(ann, X, method=method, T=3, progress=False)
    check(snn.export(X), snn, X, 3)
    assert torch.equal(snn(X), snn(X))  # nothing stays behind


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, BitSerial(unrolled=True)], ids=str)
def test_methods_in_operators_of_torch(method: Any) -> None:
    ann = network(activation_for(method))
    snn = snnkernels.convert(ann, X, method=method, T=3, progress=False)
    program = snn.export(X, T=2, operators="torch")
    assert not targets(program)
    check(program, snn, X, 2)


@pytest.mark.slow
@pytest.mark.parametrize("net", [Everything(), nets.UNet(nn.ReLU, "size").eval()])
def test_pools_shortcuts_and_shapes(net: nn.Module) -> None:
    x = images(3)
    snn = snnkernels.convert(net, x, T=2, progress=False)
    program = snn.export(x)
    assert "snnkernels.cumulative_max_pool.default" in targets(program)
    check(program, snn, x, 2)


@torch.no_grad()
def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, *, z: Tensor) -> dict[str, Tensor]:
            return {"y": self.c(torch.relu(self.a(x) + torch.relu(self.b(z))))}

    x, z = torch.randn(5, 6), torch.randn(5, 3)
    snn = snnkernels.convert(
        Two(), [(x, z)], inputs=lambda i: {"x": i[0], "z": i[1]}, T=3, progress=False
    )
    program = snn.export({"z": z, "x": x})
    assert torch.equal(program.module()(x[:2], z[:2])["y"], snn(x[:2], z=z[:2])["y"])


@pytest.mark.slow
def test_saved_programs_run_in_another_process(
    snn: snnkernels.ConvertedNetwork, tmp_path: Path
) -> None:
    """Ours where snnkernels is imported; that of torch's operators where it is not."""
    with torch.no_grad():
        torch.save((X, snn(X)), tmp_path / "answer.pt")
    for operators in ("snnkernels", "torch"):
        torch.export.save(snn.export(X, operators=operators), tmp_path / f"{operators}.pt2")
    code = f"""
import sys, torch
x, want = torch.load({str(tmp_path / "answer.pt")!r})
def run(name):
    program = torch.export.load({str(tmp_path)!r} + "/" + name + ".pt2")
    with torch.no_grad():
        assert torch.equal(program.module()(x), want)
        assert program.module()(x[:1]).shape == (1, 3)
run("torch")
assert "snnkernels" not in sys.modules
import snnkernels
run("snnkernels")
print("same")
"""
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"


@pytest.mark.slow
@pytest.mark.skipif(PURE or compiler() is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.skipif(
    os.environ.get("SNNKERNELS_TEST_THOROUGH") != "1",
    reason="compiles for a minute: SNNKERNELS_TEST_THOROUGH=1",
)
@pytest.mark.parametrize("operators", ["snnkernels", "torch"])
def test_compiled_ahead_of_time(
    operators: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AOTInductor calls our operator in a Python process that has imported snnkernels."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    snn = snnkernels.convert(net, x, T=2, progress=False)
    program = snn.export(x, operators=operators)
    code = f"""
import torch, snnkernels
program = torch.export.load({str(tmp_path / "net.pt2")!r})
package = torch._inductor.aoti_compile_and_package(
    program, package_path={str(tmp_path / "compiled.pt2")!r}
)
torch.save(torch._inductor.aoti_load_package(package)(torch.load({str(tmp_path / "x.pt")!r})),
           {str(tmp_path / "y.pt")!r})
"""
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save(x[:3], tmp_path / "x.pt")
    done = in_a_process(code)  # where deterministic algorithms are not asked for
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), snn(x[:3]))


def test_bad_arguments(snn: snnkernels.ConvertedNetwork) -> None:
    with pytest.raises(ValueError, match=r"example has a batch of 1: .*dynamic_batch=False"):
        snn.export(X[:1])
    with pytest.raises(ValueError, match="operators='aten' is unknown; allowed: snnkernels, torch"):
        snn.export(X, operators="aten")
    with pytest.raises(ValueError, match="T must be a whole number of at least 1, got 0"):
        snn.export(X, T=0)
    with pytest.raises(TypeError, match="must be a ConvertedNetwork, got Linear"):
        export(nn.Linear(2, 2), X)  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match=r"torch\.export cannot export this network: .*"):
        snn.export(torch.randn(4, 5, 4, 4))
    program = snn.export(X[:1], dynamic_batch=False)
    with torch.no_grad():
        assert torch.equal(program.module()(X[:1]), snn(X[:1]))


@torch.no_grad()
def test_monitors_do_not_see_an_export() -> None:
    x = images(4, size=6)
    ann = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    snn = snnkernels.convert(ann, x, T=4, progress=False)
    want = snn(x)
    with snnkernels.SpikeMonitor(snn) as spikes, snnkernels.VoltageMonitor(snn) as voltages:
        snn(x)
        held = spikes.nbytes, voltages.nbytes
        assert torch.equal(snn.export(x).module()(x), want)
        assert (spikes.nbytes, voltages.nbytes) == held
        snn(x)  # watched again
        assert (spikes.nbytes, voltages.nbytes) == (2 * held[0], 2 * held[1])
