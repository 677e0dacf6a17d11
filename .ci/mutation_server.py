"""Runs tests in forks of one process that has imported all but the package under test.

Torch takes seconds to import, most mutants die in less. The command that Cosmic Ray runs for each
mutant is ``python -S mutation_server.py SOCKET``: a client that waits for what the fork found.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings

HOW = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
HOW += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is there before pytest


def main() -> int:
    """A server (``SOCKET MODULE TEST...``, in the copy), or a client of one (``SOCKET``)."""
    path, *rest = sys.argv[1:]
    if rest:
        serve(path, rest[0], rest[1:])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        code, _, output = b"".join(iter(lambda: server.recv(4096), b"")).partition(b"\n")
    sys.stdout.write(output.decode(errors="replace"))
    return int(code)


def serve(path: str, module: str, tests: list[str]) -> None:
    """Answers each connection with the exit status of the tests and the end of what they printed.

    The first line printed here is ``ready SECONDS``, for tests that take so long; without it they
    fail on the module as it is.
    """
    sys.dont_write_bytecode = False  # of the tests, once
    for name in ("torch", "numpy", "hypothesis", "pytest"):
        importlib.import_module(name)
    code, output, imported = in_a_fork(tests, 1800)
    if code:
        sys.exit(f"the tests of {module} fail before anything is changed:\n{output}")
    for name in imported:  # whatever else the tests need, of other packages
        try:
            importlib.import_module(name)
        except Exception:  # some modules are made by others, and cannot be imported
            continue
    # Times in bytecode files are whole seconds: no mutant may be read from one, or written to one.
    with contextlib.suppress(FileNotFoundError):
        os.remove(importlib.util.cache_from_source(os.path.abspath(module)))
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    gc.freeze()
    start = time.monotonic()
    code, output, _ = in_a_fork(tests, 1800)
    if code:
        sys.exit(f"the tests of {module} fail when run twice:\n{output}")
    took = time.monotonic() - start
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", took, flush=True)
        while True:
            client, _ = server.accept()
            code, said, output = 1, "not Python", not_python(module)
            if not output:
                # What takes so long hangs.
                said, (code, output, _) = "tested", in_a_fork(tests, 20 + 5 * took)
            with client, contextlib.suppress(BrokenPipeError):
                client.sendall(f"{code}\n{said}\n{output}".encode())


def not_python(module: str) -> str:
    """Why this is no mutant: it does not compile, or with a warning (``x is "text"``)."""
    with open(module, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compile(file.read(), module, "exec")
        except SyntaxError as error:
            return str(error)
    return ""


def in_a_fork(tests: list[str], limit: float) -> tuple[int, str, list[str]]:
    """Exit status (1 for a crash or a time out), end of the output, modules that were imported."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = int(pytest_main([*HOW, *tests]))
                sys.stdout.flush()
                os.write(writing, json.dumps([code, others()]).encode() + b"\0")
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        os.close(writing)
        try:
            said = read(reading, time.monotonic() + limit)
        finally:  # what hangs, what tests have started; all of it when this is interrupted
            os.close(reading)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")[-2000:]
    if not said.endswith(b"\0"):
        return 1, f"{text}\ncrash or time out", []
    code, imported = json.loads(said[:-1])
    return code, text, imported


def pytest_main(arguments: list[str]) -> int:
    """Not imported at the top, which the client would pay for."""
    import pytest

    return pytest.main(arguments)


def read(pipe: int, until: float) -> bytes:
    """What comes out of a pipe up to a zero, its end, or the time ``until``."""
    said = b""
    while not said.endswith(b"\0"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            break
        more = os.read(pipe, 65536)
        if not more:
            break
        said += more
    return said


def others() -> list[str]:
    """Modules of this process that do not lie in the copy."""
    here = os.getcwd() + os.sep
    return [
        name
        for name, module in list(sys.modules.items())
        if (file := getattr(module, "__file__", None)) and not file.startswith(here)
    ]


if __name__ == "__main__":
    sys.exit(main())
