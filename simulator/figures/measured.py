"""Read measured GEMM times that figures compare with predictions, from arrays or from a CSV or Parquet file.

The simulator ships no measurements (package ``calibration`` does); the caller passes them in. A file has columns ``m``,
``n``, ``k`` and one of ``seconds``, ``latency_s``, ``latency_ms``, ``latency_us``; optional are ``copies`` (number of
rotated weights; without it they are cold), ``dtype`` and ``weight_dtype`` (names, or codes of
:data:`simulator.codes.DTYPES`; without them bf16) and ``predicted_s`` (a held-out prediction of the row). Further
columns are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import FloatArray
from simulator.codes import DTYPES
from simulator.errors import InputError
from simulator.files.csv import read_csv
from simulator.files.parquet import parquet_columns, read_parquet
from simulator.files.read import read_bounded
from simulator.uncertainty.operators import gemm_time

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile


TIMES: Mapping[str, float] = {"seconds": 1.0, "latency_s": 1.0, "latency_ms": 1e-3, "latency_us": 1e-6}
"""Columns that may hold the time, and their unit in seconds."""

OPTIONAL = ("copies", "dtype", "weight_dtype", "predicted_s")


@dataclass(frozen=True)
class MeasuredGemms:
    """Measured GEMMs of one device and number format."""

    source: str  # origin, for captions
    m: FloatArray
    n: FloatArray
    k: FloatArray
    seconds: FloatArray
    copies: FloatArray | None = None  # number of rotated weights; None: cold
    predicted_s: FloatArray | None = None  # held-out predictions
    stack: str = ""  # software stack that was measured; "": that of the device's profile

    def __len__(self) -> int:
        return len(self.seconds)

    def of_weight(self, n: int, k: int) -> NDArray[np.bool_]:
        """Return a mask of the rows with this weight."""
        mask: NDArray[np.bool_] = (self.n == n) & (self.k == k)
        return mask

    def predict(self, hw: HardwareProfile, dtype: str = "bf16") -> FloatArray:
        """Return predictions of all rows, s: the given ones, else the profile's under the same rotation of weights,
        for the stack that was measured."""
        if self.predicted_s is not None:
            return self.predicted_s
        hw = hw.on(self.stack) if self.stack else hw
        return gemm_time(self.m, self.n, self.k, hw, dtype=dtype, copies=self.copies).seconds


def read_measured_gemms(path: str | Path, dtype: str = "bf16") -> MeasuredGemms:
    """Read measured GEMMs from a CSV or Parquet file (which needs pyarrow): rows with ``dtype`` for activations and
    weights.

    InputError if the file cannot be read, a column is missing, a value is not above zero, or no row is of the format.
    """
    where = Path(path)
    content, label = read_bounded(where), str(where)
    columns: Mapping[str, Any]
    if content[:4] == b"PAR1":
        columns = parquet_columns(read_parquet(content, label), label, ("m", "n", "k", *TIMES, *OPTIONAL))
    else:
        table = read_csv(content, label)
        columns = {name: table.column(name) for name in table.header}
    return from_columns(columns, where.name, dtype, label)


def from_columns(columns: Mapping[str, Any], source: str, dtype: str = "bf16", label: str = "") -> MeasuredGemms:
    """Return measured GEMMs from named columns. Messages begin with ``label``, by default the source."""
    label = label or source
    time = next((name for name in TIMES if name in columns), None)
    missing = [name for name in ("m", "n", "k") if name not in columns] + ([] if time else ["seconds"])
    if missing or time is None:
        raise InputError(f"{label}: column {missing[0]} is missing; expected m, n, k and one of {', '.join(TIMES)}")
    keep = np.ones(len(columns[time]), dtype=bool)
    for name in ("dtype", "weight_dtype"):
        if name in columns:
            keep &= _formats(columns[name]) == dtype
    if not keep.any():
        raise InputError(f"{label}: no row of {dtype}")
    used = (name for name in ("m", "n", "k", time, "copies", "predicted_s") if name in columns)
    found = {name: _numbers(columns[name], name, label)[keep] for name in used}
    return MeasuredGemms(
        source,
        m=found["m"],
        n=found["n"],
        k=found["k"],
        seconds=found[time] * TIMES[time],
        copies=found.get("copies"),
        predicted_s=found.get("predicted_s"),
    )


def _formats(column: Sequence[Any]) -> NDArray[Any]:
    """Return names of number formats, given as names or codes."""
    table = np.asarray(column)
    if table.dtype.kind in "iu":
        known = np.array([*DTYPES, "unknown"], dtype=object)
        out: NDArray[Any] = known[np.where((table >= 0) & (table < len(DTYPES)), table, len(DTYPES))]
        return out
    return np.array([str(value) for value in table.tolist()], dtype=object)


def _numbers(column: Sequence[Any], name: str, source: str) -> FloatArray:
    try:
        out = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{source}: column {name}: expected numbers") from None
    size = name in ("m", "n", "k", "copies")
    low, high, right = (1.0, 2.0**31 - 1, "number from 1 to 2**31 - 1") if size else (1e-15, 1e9, "time above zero")
    good = (out >= low) & (out <= high)  # NaN is not good
    if not good.all():
        bad = int(np.flatnonzero(~good)[0])
        raise InputError(f"{source}: column {name}, row {bad + 1}: expected a {right}, got {out[bad]:g}")
    return out
