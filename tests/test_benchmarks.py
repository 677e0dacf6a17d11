"""The benchmarks as files: README says what the results say, run_gpu.sh names what exists."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

BENCHMARKS = ROOT / "benchmarks"
RUN_GPU = BENCHMARKS / "run_gpu.sh"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks/ is not in this copy")


def options(script: Path) -> set[str]:
    """What a benchmark's parser knows, its own options and the shared ones."""
    text = script.read_text() + (BENCHMARKS / "common.py").read_text()
    return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', text))


def test_readme_is_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "readme.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_cpu_results_hold_no_times() -> None:
    for path in (BENCHMARKS / "results").glob("*_cpu.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows, path
        for row in rows:
            assert not any(row.get(column) for column in ("us", "us eager")), path
            assert row["device"], path
            assert row["commit"], path
            assert row["command"].startswith("python benchmarks/"), path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_run_gpu_is_a_script() -> None:
    done = subprocess.run(["bash", "-n", str(RUN_GPU)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_run_gpu_names_what_exists() -> None:
    # A command with its continued lines is one line; comments are not commands.
    text = re.sub(r"\\\n\s*", " ", RUN_GPU.read_text())
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    code = "\n".join(lines)
    optional = {"benchmarks/bench_maps.py"}  # guarded by a test -f
    for name in re.findall(r"benchmarks/\w+\.(?:py|sh)", text):
        assert name in optional or (ROOT / name).exists(), name

    run = [(f"{m[1]}.py", m[2]) for m in re.finditer(r"^ *bench (\w+) (.*)$", code, re.M)]
    run += [(f"{m[1]}.py", m[2]) for m in re.finditer(r"benchmarks/(\w+)\.py(.*)$", code, re.M)]
    assert {"bench_neuron.py", "bench_overhead.py", "bench_memory.py", "five_kernels.py"} <= {
        name for name, _ in run
    }
    shared = {"--device", "--out", "--quick"}  # of the function that starts every benchmark
    for name, arguments in run:
        if not (BENCHMARKS / name).exists():
            continue
        known = options(BENCHMARKS / name)
        given = {o for o in re.findall(r"--[a-z][\w-]*", arguments) if "=" not in o}
        assert given <= known, (name, given - known)
        if name.startswith("bench_"):
            assert shared <= known, name

    sections = re.search(r"--section ([\w ]+?) \$", code)
    assert sections is not None
    listed = re.search(r"SECTIONS = \((.*?)\)", (BENCHMARKS / "bench_neuron.py").read_text())
    assert listed is not None
    assert set(sections[1].split()) == set(re.findall(r'"(\w+)"', listed[1]))


def test_run_gpu_selects_tests_that_exist() -> None:
    small = re.search(r'^small="(.*)"$', RUN_GPU.read_text(), re.M)
    assert small is not None
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in small[1].split(" or "):
        assert f"def {name}" in tests, name


def test_requirements_are_pinned() -> None:
    for name in ("requirements.txt", "constraints.txt"):
        for line in (BENCHMARKS / name).read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.fullmatch(r"[\w.-]+==[\w.]+", line.split("#")[0].strip()), line
