"""Python's side of csrc/maps.h: the structs of the small kernels, and which instance serves one.

A test compares layouts with the compiled ones and names with the instances that nvcc compiles.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

_OPERAND = ("data", "inner", "count", "value")


class Record:
    """One struct: pairs of a kind, as in :mod:`struct` or ``operand``, and the names of fields."""

    def __init__(self, name: str, *fields: tuple[str, str]) -> None:
        self.name = name
        numpy = {"Q": "u8", "q": "i8", "d": "f8", "i": "i4"}
        operand = np.dtype(list(zip(_OPERAND, ("u8", "i8", "i8", "f8"), strict=True)), align=True)
        kinds = {field: kind for kind, names in fields for field in names.split()}
        self.dtype = np.dtype(
            [(f, operand if kind == "operand" else numpy[kind]) for f, kind in kinds.items()],
            align=True,
        )
        self._fields = tuple(kinds)
        self._pack = struct.Struct("@" + "".join(kinds.values()).replace("operand", "Qqqd")).pack

    def pack(self, **values: Any) -> bytes:
        """The bytes of a struct; an operand is ``(data, inner, count, value)``, absent fields 0."""
        flat: list[Any] = []
        for field in self._fields:
            value = values.pop(field, None)
            if isinstance(value, tuple):
                flat.extend(value)
            elif value is None and self.dtype[field].names:
                flat.extend((0, 1, 1, 0.0))
            else:
                flat.append(0 if value is None else value)
        assert not values, f"{self.name} has no fields {sorted(values)}"
        return self._pack(*flat)


_SHARED = ("operand", "threshold")

QCFS = Record(
    "QcfsParams", ("Q", "x grad out grad_threshold"), _SHARED, ("q", "N"), ("d", "levels phase"),
    ("i", "dtype clip_first"),
)  # fmt: skip
POOL = Record(
    "PoolParams", ("Q", "x out total_in total peak_in peak"), ("q", "N T planes H W OH OW"),
    ("i", "kh kw sh sw ph pw dh dw owner_mh owner_jh owner_mw owner_jw dtype size"),
)  # fmt: skip
DSR = Record(
    "DsrParams", ("Q", "x grad weights grad_x grad_threshold"), _SHARED, ("q", "N T"),
    ("d", "tau dt divisor"), ("i", "dtype pad"),
)  # fmt: skip
SUMS = Record(
    "SumsParams", ("Q", "values out"), ("q", "N rows inner each length segments"),
    ("i", "dtype pad"),
)  # fmt: skip
MMSE = Record(
    "MmseParams", ("Q", "values candidates out"), ("q", "N channels each K length segments"),
    ("d", "T fraction"), ("i", "dtype pad"),
)  # fmt: skip
HISTOGRAM = Record(
    "HistogramParams", ("Q", "values counts sums scale scratch"), ("q", "N channels each bins"),
    ("i", "dtype pad"),
)  # fmt: skip
TTFS = Record(
    "TtfsParams", ("Q", "from to"), _SHARED, ("q", "N"), ("d", "T"),
    ("i", "dtype bytes round pad"),
)  # fmt: skip
PLANES = Record(
    "PlanesParams", ("Q", "x q planes"), _SHARED, ("q", "N T"), ("d", "largest"),
    ("i", "dtype bytes"),
)  # fmt: skip
BITS = Record(
    "BitsParams", ("Q", "words spikes counts"), ("operand", "amplitude"), ("q", "N T W"),
    ("Q", "amplitude_bits"), ("i", "word_bytes spike_bytes"),
)  # fmt: skip

_TYPES = {0: "float", 1: "double", 2: "snn::f16", 3: "snn::bf16"}
_BYTES = (1, 2, 4, 8)
_SIZES = (0, 2, 3)

# Kernel: its struct, and how its instance is called.
RECORDS = {
    "qcfs": QCFS,
    "qcfs_backward": QCFS,
    "cumulative_max_pool": POOL,
    "dsr_backward": DSR,
    "sums": SUMS,
    "mmse_errors": MMSE,
    "histogram_update": HISTOGRAM,
    "ttfs_encode": TTFS,
    "ttfs_decode": TTFS,
    "bit_planes": PLANES,
    "unpack_bits": BITS,
    "popcount": BITS,
    "pack_bits": BITS,
}
_BY_DTYPE = {
    "qcfs": "snn::shared_map<snn::Qcfs<{}>>",
    "qcfs_backward": "snn::shared_map<snn::QcfsBackward<{}>>",
    "dsr_backward": "snn::map<snn::Dsr<{}>>",
    "mmse_errors": "snn::map<snn::Mmse<{}>>",
    "histogram_update": "snn::map<snn::Histogram<{}>>",
    "ttfs_encode": "snn::shared_map<snn::TtfsEncode<{}>>",
    "ttfs_decode": "snn::shared_map<snn::TtfsDecode<{}>>",
    "bit_planes": "snn::shared_map<snn::BitPlanes<{}>>",
    "sums": "snn::map<snn::Sums<{}>>",
}
_BY_BYTES = {"unpack_bits": "snn::map<snn::Unpack<{}>>", "pack_bits": "snn::map<snn::PackBits<{}>>"}
_POOL = "snn::map<snn::Pool<{}, {}>>"
_POPCOUNT = "snn::map<snn::Popcount<int>>"


def instance(name: str, p: np.void) -> str:
    """The instance for ``p`` (a record of ``name``); the same choice as in csrc/maps_launch.cu."""
    if name == "popcount":
        return _POPCOUNT
    if name in _BY_BYTES:
        return _BY_BYTES[name].format(int(p["spike_bytes"]))
    x = _TYPES[int(p["dtype"])]
    return _POOL.format(x, int(p["size"])) if name not in _BY_DTYPE else _BY_DTYPE[name].format(x)


def instances() -> list[str]:
    """Every instance there is: a closed list, compiled by the tests for every architecture."""
    names = [_POPCOUNT]
    for name, form in _BY_DTYPE.items():
        names += [form.format(x) for x in list(_TYPES.values())[: 2 if name == "sums" else None]]
    names += [form.format(size) for form in _BY_BYTES.values() for size in _BYTES]
    names += [_POOL.format(x, size) for x in _TYPES.values() for size in _SIZES]
    return names
