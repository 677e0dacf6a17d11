"""Calibration, evaluation and training in several processes, started by ``torchrun``.

``snnkernels.convert`` and ``evaluate`` here take ``process_group=``: every rank makes the same
call, whole batches are dealt to the ranks (batch i to rank i modulo their number), and all get what
one process would have got, bit for bit: statistics are maxima and whole numbers, of which no order
of summation leaves a trace. That takes a network that gives the same bits for the same batch on
every rank: the same kind of device, torch and number of threads (torchrun sets OMP_NUM_THREADS=1).
Without the argument every process works for itself.
"""

from __future__ import annotations

from .dealing import Split
from .evaluation import Evaluation, evaluate
from .training import shardable

__all__ = ["Evaluation", "Split", "evaluate", "shardable"]
