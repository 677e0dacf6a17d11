"""Small kernels around spiking networks: quantised activations, codes, pooling, thresholds.

Each runs in one launch and gives the same bits on every back end. "State dtype" is float64 for
float64 inputs and float32 for all others. A ``threshold`` is positive and finite, also when rounded
to the state dtype: a number, or a tensor that is scalar, per channel (1-D with ``channel_dim``) or
broadcasts; ``channel_dim`` counts without the time dimension. Values of CUDA tensors are not
checked: that would wait for the device.
"""

# Twice the same name: for the converter, not public.
from .codes import bit_planes, pack_bits, popcount, ttfs_decode, ttfs_encode, unpack_bits
from .pooling import cumulative_max_pool
from .pooling import pool_geometry as pool_geometry
from .pooling import pool_steps as pool_steps
from .statistics import histogram_update, mmse_errors, mmse_threshold
from .training import dsr_backward, qcfs
from .training import qcfs_unchecked as qcfs_unchecked

__all__ = [
    "bit_planes",
    "cumulative_max_pool",
    "dsr_backward",
    "histogram_update",
    "mmse_errors",
    "mmse_threshold",
    "pack_bits",
    "popcount",
    "qcfs",
    "ttfs_decode",
    "ttfs_encode",
    "unpack_bits",
]
