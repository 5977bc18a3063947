"""Causal convolution of each channel over a few positions, as in Mamba (arXiv 2312.00752) and LFM2
(arXiv 2511.23404).

One kernel reads and writes the channels of each token; a decode step also reads and writes the last
positions of every sequence. On a CPU, torch runs a copy, a convolution and an activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.arrays import FloatArray
from simulator.codes import DTYPE_BYTES, Kind
from simulator.operators.base import (
    Cached,
    Device,
    Estimate,
    Estimates,
    Formats,
    Recurrent,
    Rows,
    RowValues,
    chained,
    read_constants,
    ready,
    states_moved,
)


@dataclass(frozen=True)
class Convolutions(Recurrent):
    """Convolutions on one device."""

    operator = "short_conv"
    channels: FloatArray
    positions: FloatArray  # positions that the convolution reads, with the current one

    def estimate(self, c: RowValues) -> Estimate:
        """Return the cost: the time of the bytes after the fixed time."""
        m = self.machine
        batch, each = self.sequences, self.each
        tails = batch * (self.positions - 1.0) * np.where(each <= 1.0, 2.0, 1.0)
        bytes_ = m.element_bytes * self.channels * (2.0 * self.tokens + tails)
        memory = bytes_ / (c["e_d"] * m.bandwidth_bytes_per_s)
        position = np.log2(each), np.log2(batch), np.log2(self.channels)
        parts = {"memory": memory, "launch": c["t0_s"]}
        return chained(self, m, parts, (bytes_ / m.bandwidth_bytes_per_s, 0.0), position)


class ShortConv(Cached):
    """Convolutions of ``n`` channels: ``m`` tokens of ``batch`` sequences over ``window``
    positions, of which the cache holds ``kv_len``."""

    code = int(Kind.SHORT_CONV)
    name = "short_conv"
    sizes = ("m", "batch", "n", "window")
    # no table of kernels fits the constants
    constants, errors = read_constants("short_conv")
    titles = ("short convolutions",)

    def flops(self, w: Rows) -> Any:
        """A multiply-add per token, channel and position."""
        return 2.0 * w.m * w.n * w.window

    def bytes(self, w: Rows) -> Any:
        """Channels of each token, and the last positions: a step writes them, a decode step also
        reads them."""
        return DTYPE_BYTES[w.dtype] * w.n * (2.0 * w.m + states_moved(w) * (w.window - 1.0))

    def cache_bytes(self, w: Rows, sequences: Any, positions: Any) -> Any:
        return 1.0 * sequences * positions * w.n * DTYPE_BYTES[w.dtype]

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        r = ready(hw, self.name, formats.dtype)
        yield slice(None), r.of_sizes(Convolutions, w.m, w.batch, w.n, w.window)
