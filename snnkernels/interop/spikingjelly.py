"""SpikingJelly."""

from __future__ import annotations

from .patching import Adapter

ADAPTER = Adapter()
ADAPTER.library = "spikingjelly"
