"""Mutates modules with Cosmic Ray in a copy of the tree and prints what survived.

``mutation.py COPY [MODULE...]``, called by .ci/mutation. Which tests are to notice is said in
mutation.toml; they run in forks of a server (mutation_server.py).
"""

from __future__ import annotations

import ast
import csv
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from cosmic_ray.commands import execute, init
from cosmic_ray.config import ConfigDict, load_config
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

HERE = Path(__file__).resolve().parent
TESTED, NOT_PYTHON = "tested", "not Python"  # first lines of mutation_server.py's answers


def main() -> int:
    """Exit status: 0 if no module is below the floor."""
    copy, *wanted = sys.argv[1:]
    config = load_config(str(HERE / "mutation.toml"))
    tests = config["tests"]
    for module in wanted:
        if module not in tests:
            sys.exit(f"{module!r} is not in .ci/mutation.toml; there are {', '.join(tests)}")
    os.chdir(copy)
    table = [one(module, tests[module], config) for module in wanted or tests]
    total = ["all", *(sum(column) for column in list(zip(*table, strict=True))[1:])]
    with open("out/mutation.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["module", "mutants", "killed", "survived"])
        rows.writerows(table)
    width = max(len(row[0]) for row in table)
    print(f"\n{'module':{width}}  mutants  killed  survived  killed %")
    for name, mutants, killed, survived in [*table, total]:
        print(
            f"{name:{width}}  {mutants:7}  {killed:6}  {survived:8}  {share(killed, mutants):8.1f}"
        )
    below = [row[0] for row in [*table, total] if share(row[2], row[1]) < config["floor"]]
    verdict = f"below it: {', '.join(below)}" if below else "passed"
    print(
        f"cosmic-ray {version('cosmic-ray')}: {total[2]} of {total[1]} mutants killed, "
        f"at least {config['floor']} % of each module asked for: {verdict}"
    )
    return int(bool(below))


def share(killed: int, mutants: int) -> float:
    """Per cent."""
    return 100 * killed / mutants if mutants else 100.0


def one(module: str, tests: list[str], config: ConfigDict) -> tuple[str, int, int, int]:
    """Name, mutants, killed, survived of a module."""
    name = module.removesuffix(".py").replace("/", ".")
    script, socket = str(HERE / "mutation_server.py"), f"{name}.socket"
    server = [sys.executable, script, socket]
    start = time.monotonic()
    with subprocess.Popen([*server, module, *tests], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready, _, took = process.stdout.readline().partition(" ")
            if ready != "ready":
                sys.exit(f"{module}: no tests to run mutants with")
            run = ConfigDict(
                {
                    "timeout": config.timeout,
                    "test-command": shlex.join([sys.executable, "-S", "-E", script, socket]),
                    "distributor": {"name": "local"},
                }
            )
            with use_db(f"out/{name}.sqlite", WorkDB.Mode.create) as session:
                init([Path(module)], session, {})
                skip(session, Path(module))
                count = len(session.pending_work_items)
                print(f"=== {module}: {count} changes, tests of {float(took):.1f} s", flush=True)
                execute(session, run)
                return report(module, name, session, time.monotonic() - start)
        finally:
            process.terminate()


def report(module: str, name: str, session: WorkDB, took: float) -> tuple[str, int, int, int]:
    """Prints the survivors; the row of the table."""
    killed, survivors = 0, []
    for item, result in session.completed_work_items:
        if result.worker_outcome is WorkerOutcome.SKIPPED:
            continue
        said = (result.output or "").partition("\n")[0]
        if said == NOT_PYTHON:
            continue
        # Else nothing was tested: a server that is gone does not kill mutants.
        if result.worker_outcome is not WorkerOutcome.NORMAL or said != TESTED:
            sys.exit(f"{module}: {item} was not tested: {result.output}")
        if result.test_outcome is TestOutcome.KILLED:
            killed += 1
        else:
            survivors.append((item.mutations[0], result.diff))
    survivors.sort(key=lambda pair: (pair[0].start_pos, pair[0].operator_name))
    with open(f"out/{name}.survivors.txt", "w") as file:
        for mutation, diff in survivors:
            changed = [line for line in diff.split("\n")[3:] if line.startswith(("-", "+"))]
            where = f"{module}:{mutation.start_pos[0]}"
            print(f"survived: {where}", *changed, sep="\n", file=file)
            print(f"survived: {where}", *changed, sep="\n")
    print(f"--- {module}: {killed} killed, {len(survivors)} survived ({took:.0f} s)", flush=True)
    return module, killed + len(survivors), killed, len(survivors)


def skip(session: WorkDB, path: Path) -> None:
    """Leaves out mutants of what is never run: types."""
    spans = list(types(ast.parse(path.read_text(encoding="utf-8"))))
    skipped = WorkResult(output="a type", worker_outcome=WorkerOutcome.SKIPPED)
    for item in session.work_items:
        at = tuple(item.mutations[0].start_pos)
        if any(start <= at < end for start, end in spans):
            session.set_result(item.job_id, skipped)


def types(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations, aliases such as ``float | int`` and what only type checkers read stand."""
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                yield span(part)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield span(node)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
            names = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
            if names <= {"bool", "float", "int", "str", "Tensor"}:
                yield span(node)


def span(node: ast.stmt | ast.expr) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where it begins and ends: line and column."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


if __name__ == "__main__":
    sys.exit(main())
