"""Saved networks and command lines with whatever is in them: a clear refusal, never a traceback.

Bytes of a saved folder are changed at random; so are fields of its JSON, with checksums that fit,
as somebody who means harm would write them. Loading gives a network or an error of the documented
types, and runs nothing that the files name.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import FUZZ, optional
from torch import nn

import snnkernels
from snnkernels import cli

optional("safetensors")

CONFIG, GRAPH, WEIGHTS = "config.json", "graph.json", "model.safetensors"
fuzz = hypothesis.settings(max_examples=FUZZ, deadline=None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)),
    ).eval()
    x = torch.rand(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    snn = snnkernels.convert(net, x, T=4, progress=False)
    folder = tmp_path_factory.mktemp("fuzz") / "saved"
    snn.save_pretrained(folder)
    assert {p.name for p in folder.iterdir()} >= {CONFIG, GRAPH, WEIGHTS}
    return folder


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What a hostile file might name, noted instead of run."""
    ran: list[Any] = []
    for owner, name in ((os, "system"), (os, "popen"), (subprocess, "Popen"), (torch, "load")):
        monkeypatch.setattr(owner, name, lambda *a, _name=name, **k: ran.append((_name, a)))
    yield ran
    assert not ran


def answer_of(folder: Path) -> torch.Tensor | None:
    """What the loaded network answers; None: it was refused as documented."""
    refusal: Exception | None = None
    try:
        snn = snnkernels.load_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        refusal = error
    if refusal is not None:
        assert len(str(refusal)) > 20, repr(refusal)
        return None
    x = torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad():
            answer = snn(x)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
        # Operations on the list in an order that makes no sense, or for other inputs: any error of
        # theirs will do, as none of it was written by us.
        return torch.zeros(0)
    return answer if isinstance(answer, torch.Tensor) else torch.zeros(0)


def work_on(saved: Path, tmp_path: Path) -> Path:
    target = tmp_path / "changed"
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(saved, target))


@fuzz
@hypothesis.given(data=st.data())
def test_changed_bytes(
    saved: Path, tmp_path: Path, nothing_runs: list[Any], data: st.DataObject
) -> None:
    """Truncated, longer, or with other bytes: the same network, or a refusal."""
    folder = work_on(saved, tmp_path)
    path = folder / data.draw(st.sampled_from((CONFIG, GRAPH, WEIGHTS)))
    content = bytearray(path.read_bytes())
    how = data.draw(st.sampled_from(("bytes", "bytes", "cut", "more", "gone", "folder")))
    if how == "bytes":
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    elif how == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content += data.draw(st.binary(min_size=1, max_size=9))
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(content)
    answer = answer_of(folder)
    if path.name != CONFIG and answer is not None:
        assert torch.equal(answer, answer_of(saved))  # type: ignore[arg-type]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON document."""
    if at:
        yield at
    if not isinstance(value, (dict, list)):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from places(inner, (*at, key))


HOSTILE = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**40, 0.5, 1e308, "", "x", "os.system", "eval",
    "__import__", "torch.load", "builtins.exec", "call_function", "../../etc/passwd", "__class__",
    "nn.Module", [], {}, [1], [[]], {"os": "system"}, ["os.system", "true"], "A" * 5000,
)  # fmt: skip


