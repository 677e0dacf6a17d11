"""The workflows for hosted runners: what they run is pinned, what they may do is said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, optional

yaml = optional("yaml")
FOLDER = ROOT / ".github" / "workflows"
if not FOLDER.exists():
    pytest.skip("no workflows beside these tests", allow_module_level=True)
FILES = sorted(FOLDER.glob("*.y*ml"))
PINNED = re.compile(r"(?P<action>[\w.-]+/[\w./-]+)@(?P<hash>[0-9a-f]{40}) # v\d+\.\d+\.\d+")
every = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def uses_of(text: str) -> list[str]:
    """What follows `uses:`, comments included."""
    return [m[1].strip() for m in re.finditer(r"^\s*(?:- )?uses:(.*)$", text, re.M)]


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job.get("steps", [])


def load(path: Path) -> dict[str, Any]:
    workflow: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    # YAML 1.1 reads the key `on` as a truth value.
    workflow["on"] = workflow.pop(True)
    return workflow


def test_there_are_workflows() -> None:
    assert {path.stem for path in FILES} >= {"ci", "nightly", "release"}


def test_actions_are_pinned_by_one_hash_each() -> None:
    hashes: dict[str, set[str]] = {}
    for path in FILES:
        for use in uses_of(path.read_text(encoding="utf-8")):
            if use.startswith("./"):
                # Of this commit; the comment is for the linter.
                assert (ROOT / use.split()[0]).is_file()
                continue
            found = PINNED.fullmatch(use)
            assert found, f"{path.name}: {use}: not owner/action@<40 hex digits> # v1.2.3"
            hashes.setdefault(found["action"], set()).add(use)
    assert hashes
    assert {action: uses for action, uses in hashes.items() if len(uses) > 1} == {}


@every
def test_every_use_was_seen(path: Path) -> None:
    """What the pattern above reads is what YAML reads."""
    workflow = load(path)
    read = [step["uses"] for step in steps(workflow) if "uses" in step]
    read += [job["uses"] for job in workflow["jobs"].values() if "uses" in job]
    seen = [use.split(" #")[0] for use in uses_of(path.read_text(encoding="utf-8"))]
    assert sorted(read) == sorted(seen)


@every
def test_permissions(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(workflow["on"])
    for name, job in workflow["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 360
        granted = {k for k, v in job.get("permissions", {}).items() if v == "write"}
        allowed = {
            ("release.yml", "publish"): {"id-token", "attestations"},
            ("release.yml", "page"): {"contents"},
        }
        assert granted == allowed.get((path.name, name), set())
        assert ("id-token" in granted) == ("environment" in job)
        # Who may write runs nothing that comes out of the repository.
        if granted:
            assert not [s for s in job["steps"] if "checkout" in s.get("uses", "")]


@every
def test_steps(path: Path) -> None:
    for step in steps(load(path)):
        # Through `env`: an expression in a script is pasted into it.
        assert "${{" not in step.get("run", "")
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


@every
def test_scripts_exist(path: Path) -> None:
    scripts = {
        script
        for step in steps(load(path))
        for script in re.findall(r"(?<![\w/])\.ci/[\w.-]+", step.get("run", ""))
    }
    assert scripts
    for script in scripts:
        assert (ROOT / script).is_file()
        assert script.endswith(".txt") or (ROOT / script).stat().st_mode & 0o100


def test_pins_of_the_tools_have_hashes() -> None:
    for name in ("build-requirements", "release-requirements"):
        lines = (ROOT / ".ci" / f"{name}.txt").read_text().replace("\\\n", " ").splitlines()
        pins = [line for line in lines if line.strip() and not line.startswith("#")]
        assert pins
        for pin in pins:
            assert re.match(r"[\w.-]+==\S+ ", pin)
            assert "--hash=sha256:" in pin
        wanted = {
            line
            for line in (ROOT / ".ci" / f"{name}.in").read_text().splitlines()
            if line and not line.startswith("#")
        }
        assert wanted <= {pin.split("==")[0] for pin in pins}
