"""A row of the table of bad calls."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Row", "rows"]


@dataclass(frozen=True)
class Row:
    """A call that must fail, and what its message must hold.

    ``name`` is what is called, as ``test_public`` lists it; ``parameter`` is what is bad, which the
    message names by ``names`` where that is another word; ``value`` is how the message shows what
    was given. ``given`` runs first: the state of the world that the call meets.
    """

    name: str
    parameter: str
    value: str
    call: str
    error: type[Exception] | tuple[type[Exception], ...]
    names: str = ""
    given: str = ""
    needs: str = ""

    @property
    def kinds(self) -> tuple[type[Exception], ...]:
        return self.error if isinstance(self.error, tuple) else (self.error,)


def rows(
    of: str, parameter: str, value: str, call: str,
    error: type[Exception] | tuple[type[Exception], ...], **more: str,
) -> list[Row]:  # fmt: skip
    """The same bad call of several functions; ``{f}`` in ``call`` is the function."""
    return [
        Row(name, parameter, value, call.replace("{f}", name.rpartition(".")[2]), error, **more)
        for name in of.split()
    ]
