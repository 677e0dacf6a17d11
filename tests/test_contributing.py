"""The example of CONTRIBUTING.md: a method in a few lines that works."""

from __future__ import annotations

import re

import torch
from conversion_helpers import dyadic
from support import ROOT
from torch import nn

from snnkernels import convert


def test_the_method_of_contributing() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert len(code.splitlines()) < 60
    found: dict[str, type] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), found)
    method = found["Spread"]()
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(dyadic(*p.shape, seed=p.dim(), scale=4, low=-4, high=4))
        x = dyadic(64, 6, seed=2)
        spread = convert(net, method=method, threshold=2.0, T=8)
        assert torch.equal(spread(x), convert(net, threshold=2.0, T=8)(x))
        assert not torch.equal(spread(x, T=3), convert(net, threshold=2.0, T=8)(x, T=3))
    assert "method spread;" in str(spread.report)
