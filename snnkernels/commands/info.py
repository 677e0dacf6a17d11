"""``snnkernels info`` and ``snnkernels methods``: what there is here."""

from __future__ import annotations

import argparse
from typing import Any

from .output import add_command

__all__ = ["add_parsers"]


def add_parsers(commands: Any) -> None:
    """Add both commands."""
    parser = add_command(
        commands,
        "info",
        "which implementations run here, and what to install",
        "Lists the implementations of the kernels: which of them run here, why the others do not, "
        "and the command that installs what is missing.",
        "snnkernels info\nsnnkernels info --json",
    )
    parser.set_defaults(run=_info)
    parser = add_command(
        commands,
        "methods",
        "the conversion methods: papers, needs, options",
        "Lists the conversion methods by the names that convert, sweep and snnkernels.convert() "
        "take, each with its paper, what it needs, and its options with their defaults.",
        "snnkernels methods\nsnnkernels methods --json",
    )
    parser.set_defaults(run=_methods)


def _info(args: argparse.Namespace) -> dict[str, Any]:
    from snnkernels import backend_info

    found = backend_info()
    print(found)
    return found.to_dict()


def _methods(args: argparse.Namespace) -> list[dict[str, Any]]:
    from textwrap import fill

    from snnkernels import methods

    found = methods()
    for m in found:
        options = ", ".join(f"{name}={value!r}" for name, value in m["options"].items())
        told = [m["source"], f"needs {m['needs']}"]
        told += [f"its paper trains with {m['trains']}"] if m["trains"] else []
        told += [f"options: {options}"] if options else []
        print(m["name"] + ("" if m["binary"] else " (not binary)"))
        for line in told:
            print(fill(line, 96, initial_indent="    ", subsequent_indent="      "))
    print(
        "\nconvert(ann, loader, method=NAME); with options an object of "
        "snnkernels.conversion.methods;\non the command line NAME:option=value. Which to take: "
        "docs/methods.md"
    )
    return found
