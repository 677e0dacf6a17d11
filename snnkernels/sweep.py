"""Methods times numbers of steps over a trained network: rows, a table, a picture.

A row is written as soon as it is measured and read back on the next call, so a sweep that was cut
off goes on where it stopped. All numbers of steps of a method come from one pass over the images
where the method allows it.
"""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .conversion import ConversionError, convert
from .conversion.methods import METHODS, Method, find_method
from .distributed.team import Team
from .engine import lower

__all__ = ["COLUMNS", "Trial", "added", "curves", "parse_trial", "sweep", "table"]

COLUMNS = (
    "network", "data", "images", "trial", "for T", "T", "extra steps", "accuracy", "as ANN",
    "ANN", "binary", "spikes", "hardware", "torch", "version",
    "commit",
)  # fmt: skip
_KEY = ("network", "data", "images", "trial", "for T")
# What a trial may say to convert(), beside its method's own options.
_ARGUMENTS = ("threshold", "v_init", "per_channel", "maxpool", "normalize")


@dataclass(frozen=True)
class Trial:
    """One line of a sweep: a method with its options, and what else ``convert`` is told."""

    label: str
    method: Method
    arguments: dict[str, Any]


def parse_trial(text: str) -> Trial:
    """``"opi"``, ``"srp:probe=8"``, ``"opi:v_init=zero,threshold=99.9%"``.

    Raises:
        ValueError: no such method or option; names those there are.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        find_method(name)
    kinds = {f.name: f.default for f in fields(METHODS[name])}
    options: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or (key not in kinds and key not in _ARGUMENTS):
            allowed = ", ".join((*kinds, *_ARGUMENTS))
            raise ValueError(f"{text!r}: {item!r} must be OPTION=VALUE with one of {allowed}")
        if key in kinds:
            options[key] = _value(text, key, value, kinds[key])
        else:
            arguments[key] = value == "True" if key == "per_channel" else _number_or_word(value)
    return Trial(text, METHODS[name](**options), arguments)


def _number_or_word(value: str) -> float | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _value(text: str, key: str, value: str, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            return {"True": True, "False": False}[value]
        return kind(value) if kind in (int, float, str) else _number_or_word(value)
    except (KeyError, ValueError):
        raise ValueError(f"{text!r}: {key}={value!r} is not of type {kind.__name__}") from None


def sweep(
    ann: nn.Module,
    test: Any,
    calibration: Any,
    trials: Sequence[Trial],
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    *,
    network: str,
    data: str,
    for_T: int = 8,
    batch_size: int = 64,
    engine: bool = False,
    store: Path | None = None,
    progress: Callable[[str, int], Any] | None = None,
    refused: dict[str, str] | None = None,
    process_group: Any = None,
) -> list[dict[str, Any]]:
    """Accuracy of every trial after each number of steps.

    Args:
        ann: maps ``[B, *]`` to logits ``[B, classes]``, in eval mode.
        test: a slice of it is ``(inputs, labels int64)``; it has a length.
        calibration: what ``convert`` takes as ``loader``; never test inputs.
        trials: see :func:`parse_trial`.
        steps: numbers of steps that answer; what a method adds is in ``extra steps``. Those above
            a method's ``most_steps`` give no row.
        network, data: names (with a hash, for a network) by which rows are known again.
        for_T: the number of steps that thresholds are made for.
        batch_size: test inputs a call.
        engine: run lowered (:func:`snnkernels.lower`): faster, and the same up to the order of
            sums. Rows say so beside the hardware.
        store: CSV of rows done before; new ones are added.
        progress: ``progress(what, total)`` is a context manager whose value has ``update(n)``.
        refused: filled with the trials that ``ann`` cannot be converted by and why, by label; None
            raises instead.
        process_group: of torch.distributed: every member makes the same call and gets the rows that
            one process would measure. Batches of calibration and test are dealt to the ranks; the
            first one reads and writes the store and shows progress. After a killed rank the same
            call, with any number of ranks, goes on with the trial that was under way.

    Returns:
        Rows with :data:`COLUMNS`: all of ``trials`` times ``steps``, those of the store included.
        ``as ANN`` is the share of inputs with the ANN's prediction; ``spikes`` is per neuron and
        step.

    Raises:
        ValueError: no trials, no steps, or a number of steps below 1.
        ConversionError: a trial that ``ann`` cannot be converted by, unless ``refused`` is given.
    """
    ends = sorted(set(steps))
    if not trials or not ends or ends[0] < 1:
        raise ValueError(f"steps={list(steps)!r} and trials must not be empty, steps at least 1")
    about = {"network": network, "data": data, "images": len(test), "for T": for_T}
    team = Team(process_group)
    progress = progress if team.leads else None
    done = team.broadcast(_read(store) if team.leads else None)
    rows: list[dict[str, Any]] = []
    truth: Tensor | None = None
    as_labels = 0
    for trial in trials:
        known = {
            int(row["T"]): row
            for row in done
            if all(str(row[k]) == str({**about, "trial": trial.label}[k]) for k in _KEY)
        }
        most = trial.method.most_steps
        missing = [T for T in ends if T not in known and not most < T]
        rows += [known[T] for T in ends if T in known]
        if not missing:
            continue
        try:
            snn = convert(
                ann, calibration, method=trial.method, T=for_T, progress=False,
                process_group=process_group, **trial.arguments,
            )  # fmt: skip
        except ConversionError as error:
            if refused is None:
                raise
            refused[trial.label] = str(error)
            continue
        if truth is None:
            truth, as_labels = _predictions(ann, test, batch_size, progress, team)
        run = lower(snn) if engine else snn
        right, same, rate = _measure(
            run, test, truth, missing, batch_size, trial.label, progress, team
        )
        new = [
            {
                **about,
                "trial": trial.label,
                "T": T,
                "extra steps": snn.latency(T) - T,
                "accuracy": round(right[i] / len(test), 6),
                "as ANN": round(same[i] / len(test), 6),
                "ANN": round(as_labels / len(test), 6),
                "binary": trial.method.binary,
                "spikes": round(rate, 4),
                **_machine(engine),
            }
            for i, T in enumerate(missing)
        ]
        if team.leads:
            _add(store, new)
        rows += new
    order = {trial.label: i for i, trial in enumerate(trials)}
    return sorted(rows, key=lambda row: (order[row["trial"]], int(row["T"])))


@torch.no_grad()
def _predictions(
    ann: nn.Module, test: Any, batch_size: int, progress: Any, team: Team
) -> tuple[Tensor, int]:
    """The ANN's predictions on this rank's batches, and how many of all are right."""
    predicted: list[Tensor] = []
    right = 0
    with _bar(progress, "ANN", len(test)) as bar:
        for x, y in _slices(test, batch_size, team):
            predicted.append(ann(x).argmax(1))
            right += int((predicted[-1] == y).sum())
            bar.update(len(y) * team.size)
    own = torch.cat(predicted) if predicted else torch.zeros(0, dtype=torch.int64)
    return own, int(team.sum(torch.tensor(right)))


@torch.no_grad()
def _measure(
    snn: Any,
    test: Any,
    predicted: Tensor,
    steps: list[int],
    batch_size: int,
    label: str,
    progress: Any,
    team: Team,
) -> tuple[list[int], list[int], float]:
    """Right answers and those the ANN gives, of all ranks, by number of steps; spikes a step."""
    counts = torch.zeros(2, len(steps), dtype=torch.int64)
    at = 0
    with _bar(progress, label, len(test)) as bar:
        for x, y in _slices(test, batch_size, team):
            answers = snn.predict_curve(x, steps)
            for i, T in enumerate(steps):
                guess = answers[T].argmax(1)
                counts[0, i] += int((guess == y).sum())
                counts[1, i] += int((guess == predicted[at : at + len(y)]).sum())
            at += len(y)
            bar.update(len(y) * team.size)
    right, same = team.sum(counts).tolist()
    rates = [row.rate for row in snn.report.rows if row.rate is not None]
    return right, same, sum(rates) / max(len(rates), 1)


def _slices(test: Any, batch_size: int, team: Team) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches."""
    for start in range(team.rank * batch_size, len(test), team.size * batch_size):
        yield test[start : start + batch_size]


