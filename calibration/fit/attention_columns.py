"""Measured attention calls as columns, and what the model makes of them: geometry, core time, place in the residual lattice.

Use :func:`columns_of` on records, :func:`usable` before a fit; :mod:`calibration.fit.attention` fits them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.hardware.profile import HardwareProfile
from simulator.kernels.attention_core import Device, decode_core, decode_work, prefill_core, prefill_work
from simulator.kernels.attention_residual import decode_place, prefill_place
from simulator.workload import DTYPE_BYTES, DTYPES

F = NDArray[np.float64]

SHAPE: tuple[str, ...] = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")
"""Columns that make a shape."""


@dataclass(frozen=True)
class Columns:
    """Measured attention calls as equal-length float64 columns.

    ``seconds`` is the time of each; ``element_bytes`` that of an element, keys and values included; ``warm`` 1 where a call was repeated
    on one cache, as the published tables do, 0 where caches were rotated past L2, as this program does.
    """

    batch: F
    q_len: F
    kv_len: F
    heads: F
    kv_heads: F
    head_dim: F
    seconds: F
    element_bytes: F | float = 2.0
    warm: F | float = 1.0

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, index: NDArray[Any]) -> Columns:
        """Rows by mask or index."""
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return replace(self, **{name: column[index] for name, column in columns.items() if np.ndim(column)})


def columns_of(records: Any, kind: int | None = None) -> Columns:
    """Columns of attention records (an object with columns of these names, seconds in s); ``kind`` picks one ``operator`` code."""
    names = (*SHAPE, "seconds")
    rows = slice(None) if kind is None else np.asarray(records.operator) == kind
    size = np.array([DTYPE_BYTES[code] for code in range(len(DTYPES))], dtype=np.float64)[
        np.asarray(records.dtype)[rows]
    ]
    warm = 1.0 - np.asarray(records.cold, dtype=np.float64)[rows]
    columns = {name: np.asarray(getattr(records, name), dtype=np.float64)[rows] for name in names}
    return Columns(**columns, element_bytes=size, warm=warm)


def work_of(phase: str, c: Columns, values: Mapping[str, float]) -> Any:
    """Geometry of a phase for columns; it depends on the structural constants alone."""
    if phase == "prefill":
        size: Any = {"element_bytes": c.element_bytes, "cache_bytes": c.element_bytes, "pads": values.get("pads", 1.0)}
        return prefill_work(c.batch, c.q_len, c.kv_len, c.heads, c.kv_heads, c.head_dim, packs=values["packs"], **size)
    return decode_work(
        c.batch,
        c.kv_len,
        c.heads,
        c.kv_heads,
        c.head_dim,
        element_bytes=c.element_bytes,
        cache_bytes=c.element_bytes,
        warm=c.warm,
    )


def core_of(phase: str, work: Any, device: Device, values: Mapping[str, float]) -> F:
    """Core time as it was measured; the operands of a prefill may be warm in L2, since a benchmark repeats its call."""
    return prefill_core(work, device, values, True) if phase == "prefill" else decode_core(work, device, values)


def residual_coordinates(phase: str, c: Columns) -> tuple[F, F, F]:
    """Where each row lies in the residual lattice."""
    if phase == "prefill":
        return prefill_place(c.q_len, c.batch, c.heads, c.kv_heads)
    return decode_place(c.kv_len, c.batch * c.kv_heads, c.heads / c.kv_heads)


def usable(phase: str, c: Columns, device: Device) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Rows a fit may use, and how many it may not by reason.

    A time may lie below bytes / bandwidth only while the bytes fit the L2; FLOP / peak it may not beat by more than 5 % (boost clocks).
    """
    work = work_of(phase, c, {"packs": 0.0})
    size = work.io_bytes if phase == "prefill" else work.cache_bytes
    reasons = {
        "a value is not finite": ~np.all(
            [np.isfinite(getattr(c, n)) & np.ones(len(c), dtype=bool) for n in c.__dataclass_fields__], axis=0
        ),
        "the time is not positive": ~(c.seconds > 0),
        "a chunk of one query, which takes the path of decode": (c.q_len < 2) & (phase == "prefill"),
        "heads are no multiple of KV heads": (c.heads % np.maximum(c.kv_heads, 1.0)) != 0,
        "a length or count is below 1": np.any([getattr(c, n) < 1 for n in SHAPE], axis=0),
        "faster than FLOP / peak": c.seconds * 1.05 < work.flops / device.peak_flop_per_s,
        "faster than bytes / bandwidth with more bytes than the L2 holds": (size > 1.5 * device.l2_bytes)
        & (c.seconds < size / device.bandwidth_bytes_per_s),
    }
    good = np.ones(len(c), dtype=bool)
    counts = {}
    for reason, bad in reasons.items():
        counts[reason] = int(np.count_nonzero(bad & good))
        good &= ~bad
    return good, {reason: n for reason, n in counts.items() if n}


def device_of(hw: HardwareProfile, dtype: str = "bf16") -> Device:
    """The facts the attention cores need, of a profile."""
    return Device(hw.peak_flop_per_s(dtype), float(hw.sm_count), hw.bandwidth_bytes_per_s, hw.l2_bytes)
