"""Fused forms of Sinabs' classes; imports Sinabs, so only its adapter does.

Each overrides the forward pass and nothing else: state and its names, what happens when the batch
changes (Sinabs draws rows of the old state), ``reset_states``, ``zero_grad`` and ``state_dict`` are
Sinabs' own code.
"""

from __future__ import annotations

from typing import Any

from sinabs.layers import IAF, LIF, IAFSqueeze, LIFSqueeze
from torch import Tensor

from . import sinabs_run
from .sj_run import say

__all__ = ["FUSED", "FusedIAF", "FusedIAFSqueeze", "FusedLIF", "FusedLIFSqueeze"]


class _Fused(LIF):
    """What the fused neurons share."""

    _leaks = True
    v_mem: Any

    def _run(self, x: Tensor) -> Tensor:
        reason = sinabs_run.why_not(self, look=False)
        if reason is not None:  # it has been changed since it was patched
            say(reason, sinabs_run.OWN)
            return LIF.forward(self, x)
        batch, _, *trailing = x.shape
        shape = (batch, *trailing)
        if not self.is_state_initialised() or not self.has_trailing_dimension(trailing):
            self.init_state_with_shape(shape)
        elif not self.state_has_shape(shape):
            self.handle_state_batch_size_mismatch(batch)
        found = sinabs_run.forward(
            x, self.v_mem, self.spike_threshold, self.spike_fn, self.reset_fn,
            self.surrogate_grad_fn, self.alpha_mem_calculated if self._leaks else None,
            self.norm_input, self.record_states,
        )  # fmt: skip
        if found is None:
            return LIF.forward(self, x)
        spikes, self.v_mem, v_seq = found
        self.i_syn = None
        self.recordings = {"v_mem": v_seq} if self.record_states else {}
        self.firing_rate = spikes.mean()
        return spikes

    def __deepcopy__(self, memo: Any = None) -> Any:
        copied = super().__deepcopy__(memo)
        # Sinabs makes a new module from the arguments: unpatch must know the copy too.
        for name, value in self.__dict__.items():
            if name.startswith("_snnkernels"):
                copied.__dict__[name] = value
        return copied


class FusedLIF(_Fused):
    """LIF."""

    def forward(self, input_data: Tensor) -> Tensor:
        """Spikes ``[B, T, *]``."""
        return self._run(input_data)


class FusedIAF(_Fused, IAF):
    """IAF."""

    _leaks = False

    def forward(self, input_data: Tensor) -> Tensor:
        """Spikes ``[B, T, *]``."""
        return self._run(input_data)


class FusedIAFSqueeze(_Fused, IAFSqueeze):
    """IAFSqueeze."""

    _leaks = False

    def forward(self, input_data: Tensor) -> Tensor:
        """Spikes ``[B*T, *]``."""
        return self.squeeze_forward(input_data, self._run)


class FusedLIFSqueeze(_Fused, LIFSqueeze):
    """LIFSqueeze."""

    def forward(self, input_data: Tensor) -> Tensor:
        """Spikes ``[B*T, *]``."""
        return self.squeeze_forward(input_data, self._run)


FUSED: dict[type, type] = {
    IAF: FusedIAF, IAFSqueeze: FusedIAFSqueeze, LIF: FusedLIF, LIFSqueeze: FusedLIFSqueeze,
}  # fmt: skip
