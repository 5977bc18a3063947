"""Gated delta net (arXiv 2412.06464) and Kimi's delta attention (KDA, arXiv 2510.26692): causal
convolution, gates and recurrence of one layer, without its projections.

A decode step reads and writes the state of every sequence: bytes over achieved bandwidth. A prompt
is computed in chunks of 64 tokens (arXiv 2406.06484) by five kernels of small products, whose
intermediate results cross memory. One of the kernels computes the chunks in sequence, because each
needs the state of the previous chunk. KDA has the same products and reads a decay per feature of a
key. On a CPU, Transformers forms the decays between all tokens of a chunk for every such feature.

One constant, the bandwidth of states, is fitted on the decode steps of an H20 (alibaba/InferSim,
Apache-2.0; 32 value heads). The others were chosen from similar kernels: docs/model.md has the
errors of nine rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.arrays import Array, FloatArray
from simulator.codes import DTYPE_BYTES, ROLES, Kind
from simulator.operators.base import (
    Cached,
    Device,
    Estimate,
    Estimates,
    Formats,
    Recurrent,
    Rows,
    RowValues,
    read_constants,
    ready,
    states_moved,
)

CHUNK = 64.0
"""Tokens of a chunk."""

# times that torch reads or writes each element in fp32 on a CPU, from
# `torch_chunk_gated_delta_rule` and `torch_recurrent_gated_delta_rule` of Transformers 5.24: scores
# of a chunk (decays, masks, exponentials, solutions), keys with queries (norms, padding, scaling),
# values, states per chunk, and the state of a decode step
SCORES_MOVED = 18.0
KEYS_MOVED = 30.0
VALUES_MOVED = 20.0
STATES_MOVED = 8.0
STEP_MOVED = 14.0
_FP32 = 4.0  # bytes
# the same of a decay between two tokens of a chunk: 13.5 ns per feature of a key and pair of tokens
# of `chunk_kimi_delta_attention` on one core of an EPYC
_PAIRS_MOVED = 27.0
_DECAY_BYTES = 4.0  # bytes of a decay of KDA: fp32
_KDA = ROLES.index("kda")


@dataclass(frozen=True)
class DeltaNets(Recurrent):
    """Gated delta nets on one device."""

    operator = "delta_net"
    heads: FloatArray  # value heads
    key_heads: FloatArray  # heads of queries and keys, which value heads share
    key: FloatArray  # features of a key head
    value: FloatArray  # features of a value head
    conv: FloatArray  # positions of the causal convolution; 0: none
    channel_decay: FloatArray  # whether each feature of a key has a decay (KDA)

    def estimate(self, c: RowValues) -> Estimate:
        """Return the cost: arithmetic and bytes; the chain of chunks and the
        fixed time are added."""
        m = self.machine
        heads = self.heads
        key = self.key
        value = self.value
        batch, each = self.sequences, self.each
        act = m.element_bytes
        step = each <= 1.0
        channels = 2.0 * self.key_heads * key + heads * value
        state = batch * heads * key * value * m.weight_bytes * np.where(step, 2.0, 1.0)
        stream = act * self.tokens * (channels + heads * value)
        stream = stream + _DECAY_BYTES * self.tokens * heads * key * self.channel_decay
        tail = act * batch * np.maximum(self.conv - 1.0, 0.0) * channels * np.where(step, 2.0, 1.0)
        chunks = np.ceil(each / CHUNK)
        padded = np.where(step, 0.0, batch * CHUNK * chunks)  # tokens in whole chunks
        between = self._between(padded, step)
        products = CHUNK * (3.0 * key + 2.0 * value) + 3.0 * key * value
        bandwidth = m.bandwidth_bytes_per_s
        memory = (state + stream + heads * between) / (c["e_d"] * bandwidth)
        memory = memory + (2.0 * act * self.tokens * channels + tail) / (c["e_conv"] * bandwidth)
        compute = 2.0 * padded * heads * products / (c["e_tc"] * m.peak_flop_per_s)
        bytes_s = (state + stream + tail) / bandwidth
        flops_s = 6.0 * self.tokens * heads * key * value / m.peak_flop_per_s
        position = np.log2(each), np.log2(batch * heads), np.log2(key * value)
        return self.cost(c, (compute, memory), chunks, (bytes_s, flops_s), position)

    def _between(self, padded: FloatArray, step: Array) -> FloatArray:
        """Return the bytes of intermediate results that cross memory, of a value head; ``padded``
        are tokens in whole chunks."""
        m = self.machine
        key = self.key
        value = self.value
        act = self.machine.element_bytes
        if m.packs:
            moved = SCORES_MOVED * CHUNK + KEYS_MOVED * key + VALUES_MOVED * value
            moved = moved + _PAIRS_MOVED * CHUNK * key * self.channel_decay
            moved = padded * (moved + STATES_MOVED * key * value / CHUNK)
            # the operands of the state are counted apart
            steps = self.sequences * (STEP_MOVED - 2.0) * key * value
            return _FP32 * np.where(step, steps, moved)
        # per token and head: scores of keys and their inverse, two transformed products, new
        # values, states of chunks
        each = 2.0 * CHUNK * (4.0 + act) + act * (4.0 * key + 4.0 * value)
        return padded * (each + 2.0 * act * key * value / CHUNK)


class DeltaNet(Cached):
    """Gated delta nets: ``m`` tokens of ``batch`` sequences; ``weight_dtype`` is the format of the
    state."""

    code = int(Kind.DELTA_NET)
    name = "delta_net"
    sizes = ("m", "batch", "heads", "kv_heads", "head_dim", "value_dim")
    # one GPU and stack was measured, so priors are as wide as those of a prompt's attention
    constants, errors = read_constants("delta_net")
    titles = ("gated delta nets",)
    owned_in = "dtype"

    def flops(self, w: Rows) -> Any:
        """6 d_key d_value per token and value head."""
        return 6.0 * w.m * w.heads * w.head_dim * w.value_dim

    def bytes(self, w: Rows) -> Any:
        """Features of each token, and states: a step writes them, a decode step also reads them."""
        features = 2.0 * (w.kv_heads * w.head_dim + w.heads * w.value_dim)
        decays = _DECAY_BYTES * w.m * w.heads * w.head_dim * (w.role == _KDA)
        states = self.state_bytes(w) / np.maximum(w.batch, 1) * states_moved(w)
        return DTYPE_BYTES[w.dtype] * w.m * features + decays + states

    def state_bytes(self, w: Rows) -> Any:
        """Recurrent states of value heads (key x value), and the last positions of the channels of
        the convolution."""
        return self.cache_bytes(w, w.batch, np.maximum(w.window - 1, 0))

    def cache_bytes(self, w: Rows, sequences: Any, positions: Any) -> Any:
        channels = 2.0 * w.kv_heads * w.head_dim + 1.0 * w.heads * w.value_dim
        states = 1.0 * w.heads * w.head_dim * w.value_dim * DTYPE_BYTES[w.weight_dtype]
        return sequences * (states + positions * channels * DTYPE_BYTES[w.dtype])

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        heads = w.heads, w.kv_heads, w.head_dim, w.value_dim
        sizes = w.m, w.batch, *heads, w.window, w.role == _KDA
        yield slice(None), ready(hw, self.name, *formats[:2]).of_sizes(DeltaNets, *sizes)
