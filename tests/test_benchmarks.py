"""The benchmarks as files: README says what the results say, run_gpu.sh names what exists."""

from __future__ import annotations

import csv
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

import snnkernels
from snnkernels.sweep import COLUMNS

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


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "sweeps", raising=False)
    return importlib.import_module("sweeps")


def sweep_row(trial: str, T: int, accuracy: float, **more: Any) -> dict[str, Any]:
    row = dict.fromkeys(COLUMNS, "")
    row |= {"network": "net 0123abc", "data": "digits", "images": 1000, "trial": trial, "for T": 8}
    row |= {"T": T, "extra steps": 0, "accuracy": accuracy, "ANN": 0.9, "binary": True}
    return row | {"hardware": "a CPU", "torch": "2", "commit": "abc"} | more


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_tables_of_a_sweep(sweeps: Any, tmp_path: Path) -> None:
    rows = [sweep_row("burst", T, 0.5, binary=False) for T in (1, 2)]
    rows += [sweep_row("ttfs", T, 0.25, **{"extra steps": 3 * T}) for T in (1, 2)]
    rows += [sweep_row("srp", T, 0.125, **{"extra steps": 4}) for T in (1, 2)]
    rows += [sweep_row("opi", 2, 0.875), sweep_row("opi", 2, 0.8755)]  # measured again
    text = sweeps.sweep_tables(write_rows(tmp_path / "sweep.csv", rows))
    assert text.splitlines() == [
        "**net** (checkpoint 0123abc), ANN 90.0, 1000 test images, thresholds from data made for "
        "T = 8:",
        "",
        "| method | adds | T=1 | T=2 |",
        "| --- | ---: | ---: | ---: |",
        "| `ttfs` | 3 T | 25.0 | 25.0 |",
        "| `srp` | 4 | 12.5 | 12.5 |",
        "| `opi` | 0 |  | 87.5 |",
        "| `burst` (not binary) | 0 | 50.0 | 50.0 |",
        "",
        "(digits; a CPU; torch 2; commit abc)",
    ]


def test_tables_of_other_networks_data_and_thresholds_are_apart(
    sweeps: Any, tmp_path: Path
) -> None:
    rows = [sweep_row("opi", 1, 0.5), sweep_row("opi", 1, 0.5, **{"for T": 4})]
    rows += [sweep_row("opi", 1, 0.5, data="other"), sweep_row("opi", 1, 0.5, network="two")]
    rows += [sweep_row("cos", 1, 0.5, network="two", images=99)]
    text = sweeps.sweep_tables(write_rows(tmp_path / "sweep.csv", rows))
    assert text.count("| method |") == 4
    assert "**two**, ANN 90.0, 99/1000 test images" in text
    assert "| `cos` | 99 | 0 | 50.0 |" in text


def test_tables_of_half_a_file_and_of_none(sweeps: Any, tmp_path: Path) -> None:
    assert "No rows yet: `snnkernels sweep`" in sweeps.chosen(tmp_path / "sweep_cifar10.csv")
    assert "No rows yet: `benchmarks/error_sources.py`" in sweeps.error_tables(
        tmp_path / "error_sources.csv"
    )
    path = write_rows(tmp_path / "sweep.csv", [sweep_row("opi", 1, 0.5), sweep_row("cos", 1, 0.5)])
    text = path.read_text()
    path.write_text(text[: text.rindex("0.5")])  # a line that was cut off
    assert "| `opi` | 0 | 50.0 |" in sweeps.chosen(path)
    assert "cos" not in sweeps.chosen(path)
    path.write_text(text.splitlines()[0])
    assert "No rows yet" in sweeps.sweep_tables(path)
    path.write_text("")
    assert "No rows yet" in sweeps.sweep_tables(path)


def test_readme_shows_what_it_chooses(sweeps: Any, tmp_path: Path) -> None:
    rows = [sweep_row(trial, 1, 0.5) for trial in ("parallel", "kl", "opi")]
    text = sweeps.chosen(write_rows(tmp_path / "sweep.csv", rows))
    assert text.index("`opi`") < text.index("`parallel`")
    assert "kl" not in text


