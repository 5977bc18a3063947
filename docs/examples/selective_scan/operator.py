"""Selective scan, prompt: chunks of tokens in sequence, and the bytes of activations and states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from simulator.arrays import FloatArray
from simulator.codes import DTYPE_BYTES
from simulator.operators.base import (
    SAME_STACK,
    Calls,
    Constant,
    Device,
    ErrorSize,
    Estimate,
    Formats,
    Machine,
    Operator,
    ResidualGrid,
    Rows,
    largest_part,
)

CODE, CHUNK = 100, 64.0  # free, below 127

# unit, range, meaning, defaults by architecture, source of the defaults
CONSTANTS: Mapping[str, Constant] = MappingProxyType(
    {
        "t0_s": Constant("s", 1e-6, 1e-4, "fixed time of the kernel", {"*": 8e-6}, "assumed"),
        "chunk_s": Constant(
            "s", 1e-8, 1e-4, "time of one chunk of a head on an SM", {"*": 3e-6}, "assumed"
        ),
        "e_d": Constant("1", 0.1, 1.0, "share of the datasheet bandwidth", {"*": 0.8}, "assumed"),
    }
)


@dataclass(frozen=True)
class Scans(Calls):
    """Prompts through selective scans on one device."""

    operator = "selective_scan"
    machine: Machine
    batch: FloatArray
    tokens: FloatArray
    heads: FloatArray
    features: FloatArray

    def estimate(self, c: Mapping[str, Any]) -> Estimate:
        """Return the cost: chunks and bytes overlap in part, the fixed time adds up."""
        pairs = self.batch * self.heads
        bytes_ = (
            self.machine.element_bytes * pairs * self.features * (4.0 * self.tokens + self.features)
        )
        flops = 6.0 * pairs * self.tokens * self.features**2
        chain = c["chunk_s"] * np.ceil(self.tokens / CHUNK) * np.ceil(pairs / self.machine.sm_count)
        memory = bytes_ / (c["e_d"] * self.machine.bandwidth_bytes_per_s)
        work = np.hypot(chain, memory)
        total = c["t0_s"] + work
        bytes_s, flops_s = (
            bytes_ / self.machine.bandwidth_bytes_per_s,
            flops / self.machine.peak_flop_per_s,
        )
        position = np.log2(self.tokens), np.log2(pairs), np.log2(self.features)
        return Estimate(
            operator="selective_scan",
            kind=CODE,  # errors are correlated within one kind
            time=total,
            floor=np.maximum(bytes_s, flops_s / self.machine.headroom),
            roofline=np.maximum(bytes_s, flops_s),
            bottleneck=largest_part(
                {"latency": chain, "memory": memory, "launch": c["t0_s"]}, total.shape
            ),
            loadings={  # derivatives of log time by the log of each part: they add up to 1
                "launch": c["t0_s"] / total,
                "latency": chain**2 / (work * total),
                "memory": memory**2 / (work * total),
            },
            coordinates=np.stack(position, axis=1),
            position=position,
        )


def selective_scan(calls: Scans, hw: Device, dtype: str = "bf16") -> Estimate:
    """Return the cost on a profile: the constants and the residual of its section."""
    section = hw.section("selective_scan", dtype)
    e = calls.estimate({name: section[name] for name in CONSTANTS})
    residual = ResidualGrid.from_arrays(section.arrays)
    return e.with_residual(None if residual is None else residual(e.position), section)


class SelectiveScan(Operator):
    """Prompts through selective scans."""

    code, name = CODE, "selective_scan"
    sizes = ("batch", "q_len", "heads", "head_dim")
    constants = MappingProxyType({"selective_scan": CONSTANTS})
    titles = ("selective scans",)
    # log units: errors that no factor explains; by loading, how far other stacks differ (the
    # fitted stack: a tenth)
    errors = MappingProxyType(
        {
            "selective_scan": ErrorSize(
                correlated=0.05,
                independent=0.05,
                scales={SAME_STACK: 0.1},
                factors={"launch": 0.3, "latency": 0.3, "memory": 0.1},
            )
        }
    )

    def flops(self, w: Rows) -> Any:
        return 6.0 * w.batch * w.heads * w.q_len * w.head_dim**2

    def bytes(self, w: Rows) -> Any:
        return DTYPE_BYTES[w.dtype] * w.batch * w.heads * w.head_dim * (4.0 * w.q_len + w.head_dim)

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Iterator[tuple[Any, Estimate]]:
        sizes = (column.astype(np.float64) for column in (w.batch, w.q_len, w.heads, w.head_dim))
        yield (
            slice(None),
            selective_scan(Scans(Machine.of(hw, formats.dtype), *sizes), hw, formats.dtype),
        )

    def fixed(self, w: Rows, hw: Device, formats: Formats) -> float:
        return hw.section("selective_scan", formats.dtype)["t0_s"]
