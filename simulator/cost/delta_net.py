"""Gated delta net (arXiv 2412.06464): causal convolution, gates and recurrence of one layer, without its projections.

A decode step reads and writes the state of every sequence: bytes over achieved bandwidth. A prompt is computed in
chunks of 64 tokens (arXiv 2406.06484): five kernels of small products, whose intermediate results cross memory; one of
the kernels takes chunk after chunk, as each needs the state of the last one. Use :func:`delta_net`.

One constant, the bandwidth of states, is fitted on the decode steps of an H20 (alibaba/InferSim, Apache-2.0; 32 value
heads). The others were chosen from what similar kernels achieve: docs/model.md has the errors of nine rows.

Symbols
-------
tokens, batch : tokens of all sequences, sequences
heads, key_heads : value heads, and heads of queries and keys
key, value : features of a key head and of a value head
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from simulator.arguments import COUNT, SIZE, array, instance, text, together
from simulator.arrays import FloatArray
from simulator.cost.base import Calls, Estimate, Machine, element_bytes, largest_part
from simulator.cost.residual_grid import ResidualGrid
from simulator.hardware.constants import DELTA_NET_CONSTANTS
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.sections import Section
from simulator.workload import Kind

CHUNK = 64.0
"""Tokens of a chunk."""


@dataclass(frozen=True)
class DeltaNets(Calls):
    """Gated delta nets of one device."""

    machine: Machine  # weight_bytes: of an element of the state
    tokens: FloatArray
    batch: FloatArray
    heads: FloatArray
    key_heads: FloatArray
    key: FloatArray
    value: FloatArray
    conv: FloatArray

    @property
    def operator(self) -> str:
        return "delta_net"

    def estimate(self, c: Mapping[str, Any]) -> Estimate:
        """Return the cost: arithmetic and bytes overlap in part, the chain of chunks and the fixed time add up."""
        tokens, heads, machine = self.tokens, self.heads, self.machine
        batch = np.minimum(self.batch, tokens)  # a dynamic method may skip sequences
        each, act = tokens / batch, machine.element_bytes
        step = each <= 1.0
        channels = 2.0 * self.key_heads * self.key + heads * self.value
        state = batch * heads * self.key * self.value * machine.weight_bytes * np.where(step, 2.0, 1.0)
        stream = act * tokens * (channels + heads * self.value)
        tail = act * batch * np.maximum(self.conv - 1.0, 0.0) * channels * np.where(step, 2.0, 1.0)
        chunks = np.ceil(each / CHUNK)
        padded = np.where(step, 0.0, batch * CHUNK * chunks)  # tokens, chunks filled up
        # per token and head: scores of keys and their inverse, two transformed products, new values, states of chunks
        between = 2.0 * CHUNK * (4.0 + act) + act * (4.0 * self.key + 4.0 * self.value)
        between = between + 2.0 * act * self.key * self.value / CHUNK
        products = CHUNK * (3.0 * self.key + 2.0 * self.value) + 3.0 * self.key * self.value
        bandwidth = machine.bandwidth_bytes_per_s
        memory = (state + stream + padded * heads * between) / (c["e_d"] * bandwidth)
        memory = memory + (2.0 * act * tokens * channels + tail) / (c["e_conv"] * bandwidth)
        compute = 2.0 * padded * heads * products / (c["e_tc"] * machine.peak_flop_per_s)
        chain = np.where(step, 0.0, c["chunk_s"] * chunks)
        launch = np.where(step, c["t0_s"], c["prompt_s"])
        bytes_s = (state + stream + tail) / bandwidth
        flops_s = 6.0 * tokens * heads * self.key * self.value / machine.peak_flop_per_s
        work = np.hypot(compute, memory)
        total = np.asarray(launch + chain + work)
        rest = 1.0 / (np.maximum(work, 1e-30) * total)
        position = np.log2(each), np.log2(batch * heads), np.log2(self.key * self.value)
        return Estimate(
            operator="delta_net",
            kind=int(Kind.DELTA_NET),
            time=total,
            floor=np.maximum(bytes_s, flops_s / machine.headroom),
            roofline=np.maximum(bytes_s, flops_s),
            bottleneck=largest_part(
                {"compute": compute, "memory": memory, "latency": chain, "launch": launch}, total.shape
            ),
            loadings={
                "launch": launch / total,
                "compute": compute**2 * rest,
                "memory": memory**2 * rest,
                "latency": chain / total,
            },
            coordinates=np.stack([np.ravel(x) for x in position], axis=1),
            position=position,
        )


@lru_cache(maxsize=128)
def _ready(hw: HardwareProfile, dtype: str, state: str) -> tuple[Machine, Section, dict[str, float]]:
    section = hw.section("delta_net", dtype)
    machine = replace(Machine.of(hw, dtype), weight_bytes=element_bytes(state, "state_dtype"))
    return machine, section, {name: section[name] for name in DELTA_NET_CONSTANTS}


def delta_net(
    tokens: Any,
    batch: Any,
    heads: Any,
    key_heads: Any,
    key: Any,
    value: Any,
    hw: HardwareProfile,
    *,
    conv: Any = 4,
    dtype: str = "bf16",
    state_dtype: str = "fp32",
) -> Estimate:
    """Return the cost of gated delta nets over ``tokens`` of ``batch`` sequences: one token per sequence is a decode
    step, more are a prompt.

    ``heads`` value heads of ``value`` features share ``key_heads`` heads of queries and keys of ``key`` features, after
    a causal convolution over ``conv`` positions (0: none). The floor is FLOP of the recurrence / peak at the highest
    clock, and bytes of inputs, outputs and states over the bandwidth.
    """
    instance("hw", hw, HardwareProfile, "load_hardware")
    sizes = together(
        tokens=array("tokens", tokens, COUNT),
        batch=array("batch", batch, COUNT),
        heads=array("heads", heads, COUNT),
        key_heads=array("key_heads", key_heads, COUNT),
        key=array("key", key, COUNT),
        value=array("value", value, COUNT),
        conv=array("conv", conv, SIZE),
    )
    machine, section, constants = _ready(hw, text("dtype", dtype), text("state_dtype", state_dtype))
    e = DeltaNets(machine, *(np.asarray(size, dtype=np.float64) for size in sizes)).estimate(constants)
    residual = ResidualGrid.from_arrays(section.arrays)
    return e.with_residual(None if residual is None else residual(e.position), section)
