"""Progressive tandem learning: layers spike, one after another, while the others learn."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backends import outside
from .tandem import PTLNetwork

__all__ = ["PTLNetwork", "ptl_train"]


def ptl_train(
    ann: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    validation: Iterable[tuple[Tensor, Tensor]],
    *,
    T: int = 16,
    epochs: int = 150,
    patience: int = 6,
    lr: float = 1e-3,
    weight_decay: float = 1e-5,
    percentile: float = 99.9,
    scaled: bool = False,
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
) -> PTLNetwork:
    """Make the layers of ``ann`` spike one after another, training what follows; ``ann`` is kept.

    Source: Wu et al., TPAMI 2021 (PTL). The first layer spikes from the start and learns in tandem
    with its ANN twin. Whenever the validation accuracy has not improved for ``patience`` epochs,
    the best weights of this stage come back, the layers that spike are frozen, and the next layer
    spikes too, at the threshold that the last epoch's first batch suggests (its percentile over T).
    Adam is made anew for each stage; in the last, when every layer spikes and only what is behind
    them learns, its rate is a tenth. Dropout is left out. The authors fold batch norms without
    their eps; here it is in.

    Args:
        ann: trained; a chain of layers (:class:`snnkernels.conversion.tandem.PTLNetwork`).
        loader: training batches ``(x, target)``, given anew each epoch.
        validation: batches to measure accuracy on (``argmax(1) == target``).
        T: number of steps.
        epochs: in all; layers left over then are placed without training, with a warning.
        patience: epochs without improvement that end a stage; 6 in the paper.
        lr, weight_decay: of Adam.
        percentile: of the activations, for thresholds.
        scaled: see :class:`PTLNetwork`.
        loss: of answer and target.

    Returns:
        The network, all layers spiking, in evaluation mode; ``history`` says what was done.

    Raises:
        ConversionError: the network is no chain of layers.
        ValueError, TypeError: an argument is not allowed, or a layer is silent.
    """
    for name, value in (("epochs", epochs), ("patience", patience)):
        try:
            wrong = isinstance(value, bool) or operator.index(value) < 1
        except TypeError:
            wrong = True
        if wrong:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile!r} must be above 0 and at most 100")
    net = PTLNetwork(ann, T, scaled)
    batch = next((x for x, _ in loader), None)
    if batch is None:
        raise ValueError("loader is empty: it must yield batches (x, target)")
    device = net.thresholds.device
    estimate = net.estimate(batch.to(device), percentile)
    net.place(estimate[0])
    stage = _Stage(net, lr, weight_decay)
    for epoch in range(epochs):
        mean = stage.train(loader, loss)
        estimate = net.estimate(batch.to(device), percentile)
        accuracy = _accuracy(net, validation)
        stale = stage.note(accuracy)
        net.history.append(
            {"epoch": epoch, "placed": net.placed, "loss": mean, "accuracy": accuracy}
        )
        if stale < patience:
            continue
        stage.restore()
        if net.placed == len(net.segments):
            break
        net.freeze(net.placed)
        net.place(estimate[net.placed])
        net.freeze(net.placed)
        last = net.placed == len(net.segments)
        stage = _Stage(net, lr / 10 if last else lr, weight_decay)
    else:
        stage.restore()
    left = len(net.segments) - net.placed
    if left:
        warnings.warn(
            f"epochs={epochs} were over with {left} layers still to spike; they were placed "
            "without training. Pass more epochs or less patience",
            stacklevel=outside(),
        )
        while net.placed < len(net.segments):
            net.place(net.estimate(batch.to(device), percentile)[net.placed])
    return net.eval()


class _Stage:
    """Training while the same layers spike."""

    def __init__(self, net: PTLNetwork, lr: float, weight_decay: float) -> None:
        self.net, self.best, self.stale = net, -1.0, 0
        self.state = copy.deepcopy(net.state_dict())
        learned = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = (
            torch.optim.Adam(learned, lr, weight_decay=weight_decay) if learned else None
        )

    def train(self, loader: Iterable[tuple[Tensor, Tensor]], loss: Any) -> float:
        """One epoch; returns the mean loss."""
        self.net.train()
        total, seen = 0.0, 0
        device = self.net.thresholds.device
        for x, target in loader:
            x, target = x.to(device), target.to(device)
            value = loss(self.net(x), target)
            if self.optimizer is not None:
                self.optimizer.zero_grad()
                value.backward()
                self.optimizer.step()
            total, seen = total + float(value.detach()) * len(x), seen + len(x)
        if seen == 0:
            raise ValueError("loader is empty in a later epoch: it must give its batches anew")
        return total / seen

    def note(self, accuracy: float) -> int:
        """Keep the weights if they are the best so far; returns how long they have not been."""
        if accuracy > self.best:
            self.best, self.stale, self.state = accuracy, 0, copy.deepcopy(self.net.state_dict())
        else:
            self.stale += 1
        return self.stale

    def restore(self) -> None:
        """Back to the best weights."""
        self.net.load_state_dict(self.state)


@torch.no_grad()
def _accuracy(net: PTLNetwork, validation: Iterable[tuple[Tensor, Tensor]]) -> float:
    net.eval()
    right, seen = 0, 0
    device = net.thresholds.device
    for x, target in validation:
        right += int((net(x.to(device)).argmax(1) == target.to(device)).sum())
        seen += len(x)
    if seen == 0:
        raise ValueError("validation is empty: it must yield batches (x, target)")
    return right / seen
