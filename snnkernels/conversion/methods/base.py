"""What a conversion method has to state."""

from __future__ import annotations

from ..ops import Activation

__all__ = ["Method"]


class Method:
    """A conversion method: only what is its own; everything else is the common pipeline.

    Attributes:
        name: what users pass as ``method=``.
        source: the paper.
        needs: what the ANN or the caller must bring.
        threshold: rule for activations without a learned ceiling; None if there is none.
        per_channel: whether that rule works per channel.
        v_init: initial potential, ``"half"`` or a number.
    """

    name: str
    source: str
    needs: str
    threshold: str | None = None
    per_channel: bool = True
    v_init: str | float = 0.0

    def check(self, activations: list[Activation]) -> None:
        """Raise ``ConversionError`` if the network's activations do not suit the method."""
