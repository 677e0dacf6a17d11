"""The command: arguments, exit codes, tables with and without rich, pictures, the whole demo."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PACKAGE, optional

import snnkernels
from snnkernels import cli, data, models
from snnkernels.commands import demo, info
from snnkernels.commands.output import plain

DEMO_PACKAGES = ("rich", "tqdm", "matplotlib", "sklearn", "safetensors", "PIL")


# In a clone, python -c and -m import the source folder: run elsewhere, on the copy under test.
ELSEWHERE: dict[str, Any] = {
    "capture_output": True,
    "text": True,
    "check": False,
    "cwd": sys.prefix,
    "env": {**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
}


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], **ELSEWHERE)


@pytest.fixture
def no_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)


TABLE = ("Numbers", ["", "a", "bb"], [["one", "1", "2"], ["", "", ""], ["three", "10", "[2]"]])


def test_plain_table(capsys: pytest.CaptureFixture[str], no_rich: None) -> None:
    cli.print_table(*TABLE)
    assert capsys.readouterr().out.splitlines() == [
        "Numbers",
        "        a   bb",
        "--------------",
        "one     1    2",
        "--------------",
        "three  10  [2]",
    ]


def test_rich_table_shows_the_same_cells(capsys: pytest.CaptureFixture[str]) -> None:
    optional("rich")
    cli.print_table(*TABLE)
    out = capsys.readouterr().out
    assert "Numbers" in out
    assert [line.split() for line in out.splitlines() if "three" in line] == [
        ["three", "10", "[2]"]
    ]


def test_wide_tables_are_not_cut(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    header = [f"column {i}" for i in range(20)]
    cli.print_table("Wide", header, [[f"cell number {i}" for i in range(20)]])
    out = capsys.readouterr().out
    assert all(f"cell number {i}" in out for i in range(20))


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    for m in snnkernels.methods():
        at = lines.index(m["name"] + ("" if m["binary"] else " (not binary)"))
        assert lines[at + 1].strip().startswith(m["source"][:30])
        assert lines[at + 2 :]
    assert "options: probe=4, margin=0.001" in out
    assert max(map(len, lines)) <= 100
    assert cli.main(["methods", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)] == [
        m["name"] for m in snnkernels.methods()
    ]


def test_markdown_table() -> None:
    assert cli.markdown_table(*TABLE[1:]) == (
        "|  | a | bb |\n| --- | ---: | ---: |\n| one | 1 | 2 |\n| three | 10 | [2] |\n"
    )


COMMANDS = ("info", "methods", "demo", "convert", "eval", "explain", "sweep", "bench", "plot")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main([command, "--help"])
    assert error.value.code == 0
    said = capsys.readouterr().out
    examples = said.partition("examples:\n")[2].splitlines()
    assert len(examples) >= 2
    assert all(line.startswith("  ") and f"snnkernels {command}" in said for line in examples)
    assert "--json" in said
    assert max(map(len, said.splitlines())) <= 100
    # What examples show is what the parser takes.
    text = "\n".join(examples).replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line.partition(" | ")[0])
        if words[:2] == ["snnkernels", command]:
            cli._parser().parse_args(words[1:])


def test_help_says_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {code:<4} " in said for code in (0, 1, 2, 130))
    assert all(f"\n    {command} " in said for command in COMMANDS)


def test_long_errors_are_one_line(monkeypatch, capsys) -> None:
    def fail(args: object) -> None:
        print("before")
        raise RuntimeError("one\n  two\nthree")

    monkeypatch.setattr(info, "_info", fail)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "snnkernels info: RuntimeError: one two three\n"
    # With --json nothing else reaches stdout.
    assert cli.main(["info", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["message"] == "one two three"
    assert err == "snnkernels info: RuntimeError: one two three\n"


def test_a_reader_that_has_gone_is_no_error() -> None:
    code = "import sys; from snnkernels.cli import main; sys.exit(main(['methods']))"
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "{sys.executable}" -c "{code}" | true'], **ELSEWHERE
    )
    assert done.stderr == ""


def test_documents_hold_what_json_has() -> None:
    given = {1: float("nan"), "a": (Path("x"), torch.tensor([1.5, 2.0])), "b": {"c": None}}
    assert plain(given) == {"1": None, "a": ["x", [1.5, 2.0]], "b": {"c": None}}


@pytest.mark.parametrize("argv", [
    [], ["nothing"], ["demo", "--epochs", "0"], ["demo", "--epochs", "x"], ["info", "--x"],
    ["convert"], ["convert", "x", "--T", "0"], ["eval"], ["plot", "x", "--kind", "nothing"],
])  # fmt: skip
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert "usage: snnkernels" in err
    assert out == ""
    # A script gets its one document here as well.
    with pytest.raises(SystemExit) as error:
        cli.main([*argv, "--json"])
    assert error.value.code == 2
    out, err = capsys.readouterr()
    found = json.loads(out)["error"]
    assert found["type"] == "ArgumentError"
    assert f"error: {found['message']}\n" in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("the reason"), 1, "snnkernels info: ValueError: the reason\n"),
        (ImportError("pip install it"), 1, "snnkernels info: ImportError: pip install it\n"),
        (KeyboardInterrupt("interrupted"), 130, "\ninterrupted\n"),
    ],
)
def test_errors_become_exit_codes(monkeypatch, capsys, error, code, said) -> None:
    def fail(args: object) -> None:
        raise error

    monkeypatch.setattr(info, "_info", fail)
    assert cli.main(["info"]) == code
    assert capsys.readouterr().err == said
    if code == 1:
        with pytest.raises(type(error)):
            cli.main(["--traceback", "info"])
    assert cli.main(["info", "--json"]) == code
    out, err = capsys.readouterr()
    assert err == said
    assert json.loads(out) == {"error": {"type": type(error).__name__, "message": str(error)}}


def test_a_defect_is_a_document_and_a_traceback(monkeypatch, capsys) -> None:
    def fail(args: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(info, "_info", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == {"error": {"type": "ZeroDivisionError", "message": "of ours"}}


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    table = capsys.readouterr().out
    assert table == str(snnkernels.backend_info()) + "\n"
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(
        json.dumps(snnkernels.backend_info().to_dict())
    )
    for row in snnkernels.backend_info().rows:
        assert row.name in table


def test_info_needs_torch_and_numpy_only() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({DEMO_PACKAGES!r}))\n"
    done = run_python(blocked + "from snnkernels.cli import main\nsys.exit(main(['info']))")
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout


def test_module_runs_as_command() -> None:
    done = subprocess.run([sys.executable, "-m", "snnkernels", "info", "--json"], **ELSEWHERE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert done.stderr == ""


def test_command_line_import_is_lean() -> None:
    code = (
        "import sys, torch; before = set(sys.modules)\n"  # torch itself may bring tqdm
        "import snnkernels.cli; print(*set(sys.modules) - before)"
    )
    loaded = set(run_python(code).stdout.split())
    assert "snnkernels.cli" in loaded
    assert loaded.isdisjoint(DEMO_PACKAGES)


def test_training_is_reproducible() -> None:
    optional("sklearn")
    train = data.digits()
    few = data.ImageSet(
        train.images[:96],
        train.labels[:96],
        name="few",
        classes=train.classes,
        mean=train.mean,
        std=train.std,
        full_scale=16.0,
    )
    first, second, other = (demo._train(few, 1, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("sklearn", "matplotlib", "safetensors"):
        optional(package)
    out = tmp_path / "made" / "here"
    assert cli.main(["demo", "--epochs", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = {}
    for line in printed.splitlines():
        cells = line.split()
        if cells[:1] == ["ANN"]:
            rows["ANN"] = [float(c) for c in cells[1:]]
        elif cells[:2] == ["T", "="] and len(cells) == 5:
            rows[int(cells[2])] = [float(c) for c in cells[3:]]
    assert list(rows) == ["ANN", 1, 2, 4, 8, 16, 32]
    zero, half = zip(*rows.values(), strict=True)
    assert zero[0] == half[0] > 90
    assert half[-1] > half[0] - 1.5
    assert half[4] >= zero[4]
    assert str(out.resolve()) in printed
    for name in ("accuracy_vs_T.png", "raster.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert name in printed
    checkpoint = models.load_checkpoint(out / "small_cnn.safetensors")
    x, y = data.digits(False)[:]
    with torch.no_grad():
        accuracy = float((checkpoint.model(x).argmax(1) == y).float().mean())
    assert f"{100 * accuracy:.1f}" == f"{zero[0]:.1f}"
    available = {row.name: row.available for row in snnkernels.backend_info().rows}
    assert ("equal spikes" if available["cpu"] else "No fused CPU kernel") in printed


def test_demo_without_its_packages(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- pictures -------------------------------------------------------------------------------


@pytest.fixture
def plots():
    matplotlib = optional("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from snnkernels import plots

    yield plots
    pyplot.close("all")


def test_accuracy_curve(plots) -> None:
    ax = plots.accuracy_curve([1, 2, 4], [0.1, 0.5, 0.9])
    assert [line.get_ydata().tolist() for line in ax.lines] == [[10.0, 50.0, 90.0]]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "4"]
    assert ax.get_legend() is None
    curves = {"a": [0.1, 0.5, 0.9], "b": [0.2, 0.6, 1.0]}
    again = plots.accuracy_curve([1, 2, 4], curves, ann=0.95, ax=(other := ax.figure.add_subplot()))
    assert again is other
    labels = [text.get_text() for text in again.get_legend().get_texts()]
    assert labels == ["ANN (95.0 %)", "a", "b"]


def test_accuracy_curve_refuses(plots) -> None:
    with pytest.raises(ValueError, match="acc has 2 values, ts has 3"):
        plots.accuracy_curve([1, 2, 4], [0.1, 0.5])
    for ts in ([], [0, 1]):
        with pytest.raises(ValueError, match="at least 1"):
            plots.accuracy_curve(ts, [0.1] * len(ts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool, torch.bfloat16])
def test_raster_draws_each_spike_once(plots, dtype: torch.dtype) -> None:
    spikes = torch.zeros(5, 2, 3)
    spikes[0, 0, 1] = spikes[4, 1, 2] = 0.25
    ax = plots.raster((spikes != 0).to(dtype))
    (ticks,) = ax.collections
    centres = [segment.mean(0).tolist() for segment in ticks.get_segments()]
    assert centres == [[1.0, 1.0], [5.0, 5.0]]
    assert plots.raster(spikes.numpy(), ax) is ax
    with pytest.raises(ValueError, match="1 dimension"):
        plots.raster(torch.zeros(3))


def test_raster_without_spikes(plots) -> None:
    for shape in ((4, 3), (0, 3), (4, 0)):
        plots.raster(torch.zeros(shape)).figure.canvas.draw()


def test_pictures_need_no_pyplot_when_given_axes() -> None:
    optional("matplotlib")
    code = (
        "import sys; from matplotlib.figure import Figure; from snnkernels import plots\n"
        "plots.raster(__import__('torch').eye(3), Figure().subplots())\n"
        "plots.accuracy_curve([1], [1.0], ax=Figure().subplots())\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_missing_matplotlib_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from snnkernels import plots

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plots.accuracy_curve([1], [1.0])


def test_the_demo_as_a_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("sklearn", "matplotlib", "safetensors"):
        optional(package)
    torch.manual_seed(0)
    ann = models.small_cnn().eval()  # what it says is tested above; here how
    monkeypatch.setattr(demo, "_train", lambda *args: ann)
    assert cli.main(["demo", "--out", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["folder"] == str(tmp_path)
    assert list(found["accuracy"]) == ["v_init = 0", "v_init = θ/2"]
    assert list(found["accuracy"]["v_init = 0"]) == ["1", "2", "4", "8", "16", "32"]
    available = {row.name: row.available for row in snnkernels.backend_info().rows}
    assert (found["kernel over reference"] is not None) is available["cpu"]
