"""A row of the table of bad calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["CommandError", "Row", "rows"]


OBJECTS = {"ConvertedNetwork": "snn", "Plan": "plan", "ConvertedModules": "partly"}
MODULES = ("convert_modules",)


class CommandError(Exception):
    """The command line ended with an exit code other than 0; the last line of stderr."""


@dataclass(frozen=True)
class Row:
    """A call that must fail, and what its message must hold.

    ``name`` is what is called, as ``test_public`` lists it; ``parameter`` is what is bad, which the
    message names by ``names`` where that is another word; ``value`` is how the message shows what
    was given. ``given`` runs first: the state of the world that the call meets. ``needs`` names
    packages. ``foreign``: part of the message is another library's, and may change with it.
    """

    name: str
    parameter: str
    value: str
    call: str
    error: type[Exception] | tuple[type[Exception], ...]
    names: str = ""
    given: str = ""
    needs: str = ""
    foreign: bool = False

    @property
    def kinds(self) -> tuple[type[Exception], ...]:
        return self.error if isinstance(self.error, tuple) else (self.error,)


def rows(
    of: str, parameter: str, value: str, call: str,
    error: type[Exception] | tuple[type[Exception], ...], **more: Any,
) -> list[Row]:  # fmt: skip
    """The same bad call of several functions.

    In ``call`` ``{f}`` is the function, ``{c}`` its class and ``{o}`` an object of that class.
    """
    found = []
    for name in [of] if of.startswith("cli ") else of.split():
        words = {"{f}": name.rpartition(".")[2], "{c}": name.partition(".")[0]}
        words |= {"{o}": OBJECTS.get(words["{c}"], ""), "{m}": "['0'], " * (name in MODULES)}
        text = call
        for word, meant in words.items():
            text = text.replace(word, meant)
        which = "root" if name == "cifar10" else "path"
        found.append(Row(name, parameter.replace("{p}", which), value, text, error, **more))
    return found
