"""Running the small kernels: allocate outputs, pick an implementation, hand it its params.

What each computes is said in :mod:`snnkernels.maps`, which checks the arguments. Each function here
is also a torch operator of the same name, for torch.compile, export and tensor subclasses; eager
calls skip the dispatcher. A threshold is a tensor that broadcasts, or None and a number beside it.
"""

from .codes import (
    bit_planes,
    pack_bits,
    popcount,
    ttfs_decode,
    ttfs_encode,
    unpack_bits,
    words_dtype,
)
from .pooling import cumulative_max_pool, pooled_size
from .statistics import histogram_update, mmse_errors
from .training import dsr_backward, qcfs, qcfs_backward

__all__ = [
    "bit_planes",
    "cumulative_max_pool",
    "dsr_backward",
    "histogram_update",
    "mmse_errors",
    "pack_bits",
    "pooled_size",
    "popcount",
    "qcfs",
    "qcfs_backward",
    "ttfs_decode",
    "ttfs_encode",
    "unpack_bits",
    "words_dtype",
]
