"""What commands print: tables, bars of progress, JSON."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "add_command",
    "markdown_table",
    "percent",
    "plain",
    "positive",
    "print_table",
    "progress_bar",
]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Text as it is written, with room for long options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def add_command(
    commands: Any, name: str, summary: str, about: str, examples: str
) -> argparse.ArgumentParser:
    """A command's parser: what it does, examples below its options, and ``--json``."""
    from textwrap import dedent, fill

    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=fill(about, 98),
        epilog="examples:\n" + _indented(dedent(examples)),
        formatter_class=_Help,
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON document on stdout instead of text",
    )
    return parser


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.strip().splitlines())


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def percent(fraction: float | None) -> str:
    """A fraction as a cell of a table."""
    return "" if fraction is None else f"{100 * fraction:.2f}"


def plain(value: Any) -> Any:
    """``value`` as JSON has it: paths as text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
) -> None:
    """Print a table of text, the first ``left`` columns left and the others right aligned.

    With rich when it is installed, plain otherwise. A row of empty cells is a rule.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain(title, header, rows, left)
        return
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="left" if i < left else "right")
    for row in rows:
        if any(row):
            table.add_row(*(Text(cell) for cell in row))
        else:
            table.add_section()
    print(title)  # as the table's own title it would be broken to the table's width
    # At the width of a pipe or a narrow terminal rich would cut cells; numbers must stay whole.
    wide = Console(width=10_000)
    Console(width=max(Console().width, wide.measure(table).maximum)).print(table)


def _print_plain(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int
) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(row: Sequence[str]) -> str:
        cells = [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    print(title)
    print(line(header))
    print(rule)
    for row in rows:
        print(line(row) if any(row) else rule)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table in Markdown, ending in a newline; rules (empty rows) are left out."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(row for row in rows if any(row))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Any]:
    """Yield a bar with ``update(n)``: tqdm's, on stderr, if that is a terminal.

    One that shows nothing elsewhere, and where tqdm is not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield _NoBar()
        return
    with tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, disable=None) as bar:
        yield bar


class _NoBar:
    def update(self, n: int = 1) -> None:
        """Do nothing."""
