"""Measured attention calls as columns, and what the model makes of them: geometry, core time, place in the residual
lattice.

Use :func:`columns_of` on records, :func:`usable` before a fit; :mod:`calibration.fit.attention` fits them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.solver import Table
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.attention_decode import decode_core, decode_work
from simulator.kernels.attention_prefill import Device, prefill_core, prefill_work
from simulator.kernels.lattice import decode_place, prefill_place
from simulator.workload import DTYPE_BYTES, DTYPES

F = NDArray[np.float64]

SHAPE: tuple[str, ...] = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")
"""Columns that make a shape."""


@dataclass(frozen=True)
class Columns(Table):
    """Measured attention calls.

    ``seconds`` is the time of each; ``element_bytes`` that of an element, keys and values included; ``warm`` 1 where a
    call was repeated on one cache, as the published tables do, 0 where caches were rotated past L2, as this program
    does.
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


def columns_of(records: Any) -> Columns:
    """Columns of attention records (an object with columns of these names, seconds in s)."""
    names = (*SHAPE, "seconds")
    bytes_ = np.array([DTYPE_BYTES[code] for code in range(len(DTYPES))], dtype=np.float64)
    columns = {name: np.asarray(getattr(records, name), dtype=np.float64) for name in names}
    warm = 1.0 - np.asarray(records.cold, dtype=np.float64)
    return Columns(**columns, element_bytes=bytes_[np.asarray(records.dtype)], warm=warm)


def device_of(hw: HardwareProfile, dtype: str = "bf16") -> Device:
    """The facts the attention cores need, of a profile."""
    return Device(hw.peak_flop_per_s(dtype), float(hw.sm_count), hw.bandwidth_bytes_per_s, hw.l2_bytes)


def work_of(phase: str, c: Columns, values: Mapping[str, float]) -> Any:
    """Geometry of a phase for columns; it depends on the structural constants alone."""
    size: Any = {"element_bytes": c.element_bytes, "cache_bytes": c.element_bytes}
    if phase == "decode":
        return decode_work(c.batch, c.kv_len, c.heads, c.kv_heads, c.head_dim, warm=c.warm, **size)
    form: Any = {"packs": values["packs"], "pads": values.get("pads", 1.0)}
    return prefill_work(c.batch, c.q_len, c.kv_len, c.heads, c.kv_heads, c.head_dim, **form, **size)


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

    A time may lie below bytes / bandwidth only while the bytes fit the L2; FLOP / peak it may not beat by more than 5 %
    (boost clocks).
    """
    work = work_of(phase, c, {"packs": 0.0})
    size = work.io_bytes if phase == "prefill" else work.cache_bytes
    finite = [np.isfinite(getattr(c, f.name)) & np.ones(len(c), dtype=bool) for f in fields(c)]
    reasons = {
        "a value is not finite": ~np.all(finite, axis=0),
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
