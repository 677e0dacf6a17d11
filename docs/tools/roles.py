"""Docstrings use Sphinx's roles, for readers in Python and in editors: here they become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`(~?)([\w.]+)`")
# "::" before an indented block, on a line of its own or at the end of one.
_BLOCK = re.compile(r"^([ \t]*)::[ \t]*$", re.M)


class Roles(griffe.Extension):
    """``:func:`name``` to a link where the name is on some page, else to code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is None:
            return

        def link(role: re.Match[str]) -> str:
            short, name = role.groups()
            shown = name.rpartition(".")[2] if short or name.startswith("snnkernels.") else name
            try:
                target = obj.resolve(name)
            except griffe.NameResolutionError:
                target = name
            return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

        text = _ROLE.sub(link, obj.docstring.value)
        text = _BLOCK.sub("", text)
        obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M)
