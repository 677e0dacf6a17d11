"""The processes that share a piece of work, and what they tell each other."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Team", "launched", "portable"]


class Team:
    """The ranks of a process group, or this process alone.

    All but ``rank`` and ``size`` is collective: every rank calls the same methods in the same
    order, and all get the same back.

    Args:
        process_group: of ``torch.distributed``; None: alone.

    Raises:
        TypeError: something else.
        ValueError: a group that this process does not belong to.
    """

    def __init__(self, process_group: Any = None) -> None:
        self.group = process_group
        self.rank, self.size = 0, 1
        if process_group is None:
            return
        if process_group is getattr(dist, "GroupMember", None) or isinstance(process_group, int):
            raise ValueError("process_group does not have this process as a member")
        if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup, such as "
                "torch.distributed.group.WORLD after init_process_group(), or None; got "
                f"{type(process_group).__name__}"
            )
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        there = tensor.to(self._device(), copy=True).contiguous()
        dist.all_reduce(there, op, group=self.group)
        return there.to(tensor.device)

    def _device(self) -> torch.device:
        """Where tensors must be to be sent: gloo takes them from the CPU."""
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks; exact for integers."""
        return self._reduce(tensor, dist.ReduceOp.SUM) if self.size > 1 else tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """The largest over all ranks, element by element."""
        return self._reduce(tensor, dist.ReduceOp.MAX) if self.size > 1 else tensor

    def gather(self, value: Any) -> list[Any]:
        """What every rank says, by rank; anything that can be pickled."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def broadcast(self, value: Any) -> Any:
        """What rank 0 says; anything that can be pickled. Others may say None."""
        if self.size == 1:
            return value
        box = [value]
        first = dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(box, src=first, group=self.group, device=self._device())
        return box[0]

    def agree(self, failed: Exception | None) -> None:
        """Raise what failed on any rank, the lowest of them, on every rank."""
        for rank, problem in enumerate(self.gather(portable(failed))):
            if problem is not None:
                raise failed if rank == self.rank and failed is not None else problem

    @torch.no_grad()
    def align(self, module: nn.Module) -> None:
        """Give the parameters and buffers of ``module`` the bits that rank 0 has."""
        if self.size == 1:
            return
        first, device = dist.get_global_rank(self.group, 0), self._device()
        for tensor in module.state_dict().values():
            if isinstance(tensor, Tensor):
                there = tensor.to(device, copy=True).contiguous()
                dist.broadcast(there, src=first, group=self.group)
                tensor.copy_(there)


def portable(error: Exception | None) -> Exception | None:
    """What can be sent to other processes of an error."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def launched() -> Iterator[Any]:
    """The group of the processes that torchrun has started (gloo), or None in a single process.

    A group that is there already is used and left; one that is made here ends here.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        if made:
            # What still holds the group in a reference cycle would keep its threads until Python
            # ends, which then aborts.
            gc.collect()
            dist.destroy_process_group()
