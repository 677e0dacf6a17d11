"""The model card beside a saved network."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..conversion.network import ConvertedNetwork

__all__ = ["model_card"]


def model_card(snn: ConvertedNetwork, name: str) -> str:
    """Markdown with a usage example and what the conversion did; ``name``: folder or hub id."""
    inputs = ", ".join(snn.inputs)
    latency = snn.latency()
    more = f" and answers after {latency} steps in all" if latency != snn.T else ""
    weights = sum(p.numel() for p in snn.parameters())
    layers = sum(1 for _ in snn.neurons())
    return f"""---
library_name: snnkernels
tags:
- spiking-neural-network
- snnkernels
---

# {name}

A spiking network converted from a trained ANN by snnkernels: method `{snn.report.method}`,
{layers} layers of neurons, {weights:,} parameters. Its thresholds belong to T = {snn.T}{more}.

```python
import torch
import snnkernels

snn = snnkernels.load_pretrained("{name}")
with torch.no_grad():
    output = snn({inputs})  # tensors [batch, ...], prepared as for the ANN; T={snn.T}
print(snn.report)

fast = snnkernels.lower(snn)  # the same call, faster
```

Loading needs torch, numpy and safetensors (`pip install 'snnkernels[hub]'`), not the ANN's code;
nothing is unpickled.

## What the conversion did

{snn.report.to_markdown()}
"""
