"""One pass of all ranks over dealt batches: they fail together, and a pass cut off goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import new_file
from .dealing import _DIFFERENT, Dealt
from .team import Team, portable

__all__ = ["Checkpoint", "bar_of", "run"]

EVERY = 16  # batches of a rank between two meetings
SECONDS = 300.0  # between two checkpoints


class Checkpoint:
    """What a pass has found so far, in a file that a kill leaves whole.

    Args:
        path: of the file, seen by rank 0; None: nothing is kept.
        team: the ranks.
        about: what the numbers belong to, of plain values; another pass does not go on with them.

    Attributes:
        done: number of batches, from the loader's first, that the file has; -1: all of them.
        state: what was found on them, on rank 0.

    Raises:
        ValueError: the file is none of these, or was left by another pass.
    """

    def __init__(self, path: Any, team: Team, about: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.team, self.about = team, about
        self.done, self.state = 0, None
        self._last = time.monotonic()
        if self.path is None:
            return
        found, problem = None, None
        if team.leads and not self.path.parent.is_dir():
            problem = "is in a folder that does not exist"
        elif team.leads and self.path.exists():
            try:
                found = torch.load(self.path, map_location="cpu", weights_only=True)
                theirs, _, _ = dict(found["about"]), int(found["done"]), found["state"]
            except Exception as error:  # whatever a file that is none of ours makes torch raise
                kind = type(error).__name__
                problem = f"is no checkpoint of a calibration or evaluation ({kind})"
            else:
                differ = [k for k in {**about, **theirs} if theirs.get(k) != about.get(k)]
                problem = f"was left by another run: {', '.join(differ)} differ" if differ else None
        problem = team.broadcast(problem)
        if problem:
            raise ValueError(f"checkpoint={str(self.path)!r} {problem}: give another")
        self.state = None if found is None else found["state"]
        self.done = team.broadcast(0 if found is None else int(found["done"]))

    def due(self) -> bool:
        """Whether it is time to write; rank 0 decides."""
        return self.path is not None and time.monotonic() - self._last > SECONDS

    def write(self, done: int, state: Any) -> None:
        """Write the file, on rank 0; ``done`` is -1 when the pass is complete.

        Raises:
            OSError: on every rank.
        """
        if self.path is None:
            return
        failed = None
        if self.team.leads:
            try:
                with new_file(self.path) as new, new.open("wb") as file:
                    torch.save({"about": self.about, "done": done, "state": state}, file)
            except (OSError, RuntimeError) as error:  # a full disk: the file before stays
                failed = OSError(f"checkpoint={str(self.path)!r} cannot be written: {error}")
        self.team.agree(failed)
        self._last = time.monotonic()


def bar_of(loader: Any, team: Team, what: str, show: bool) -> Any:
    """A tqdm bar of this rank's batches, on the first rank, if tqdm is there; else None."""
    if not show or not team.leads:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    total = -(-len(loader) // team.size) if hasattr(loader, "__len__") else None
    return tqdm(total=total, desc=what, unit="batch", leave=False)


def run(
    team: Team,
    items: Dealt,
    work: Callable[[int, Any], None],
    state: Callable[[], Any] | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """``work(number, batch)`` for each of this rank's batches.

    Every few batches the ranks meet: what fails on one is raised on all, and ``state()``, which is
    collective, goes to the checkpoint.

    Raises:
        ValueError: the ranks have read different data.
        Exception: what ``work`` or the loader raised on the lowest rank on which it did.
    """
    ended, failed = False, None
    finals: dict[int, tuple[int, int]] = {}
    meetings = 0
    while True:
        try:
            for _ in range(EVERY):
                if (found := next(items, None)) is None:
                    ended = True
                    break
                work(*found)
        except Exception as error:  # told to the others first, who would wait for this rank
            if team.size == 1:
                raise
            failed = error
        meetings += 1
        due = checkpoint is not None and checkpoint.due()
        stamp = (items.read, items._stamp) if ended else items.stamps.get(_round(items))
        for old in [r for r in items.stamps if r < _round(items)]:
            del items.stamps[old]
        told = team.gather((ended, stamp, due, portable(failed)))
        for rank, (_, _, _, problem) in enumerate(told):
            if problem is not None:
                if rank == team.rank and failed is not None:
                    raise failed
                raise problem
        finals |= {rank: said[1] for rank, said in enumerate(told) if said[0]}
        going = [said[1] for said in told if not said[0]]
        if len(set(going)) > 1 or len(set(finals.values())) > 1:
            raise ValueError(_DIFFERENT)
        if not going:
            return
        if told[0][2] and state is not None and checkpoint is not None:
            # Those that have ended had fewer: everything before the meeting's last round is done.
            checkpoint.write(items.start + meetings * EVERY * team.size, state())


def _round(items: Dealt) -> int:
    return items.start // items.team.size + items.rounds
