"""What :func:`snnkernels.patch` did to each neuron of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["PatchReport", "PatchedModule"]

_STATUSES = ("fused", "refused", "already")


@dataclass(frozen=True)
class PatchedModule:
    """A line of a :class:`PatchReport`.

    Attributes:
        path: where the module is in the model; ``""`` is the model itself.
        library: whose module it is.
        was: its class before.
        now: its class now, None where it was left alone.
        status: ``"fused"``, ``"refused"`` or ``"already"`` (by an earlier call).
        reason: why it was refused, or a remark.
        shared: other paths of the same module.
    """

    path: str
    library: str
    was: str
    now: str | None
    status: str
    reason: str = ""
    shared: tuple[str, ...] = ()


@dataclass
class PatchReport:
    """What :func:`snnkernels.patch` did: a line per neuron of a library that is known.

    Printed, it is a table. It is true (``bool``) where nothing was refused.
    """

    modules: list[PatchedModule] = field(default_factory=list)

    def of(self, status: str) -> list[PatchedModule]:
        """The lines of a status; another than those above is a ValueError."""
        if status not in _STATUSES:
            allowed = ", ".join(map(repr, _STATUSES))
            raise ValueError(f"status={status!r} is unknown; allowed are {allowed}")
        return [line for line in self.modules if line.status == status]

    @property
    def fused(self) -> list[PatchedModule]:
        """What runs on our kernels now."""
        return self.of("fused")

    @property
    def refused(self) -> list[PatchedModule]:
        """What was left alone, each with its ``reason``."""
        return self.of("refused")

    @property
    def counts(self) -> dict[str, int]:
        """How many modules of each status."""
        return {name: len(self.of(name)) for name in ("fused", "already", "refused")}

    def to_dict(self) -> dict[str, Any]:
        """The report in plain lists and dicts, for JSON."""
        return {"counts": self.counts, "modules": [asdict(line) for line in self.modules]}

    def __iter__(self) -> Iterator[PatchedModule]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __bool__(self) -> bool:
        return not self.refused

    def __str__(self) -> str:
        if not self.modules:
            return "patch: no neurons of a known library in this model"
        counts = ", ".join(f"{n} {name}" for name, n in self.counts.items() if n)
        rows = [("module", "was", "now", "")]
        for line in self.modules:
            also = f"also {', '.join(line.shared)}" if line.shared else ""
            remark = "; ".join(filter(None, (line.reason, also)))
            now = line.now if line.now is not None else "left as it is"
            rows.append((line.path or "(the model)", line.was, now, remark))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        table = (
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        )
        return "\n".join([f"patch: {counts}", *table])

    __repr__ = __str__
