"""``patched``: functions of other libraries that are ours for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from .adapters import adapter_of

__all__ = ["Swap", "patched"]


class Swap:
    """Attributes of other modules that are ours while the context is entered; may nest.

    One per library: the first to enter puts ours in place, the last to leave puts theirs back,
    whatever the order. Other threads see the swap too.

    Args:
        targets: gives ``(owner, name, make)`` when first entered; ``make(theirs)`` is ours.
    """

    def __init__(
        self, targets: Callable[[], Iterable[tuple[Any, str, Callable[[Any], Any]]]]
    ) -> None:
        self._targets = targets
        self._lock = threading.Lock()
        self._depth = 0
        self._theirs: list[tuple[Any, str, Any]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context."""
        with self._lock:
            if self._depth == 0:
                found = list(self._targets())
                self._theirs = [(owner, name, vars(owner)[name]) for owner, name, _ in found]
                for owner, name, make in found:
                    setattr(owner, name, make(vars(owner)[name]))
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    for owner, name, theirs in reversed(self._theirs):
                        setattr(owner, name, theirs)
                    self._theirs = []


@contextmanager
def patched(*libraries: str) -> Iterator[None]:
    """Inside this context the functions of other libraries run on our kernels.

    For code that builds its neurons itself or calls the functions directly; models that exist are
    better served by :func:`patch`. A call whose numbers would not be the same runs the library's
    own function. Contexts may nest and are left in any order; the functions are the library's own
    again after the last, also after an exception.

    The swap is of the process, not of the thread: other threads that call the library meanwhile
    run on our kernels too, with the same numbers.

    Args:
        libraries: names: ``"spikingjelly"``, ``"sinabs"``, ``"norse"``.

    Raises:
        ValueError: no name, or an unknown one.
        ImportError: the library is not installed.
    """
    if not libraries:
        raise ValueError("patched() names no library; it must name one, such as patched('spikingjelly')")
    with ExitStack() as stack:
        for adapter in [adapter_of(name) for name in libraries]:
            stack.enter_context(adapter.hook())
        yield
