"""The C allocator, which on CPUs can cost more than the kernels."""

from __future__ import annotations

import ctypes

__all__ = ["tune_malloc"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def tune_malloc() -> bool:
    """Keeps freed memory in the process, for everything that allocates in it.

    glibc hands blocks above 32 MB back to the system when they are freed, and every new one is
    filled page by page: a fresh output of tens of MB costs several times the kernel that writes it.
    Afterwards such blocks are reused, so the process keeps its peak of memory until it ends. Call
    it once, early; it cannot be undone. Preallocated outputs (``out=``) and packed spikes do not
    need it.

    Returns:
        Whether the allocator took the settings: False where it is not glibc's.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    largest = 2**31 - 1
    return all(mallopt(option, largest) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
