"""Which rows a run of a converted network takes, and which of them answer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["CAUSAL", "Clock", "Steps"]


@dataclass(frozen=True)
class Steps:
    """How a method spends time.

    Attributes:
        before: rows before those that answer (SRP's probe, after which all state starts anew).
        least: rows that a run takes at least, whatever T (COS's probe looks at its first rows).
        extra: steps that the method adds to T, in its latency.
        whole: neurons need all their rows in one call; a run cannot go on from where one ended.
        parallel: no rows at all: one pass on counts.
        delay: answering steps that are run and not read out; where fewer than 4 would be left, the
            last 4 are read out, or all if T is less. Needs ``whole``.
    """

    before: int = 0
    least: int = 0
    extra: int = 0
    whole: bool = False
    parallel: bool = False
    delay: int = 0

    def first(self, T: int) -> int:
        """How many answering steps of a run of T pass before those that are read out."""
        return min(self.delay, max(T - 4, 0))

    def rows(self, T: int) -> int:
        """Rows of a run that answers for T steps."""
        return self.before + max(T, self.least)


CAUSAL = Steps()


class Clock:
    """What the layers of one network know about the run they are in; one object for all."""

    def __init__(self, steps: Steps = CAUSAL) -> None:
        self.steps = steps
        # The numbers of answering steps after which counts are wanted, ascending; None: after all.
        self.ends: tuple[int, ...] | None = None
        self.levels = 1  # T of a parallel run

    def answering(self, rows: Tensor) -> list[Tensor]:
        """``rows`` ``[T, ...]``, those that answer, cut at the ends."""
        rows = rows[self.steps.before :]
        starts = (0, *(self.ends or ())[:-1])
        ends = self.ends or (len(rows),)
        return [rows[a:b] for a, b in zip(starts, ends, strict=True)]