def test_tables_of_errors(sweeps: Any, tmp_path: Path) -> None:
    row = {"network": "net 01", "method": "opi", "T": 8, "layer": "a", "θ": "1.5", "rate": 0.04}
    row |= {"error": 0.5, "clipping": 0.25, "quantisation": "", "unevenness": 0, "inherited": 0.1}
    path = write_rows(tmp_path / "errors.csv", [row, {**row, "layer": "b", "error": ""}])
    assert sweeps.error_tables(path).splitlines()[-1] == (
        "| a | 1.5 | 4.0 % | 50.0 % | 25.0 % |  | 0.0 % | 10.0 % |"
    )


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_pages_name_every_method(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for method in snnkernels.methods():
        assert f"`{method['name']}`" in text, method["name"]


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


def test_page_of_other_libraries_tests_is_what_the_rows_say() -> None:
    page = (ROOT / "docs" / "interop_suites.md").read_text(encoding="utf-8")
    with (BENCHMARKS / "results" / "interop_suites.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["library"].split()[0] for row in rows} == {"spikingjelly", "sinabs", "norse"}
    for row in rows:
        plain, ours = (re.findall(r"(\d+) (\w+)", row[c]) for c in ("plain", "with the plug-in"))
        if row["library"].startswith("spikingjelly"):
            name = re.search(r"test_\w+", row["tests"])[0]  # type: ignore[index]
            (line,) = re.findall(rf"^\| (?:on PyPI: )?`{name}`.*$", page, re.M)
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert plain[0][0] in re.findall(r"\d+", cells[1]), line
            assert ours[0][0] in re.findall(r"\d+", cells[2]), line
            assert cells[3] == row["calls of ours"], line
        else:
            said = ", ".join(f"{count} {what}" for count, what in plain)
            assert plain == ours
            assert f"| {said} | {said} |" in page


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
    small = "".join(re.findall(r'^small\+?="(.*)"$', RUN_GPU.read_text(), re.M))
    assert small.count(" or ") > 5
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in small.split(" or "):
        assert f"def {name}(" in tests, name


@pytest.mark.slow
def test_whole_networks_run_without_rivals(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_network.py"), "--quick", "--threads", "1",
         "--networks", "tiny-max", "--out", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "network_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"time", "passes", "throughput", "memory"} == {row["section"] for row in rows}
    timed = {r["implementation"]: r for r in rows if r["section"] == "time"}
    assert {"plan", "plan, int16", "unlowered", "ANN"} <= timed.keys()
    for row in timed.values():
        assert row["relative"] or row["note"].startswith("skipped: "), row
    # What is compared computes the same: but for roundings, spike by spike.
    assert float(timed["plan"]["max diff"]) < 1e-4 * float(timed["plan"]["largest logit"])
    with (tmp_path / "engine_cost.csv").open(newline="") as file:
        costs = list(csv.DictReader(file))
    assert {row["precision"] for row in costs} == {"float32", "int16"}
    assert any(row["measured / predicted"] for row in costs)


def test_requirements_are_pinned() -> None:
    for name in ("requirements.txt", "constraints.txt"):
        for line in (BENCHMARKS / name).read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.fullmatch(r"[\w.-]+==[\w.]+", line.split("#")[0].strip()), line


def test_scaling_page_is_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("bench_scaling")
    with (BENCHMARKS / "results" / "scaling_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert bench.markdown(rows) in page


def test_trust_page_is_what_the_results_say() -> None:
    page = (ROOT / "docs" / "trust.md").read_text()

    def rows(name: str) -> list[dict[str, str]]:
        with (BENCHMARKS / "results" / name).open(newline="") as file:
            return list(csv.DictReader(file))

    mutants = killed = 0
    for row in rows("mutation.csv"):
        cells = (row["mutants"], row["killed"], row["survived"])
        assert f"| `{row['module']}` | {' | '.join(cells)} | " in page, row
        mutants, killed = mutants + int(cells[0]), killed + int(cells[1])
    assert f"{100 * killed / mutants:.1f} % of {mutants:,} killed" in page
    whole = {row["file"]: row for row in rows("coverage.csv")}["TOTAL"]
    lines, missed = int(whole["lines"]), int(whole["lines_missed"])
    assert f"{100 * (1 - missed / lines):.1f} % of {lines:,} lines" in page
    assert f"of {int(whole['branches']):,} branches" in page
    examples = rows("fuzz_nightly.csv")
    assert {(row["examples_passed"], row["examples_failed"]) for row in examples} == {
        ("20000", "0")
    }
    operators = [row for row in examples if row["test"].startswith("tests/test_fuzz.py")]
    assert f"{len(operators)} x 20,000" in page
