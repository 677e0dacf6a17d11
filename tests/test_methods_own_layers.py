"""Methods whose layers run in their own way, on networks with everything in them."""

from __future__ import annotations

import copy

import pytest
import torch
from conversion_helpers import Everything, images, relative

from snnkernels import models
from snnkernels.conversion import convert
from snnkernels.conversion.methods import (
    DSR,
    PTL,
    STBIF,
    TTFS,
    BitSerial,
    Method,
    MultiThreshold,
)

# method, T, options of convert
METHODS: list[tuple[Method, int, dict[str, str]]] = [
    (STBIF(levels=16), 80, {}),
    (BitSerial(), 6, {}),
    (BitSerial(unrolled=True), 6, {"maxpool": "avg"}),
    (TTFS(), 32, {}),
    (DSR(), 32, {}),
    (DSR(kind="lif"), 40, {}),
    (MultiThreshold(), 16, {}),
    (PTL(), 32, {}),
]


@pytest.mark.parametrize(("method", "T", "options"), METHODS, ids=[str(m) for m, _, _ in METHODS])
@pytest.mark.parametrize("network", ["everything", "resnet10"])
def test_networks_with_shortcuts_concatenation_and_pools(network, method, T, options) -> None:
    torch.manual_seed(0)
    net, x = (
        (Everything(), images(8, size=12))
        if network == "everything"
        else (models.resnet10().eval(), images(2, size=16))
    )
    snn = convert(net, x, method=method, T=T, progress=False, **options)
    with torch.no_grad():
        answer = snn(x)
        assert relative(answer, net(x)) < 0.1
        assert torch.equal(copy.deepcopy(snn)(x), answer)  # copies, and calls leave nothing behind
        assert relative(copy.deepcopy(snn).double()(x.double()), answer) < 0.1
        assert relative(copy.deepcopy(snn).bfloat16()(x.bfloat16()).float(), answer) < 0.2
        assert torch.equal(snn.predict_curve(x, [T])[T], answer)