@fuzz
@hypothesis.given(data=st.data())
def test_hostile_fields(
    saved: Path, tmp_path: Path, nothing_runs: list[Any], data: st.DataObject
) -> None:
    """Any field is anything, and the checksums fit."""
    draw, folder = data.draw, work_on(saved, tmp_path)
    documents = {name: json.loads((folder / name).read_text()) for name in (CONFIG, GRAPH)}
    for _ in range(draw(st.integers(1, 3))):
        document = documents[draw(st.sampled_from((CONFIG, GRAPH, GRAPH)))]
        found = list(places(document))
        way = found[draw(st.integers(0, len(found) - 1))]
        inner = document
        for key in way[:-1]:
            inner = inner[key]
        how = draw(st.sampled_from(("value", "value", "value", "another", "gone", "twice")))
        if how == "value":
            inner[way[-1]] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif how == "gone":
            del inner[way[-1]]
        elif how == "twice" and isinstance(inner, list):
            inner.append(copy.deepcopy(inner[way[-1]]))
        else:
            other = found[draw(st.integers(0, len(found) - 1))]
            value: Any = document
            try:
                for key in other:
                    value = value[key]
            except (KeyError, IndexError, TypeError):
                continue
            inner[way[-1]] = copy.deepcopy(value)
    (folder / GRAPH).write_text(json.dumps(documents[GRAPH]))
    entry = documents[CONFIG].get("files")
    if isinstance(entry, dict) and isinstance(entry.get(GRAPH), dict):
        content = (folder / GRAPH).read_bytes()
        entry[GRAPH] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / CONFIG).write_text(json.dumps(documents[CONFIG]))
    answer_of(folder)


def test_an_untouched_copy_loads(saved: Path, tmp_path: Path) -> None:
    """That the tests above change something that worked."""
    folder = work_on(saved, tmp_path)
    found, want = answer_of(folder), answer_of(saved)
    assert found is not None
    assert want is not None
    assert found.numel()
    assert torch.equal(found, want)


@pytest.mark.parametrize("value", ["gone", 1, None])
def test_flags_of_a_neuron_are_flags(saved: Path, tmp_path: Path, value: Any) -> None:
    """Found by the test above: it loaded, and was a KeyError when run."""
    folder = work_on(saved, tmp_path)
    graph = json.loads((folder / GRAPH).read_text())
    ways = [way for way in places(graph) if way[-1] == "store_v_seq"]
    assert ways
    inner = graph
    for key in ways[0][:-1]:
        inner = inner[key]
    if value == "gone":
        del inner["store_v_seq"]
    else:
        inner["store_v_seq"] = value
    (folder / GRAPH).write_text(json.dumps(graph))
    content = (folder / GRAPH).read_bytes()
    config = json.loads((folder / CONFIG).read_text())
    config["files"][GRAPH] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / CONFIG).write_text(json.dumps(config))
    said = r"no store_v_seq" if value == "gone" else r"store_v_seq.*true or false"
    with pytest.raises(ValueError, match=said):
        snnkernels.load_pretrained(folder)


WORDS = (
    "info", "methods", "demo", "convert", "eval", "explain", "sweep", "bench", "plot", "--json",
    "--version", "--help", "--traceback", "--T", "--method", "--out", "--seed", "--images",
    "--batch-size", "--threshold", "--v-init", "--maxpool", "--data", "--engine", "--neuron",
    "--layer", "--size", "--mean", "--std", "--force", "--weights", "--rounds", "--device",
    "0", "-1", "1", "16", "nan", "1e999", "opi", "none", "", " ", "/nonexistent/x", "cuda:99",
    "θ", "a=b", "--", "-", "-x", "99.9%", "x.y:z", "os:system",
)  # fmt: skip


@fuzz
@hypothesis.given(words=st.lists(st.sampled_from(WORDS), max_size=6))
def test_command_lines(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An exit code of the documented ones; with --json a document or nothing on stdout."""
    # What would train or measure for minutes if its arguments happened to be right.
    hypothesis.assume("demo" not in words[:2])
    hypothesis.assume("sweep" not in words[:2])
    hypothesis.assume("bench" not in words[:2] or "--neuron" not in words)
    hypothesis.assume("--traceback" not in words)  # it asks for the exception
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert code in (0, 1, 2), (code, err)
    assert "Traceback" not in err
    if code == 1:
        assert err.startswith("snnkernels "), err
    if "--json" in words and code == 1:
        assert set(json.loads(out)["error"]) == {"type", "message"}
    assert not [p for p in tmp_path.iterdir() if p.name not in ("snnkernels_demo",)]