@contextmanager
def _bar(progress: Any, what: str, total: int) -> Iterator[Any]:
    if progress is None:
        yield _NoBar()
        return
    with progress(what, total) as bar:
        yield bar


class _NoBar:
    def update(self, n: int = 1) -> None:
        """Do nothing."""


def _machine(engine: bool) -> dict[str, str]:
    from . import __version__

    device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name(0)
    if engine:
        device += ", lowered"
    return {
        "hardware": device,
        "torch": torch.__version__,
        "version": __version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of a source folder that this package runs from, or nothing."""
    here = Path(__file__).resolve().parents[1]
    if not (here / "setup.py").exists():
        return ""
    ask = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:
        return ""


def _read(store: Path | None) -> list[dict[str, str]]:
    if store is None or not store.exists():
        return []
    with store.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # A line that a killed process left half-written is measured again.
    return [row for row in rows if None not in row.values() and set(COLUMNS) <= set(row)]


def _add(store: Path | None, rows: list[dict[str, Any]]) -> None:
    if store is None:
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    kept = _read(store)
    new = store.with_suffix(store.suffix + ".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*kept, *rows])
    new.replace(store)


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows by trial and number of steps, in their order."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["trial"], {})[int(row["T"])] = row
    return found


def added(curve: dict[int, dict[str, Any]]) -> str:
    """The steps that a trial adds: a number, a multiple of T ("6 T"), or a list by T."""
    extra = {T: int(row["extra steps"]) for T, row in sorted(curve.items())}
    if len(set(extra.values())) == 1 and len(extra) > 1:
        return str(extra.popitem()[1])
    parts = {steps / T for T, steps in extra.items()}
    if len(parts) == 1 and len(extra) > 1 and (part := parts.pop()).is_integer():
        return f"{int(part)} T"
    return ", ".join(map(str, extra.values()))


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of accuracies in percent; methods whose spikes are not binary stand below.

    An empty line parts them, and each line says how many steps its method adds.
    """
    found = curves(rows)
    steps = sorted({T for curve in found.values() for T in curve})
    header = ["method", "adds", *(f"T={T}" for T in steps)]
    lines: list[list[str]] = []
    for binary in (True, False):
        part = []
        for trial, curve in found.items():
            first = next(iter(curve.values()))
            if (str(first["binary"]) == "True") is not binary:
                continue
            cells = [
                f"{100 * float(curve[T]['accuracy']):.2f}" if T in curve else "" for T in steps
            ]
            name = trial if binary else f"{trial} (not binary)"
            part.append([name, added(curve), *cells])
        if part and lines:
            lines.append([""] * len(header))
        lines += part
    return header, lines
