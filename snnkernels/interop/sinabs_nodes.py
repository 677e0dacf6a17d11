"""Fused forms of Sinabs' classes; imports Sinabs, so only its adapter does.

Each overrides the forward pass and nothing else: state and its names, what happens when the batch
changes (Sinabs draws rows of the old state), ``reset_states``, ``zero_grad`` and ``state_dict`` are
Sinabs' own code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sinabs.layers import IAF, LIF, IAFSqueeze, LIFSqueeze
from torch import Tensor

from . import sinabs_run
from .adapters import Refused
from .checks import say

__all__ = ["FUSED", "FusedIAF", "FusedIAFSqueeze", "FusedLIF", "FusedLIFSqueeze", "run"]


def run(node: Any, x: Tensor, theirs: Any = LIF.forward) -> Tensor:
    """The spikes of ``node`` for ``x`` ``[B, T, *]``, by our kernels or by ``theirs``."""
    try:
        sinabs_run.check(node, look=False)
    except Refused as refused:  # it has been changed since it was patched
        say(refused, sinabs_run.OWN)
        return theirs(node, x)
    batch, _, *trailing = x.shape
    shape = (batch, *trailing)
    if not node.is_state_initialised() or not node.has_trailing_dimension(trailing):
        node.init_state_with_shape(shape)
    elif not node.state_has_shape(shape):
        node.handle_state_batch_size_mismatch(batch)
    alpha = None if isinstance(node, IAF) else node.alpha_mem_calculated
    found = sinabs_run.forward(
        x, node.v_mem, node.spike_threshold, node.spike_fn, node.reset_fn, node.surrogate_grad_fn,
        node.min_v_mem, alpha, node.norm_input, node.record_states,
    )  # fmt: skip
    if found is None:
        return theirs(node, x)
    spikes, node.v_mem, v_seq = found
    node.i_syn = None
    node.recordings = {"v_mem": v_seq} if node.record_states else {}
    node.firing_rate = spikes.mean()
    return spikes


class _Copied:
    """Sinabs copies a layer by making a new one from its arguments."""

    def __deepcopy__(self, memo: Any = None) -> Any:
        copied = super().__deepcopy__(memo)  # type: ignore[misc]
        # unpatch must know the copy too.
        for name, value in self.__dict__.items():
            if name.startswith("_snnkernels"):
                copied.__dict__[name] = value
        return copied


class FusedLIF(_Copied, LIF):
    """LIF."""

    def forward(self, input_data: Tensor) -> Tensor:
        """Spikes ``[B, T, *]``."""
        return run(self, input_data)


class FusedIAF(_Copied, IAF):
    """IAF."""

    def forward(self, input_data: Tensor) -> Tensor:
        """Spikes ``[B, T, *]``."""
        return run(self, input_data)


class FusedIAFSqueeze(_Copied, IAFSqueeze):
    """IAFSqueeze."""

    def forward(self, input_data: Tensor) -> Tensor:
        """Spikes ``[B*T, *]``."""
        return self.squeeze_forward(input_data, partial(run, self))


class FusedLIFSqueeze(_Copied, LIFSqueeze):
    """LIFSqueeze."""

    def forward(self, input_data: Tensor) -> Tensor:
        """Spikes ``[B*T, *]``."""
        return self.squeeze_forward(input_data, partial(run, self))


FUSED: dict[type, type] = {
    IAF: FusedIAF, IAFSqueeze: FusedIAFSqueeze, LIF: FusedLIF, LIFSqueeze: FusedLIFSqueeze,
}  # fmt: skip
