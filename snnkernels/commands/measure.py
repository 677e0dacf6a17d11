"""What eval and convert measure: accuracy, latency, spikes, operations, energy."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .datasets import batches
from .output import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Measured", "accuracy_of", "measure", "operations_of", "usual_steps"]

_TIMED = 3  # calls whose median is the time
_COUNTED = 16  # images whose operations are counted


@dataclass
class Measured:
    """Rows by number of steps, and the predictions of the last."""

    rows: list[dict[str, Any]]
    predictions: dict[int, list[int]] = field(default_factory=dict)
    confidence: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def _logits(answer: Any) -> Tensor:
    from torch import Tensor

    if not isinstance(answer, Tensor) or answer.dim() != 2:
        shape = f" of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else ""
        raise ValueError(
            f"the network answers with a {type(answer).__name__}{shape}, not logits [B, classes]: "
            "accuracy has no meaning for it"
        )
    return answer


def _on(model: Any, x: Tensor) -> Tensor:
    """``x`` where the network is."""
    inner = getattr(model, "snn", model)  # of a plan
    where = next((t.device for t in (*inner.parameters(), *inner.buffers())), x.device)
    return x.to(where)


def accuracy_of(model: Any, images: Any, batch_size: int) -> float | None:
    """Share of images whose largest logit is their label; None where they have no labels."""
    import torch

    right = known = 0
    with torch.no_grad(), progress_bar("ANN", len(images)) as bar:
        for x, y in batches(images, batch_size):
            right += int(((_logits(model(_on(model, x))).argmax(1).cpu() == y) & (y >= 0)).sum())
            known += int((y >= 0).sum())
            bar.update(len(y))
    return right / known if known else None


def measure(run: Any, images: Any, steps: list[int], batch_size: int) -> Measured:
    """Accuracy after each number of steps, from one pass over the images.

    ``top-5`` is there for ten classes and more. ``ms`` is the median time of a call on the first
    batch, per image.
    """
    import torch

    ends = sorted(set(steps))
    top1, top5, known, classes = dict.fromkeys(ends, 0), dict.fromkeys(ends, 0), 0, 0
    found = Measured([], {T: [] for T in ends})
    with torch.no_grad(), progress_bar("images", len(images)) as bar:
        for x, y in batches(images, batch_size):
            answers = run.predict_curve(_on(run, x), ends)
            answers = {T: _logits(a).cpu() for T, a in answers.items()}
            classes = answers[ends[-1]].shape[1]
            labelled = y >= 0
            known += int(labelled.sum())
            for T, logits in answers.items():
                order = logits.topk(min(5, classes)).indices
                hits = (order == y.unsqueeze(1)) & labelled.unsqueeze(1)
                top1[T] += int(hits[:, 0].sum())
                top5[T] += int(hits.any(1).sum())
                found.predictions[T] += logits.argmax(1).tolist()
            found.confidence += answers[ends[-1]].softmax(1).amax(1).tolist()
            found.labels += y.tolist()
            bar.update(len(y))
    for T in ends:
        row: dict[str, Any] = {
            "T": T, "latency steps": run.latency(T), "accuracy": top1[T] / known if known else None,
        }  # fmt: skip
        if classes >= 10:
            row["top-5"] = top5[T] / known if known else None
        found.rows.append(row)
    _time(run, _on(run, images[:batch_size][0]), found.rows)
    _count(run, _on(run, images[: min(_COUNTED, len(images))][0]), found.rows)
    return found


def _time(run: Any, x: Tensor, rows: list[dict[str, Any]]) -> None:
    import torch

    seconds: dict[int, list[float]] = {row["T"]: [] for row in rows}
    with torch.no_grad():
        for T in seconds:
            run(x, T=T)
        if x.is_cuda:
            torch.cuda.synchronize()
        for _ in range(_TIMED):
            for T, times in seconds.items():
                start = time.perf_counter()
                run(x, T=T)
                if x.is_cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
    for row in rows:
        row["ms per image"] = 1e3 * statistics.median(seconds[row["T"]]) / len(x)


def usual_steps(T: int) -> list[int]:
    """The numbers of steps of a curve that ends at T."""
    return sorted({t for t in (1, 2, 4, 8, 16, 32) if t < T} | {T})


def operations_of(run: Any, images: Any, T: int) -> Any:
    """Operations of the first images."""
    from ..metrics import synaptic_operations

    return synaptic_operations(run, _on(run, images[: min(_COUNTED, len(images))][0]), T=T)


def _count(run: Any, x: Tensor, rows: list[dict[str, Any]]) -> None:
    from .. import metrics

    for row in rows:
        rates = metrics.firing_rates(run, x, T=row["T"])
        found = metrics.synaptic_operations(run, x, T=row["T"])
        cost = metrics.energy(found)
        row |= {
            "spikes per neuron and step": (
                float(sum(rates.values())) / len(rates) if rates else None
            ),
            "synaptic operations": found.additions,
            "MACs": found.macs,
            "ANN MACs": found.ann_macs,
            "energy pJ": cost.snn,
            "ANN energy pJ": cost.ann,
            "notes": found.notes,
        }
