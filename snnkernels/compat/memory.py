"""State that is reset, as SpikingJelly's ``MemoryModule`` keeps it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["MemoryModule"]

_STEP_MODES = ("s", "m")


class MemoryModule(nn.Module):
    """A module with memories: attributes that :meth:`reset` puts back to what they began as.

    Its names are those of SpikingJelly's class, so that code which reads or sets memories, reset
    values or step modes finds them. Memories are not in the state dict.
    """

    _memories: dict[str, Any]
    _memories_rv: dict[str, Any]

    def __init__(self, step_mode: str = "s", backend: str = "torch") -> None:
        # Not super(): joined with SpikingJelly's class this stays the only one that makes memories.
        nn.Module.__init__(self)
        self._memories = {}
        self._memories_rv = {}
        self.step_mode = step_mode
        self.backend = backend

    def supported_step_mode(self) -> tuple[str, ...]:
        """``("s", "m")``."""
        return _STEP_MODES

    @property
    def step_mode(self) -> str:
        """``"s"``: a call is one step, ``"m"``: it is all of them, ``[T, ...]``."""
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value not in _STEP_MODES:
            raise ValueError(f"step_mode={value!r} is unknown; allowed are 's' and 'm'")
        self._step_mode = value

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """Those that SpikingJelly's releases know for their neurons."""
        return ("torch", "cupy", "triton", "inductor")

    @property
    def backend(self) -> str:
        """Kept for SpikingJelly's code, and without effect.

        :func:`snnkernels.set_backend` chooses the implementation.
        """
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError(f"backend={value!r} must be a string")
        self._backend = value

    def register_memory(self, name: str, value: Any) -> None:
        """Adds a memory, ``value`` now and after each reset.

        Raises:
            ValueError: there is an attribute of that name.
        """
        if hasattr(self, name):
            raise ValueError(f"{name!r} is an attribute already")
        self._memories[name] = value
        self.set_reset_value(name, value)

    def set_reset_value(self, name: str, value: Any) -> None:
        """Changes what :meth:`reset` puts a memory to."""
        self._memories_rv[name] = copy.deepcopy(value)

    def reset(self) -> None:
        """Puts every memory to its reset value."""
        for name, value in self._memories_rv.items():
            self._memories[name] = copy.deepcopy(value)

    def detach(self) -> None:
        """Cuts memories from the graph of earlier calls."""
        for name, value in self._memories.items():
            if isinstance(value, Tensor):
                self._memories[name] = value.detach()

    def memories(self) -> Iterator[Any]:
        """The values of all memories."""
        yield from self._memories.values()

    def named_memories(self) -> Iterator[tuple[str, Any]]:
        """Names and values of all memories."""
        yield from self._memories.items()

    def __getattr__(self, name: str) -> Any:
        memories = self.__dict__.get("_memories")
        if memories is not None and name in memories:
            return memories[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        memories = self.__dict__.get("_memories")
        if memories is not None and name in memories:
            memories[name] = value
        else:
            nn.Module.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._memories:
            del self._memories[name], self._memories_rv[name]
        else:
            nn.Module.__delattr__(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryModule:
        for held in (self._memories, self._memories_rv):
            for name, value in held.items():
                if isinstance(value, Tensor):
                    held[name] = fn(value)
        return nn.Module._apply(self, fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # A graph can be neither copied nor pickled.
        state["_memories"] = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in self._memories.items()
        }
        return state

    def _replicate_for_data_parallel(self) -> Any:
        replica = nn.Module._replicate_for_data_parallel(self)
        replica.__dict__["_memories"] = self._memories.copy()
        return replica
