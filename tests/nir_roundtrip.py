"""A NIR file run by another library, in an environment of its own: it need not have snnkernels.

    python nir_roundtrip.py LIBRARY network.nir x_seq.npy answer.npy

LIBRARY is nirtorch, spikingjelly, snntorch or sinabs; arrays are [T, B, *].
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class SoftReset(nn.Module):
    """What the metadata says, one step: reset by subtraction, firing at the threshold."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        self.threshold = torch.tensor(np.asarray(node.v_threshold))
        self.start = torch.tensor(np.asarray(node.metadata["v_init"])).to(self.threshold)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        m = (self.start.expand(x.shape) if state is None else state) + x
        spikes = (m >= self.threshold).to(x.dtype)
        return spikes, m - spikes * self.threshold


def _linear(node: Any) -> nn.Module:
    layer = nn.Linear(node.weight.shape[1], node.weight.shape[0])
    layer.weight.data = torch.tensor(node.weight)
    layer.bias.data = torch.tensor(node.bias)
    return layer


def _steps(module: Callable[..., Any], x_seq: Tensor) -> Tensor:
    answers, state = [], None
    for x in x_seq:
        answer = module(x) if state is None else module(x, state)
        answer, state = answer if isinstance(answer, tuple) else (answer, None)
        answers.append(answer)
    return torch.stack(answers)


def run_nirtorch(path: str, x_seq: Tensor) -> Tensor:
    """Neurons by their metadata; nirtorch 2.6's own map of Affine leaves the bias out."""
    import nir
    import nirtorch

    def flatten(node: Any) -> nn.Module:
        return nn.Flatten(int(node.start_dim) + 1)  # nirtorch's own map has no batch

    maps = {nir.IF: SoftReset, nir.Affine: _linear, nir.Flatten: flatten}
    return _steps(nirtorch.nir_to_torch(nir.read(path), maps), x_seq)


def run_spikingjelly(path: str, x_seq: Tensor) -> Tensor:
    import nir
    from spikingjelly.activation_based import nir_exchange

    return _steps(nir_exchange.import_from_nir(nir.read(path), dt=1.0), x_seq)


def run_snntorch(path: str, x_seq: Tensor) -> Tensor:
    import nir
    from snntorch.import_nir import import_from_nir

    return _steps(import_from_nir(nir.read(path)), x_seq)


def run_sinabs(path: str, x_seq: Tensor) -> Tensor:
    sys.modules.setdefault("samna", types.ModuleType("samna"))  # for its chips only
    import nir
    from sinabs.nir import from_nir

    T, batch = x_seq.shape[:2]
    module = from_nir(nir.read(path), batch_size=batch)
    answer = module(x_seq.transpose(0, 1).flatten(0, 1))
    answer = answer[0] if isinstance(answer, tuple) else answer
    return answer.unflatten(0, (batch, T)).transpose(0, 1)


RUN = {
    "nirtorch": run_nirtorch,
    "spikingjelly": run_spikingjelly,
    "snntorch": run_snntorch,
    "sinabs": run_sinabs,
}

if __name__ == "__main__":
    library, network, given, answer = sys.argv[1:]
    with torch.no_grad():
        np.save(answer, RUN[library](network, torch.tensor(np.load(given))).numpy())
