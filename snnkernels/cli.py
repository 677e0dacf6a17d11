"""The ``snnkernels`` command; what it runs is in :mod:`snnkernels.commands`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from typing import Any, NoReturn

from .commands import bench, convert, demo, evaluate, explain, info, plot, sweep
from .commands.output import markdown_table, plain, print_table, progress_bar

__all__ = ["main", "markdown_table", "print_table", "progress_bar"]

_CODES = """exit codes:
  0    done
  1    an error, told in one line on stderr
  2    wrong arguments
  130  interrupted
With --json every error is a JSON document on stdout, too.

snnkernels COMMAND --help shows a command's options and examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's own when None) and return its exit code.

    0: done; 1: an error, told in one line on stderr; 2: wrong arguments (raised as
    :class:`SystemExit` by argparse); 130: interrupted. With ``--json`` stdout is one JSON document,
    ``{"error": {"type": ..., "message": ...}}`` after any of these errors.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    try:
        args = parser.parse_args(given)
    except SystemExit as end:
        if end.code == 2 and "--json" in given:
            _print_error("ArgumentError", _Parser.said)
        raise
    args.argv = given
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a "θ" must not end a run in an ASCII terminal
    try:
        # What is for people must not come between the braces, whoever prints it.
        with ExitStack() as stack:
            if args.json:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(nowhere))
            document = args.run(args)
        if args.json:
            _print_json(document)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        if args.json:
            _print_error("KeyboardInterrupt", "interrupted")
        return 130
    except BrokenPipeError:
        # The reader has gone (| head): nobody to tell, and no traceback at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as e:
        if args.traceback:
            raise
        message = " ".join(str(e).split())
        print(f"snnkernels {args.command}: {type(e).__name__}: {message}", file=sys.stderr)
        if args.json:
            _print_error(type(e).__name__, message)
        return 1
    except Exception as e:  # a defect: with its traceback
        if args.json:
            _print_error(type(e).__name__, " ".join(str(e).split()))
        raise
    return 0


class _Parser(argparse.ArgumentParser):
    """Keeps what was wrong with the arguments, for the JSON document."""

    said = ""

    def error(self, message: str) -> NoReturn:
        _Parser.said = message
        super().error(message)


def _print_error(kind: str, message: str) -> None:
    _print_json({"error": {"type": kind, "message": message}})


def _print_json(document: Any) -> None:
    print(json.dumps(plain(document), indent=2, allow_nan=False))


def _parser() -> _Parser:
    from . import __version__

    parser = _Parser(
        prog="snnkernels",
        description="Spiking networks from trained ANNs, on fused kernels.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"snnkernels {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info.add_parsers(commands)
    for command in (demo, convert, evaluate, explain, sweep, bench, plot):
        command.add_parser(commands)
    return parser
