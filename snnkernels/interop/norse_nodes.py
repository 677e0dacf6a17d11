"""Fused forms of Norse's classes; imports Norse, so only its adapter does.

Each overrides the forward pass and nothing else. State goes in and comes out as in Norse.
"""

from __future__ import annotations

from typing import Any

from norse.torch.functional.iaf import IAFFeedForwardState
from norse.torch.module.iaf import IAF, IAFCell
from torch import Tensor

from . import norse_run

__all__ = ["FUSED", "FusedIAF", "FusedIAFCell"]


class FusedIAF(IAF):
    """IAF: all steps of ``[T, *shape]``."""

    def forward(self, input_tensor: Tensor, state: Any = None) -> Any:
        """Spikes ``[T, *shape]`` and the state, or those of all steps with ``record_states``."""
        first = self.state_fallback(input_tensor) if state is None else state
        return FusedIAF.numbers(self, input_tensor, first, IAF.forward)

    @staticmethod
    def numbers(node: Any, x: Any, state: Any, theirs: Any) -> Any:
        """What ``node`` returns, by our kernels or by ``theirs``."""
        found = norse_run.forward(x, state.v, node.p, node.record_states)
        if found is None:
            return theirs(node, x, state)
        spikes, v, v_seq = found
        return spikes, IAFFeedForwardState(v=v if v_seq is None else v_seq)


class FusedIAFCell(IAFCell):
    """IAFCell: one step ``[*shape]``."""

    def forward(self, input_tensor: Tensor, state: Any = None) -> Any:
        """Spikes ``[*shape]`` and the state."""
        first = self.state_fallback(input_tensor) if state is None else state
        return FusedIAFCell.numbers(self, input_tensor, first, IAFCell.forward)

    @staticmethod
    def numbers(node: Any, x: Any, state: Any, theirs: Any) -> Any:
        """What ``node`` returns, by our kernels or by ``theirs``."""
        steps = x.unsqueeze(0) if isinstance(x, Tensor) and not x.is_sparse else x
        found = norse_run.forward(steps, state.v, node.p, False)
        if found is None:
            return theirs(node, x, state)
        return found[0][0], IAFFeedForwardState(v=found[1])


FUSED: dict[type, type] = {IAF: FusedIAF, IAFCell: FusedIAFCell}
