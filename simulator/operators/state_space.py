"""Recurrences with a state of one decay per head or channel: Mamba (arXiv 2312.00752), Mamba-2
(arXiv 2405.21060) and lightning attention (arXiv 2401.04658), without projections and convolution.

A decode step reads and writes the state of every sequence: bytes over achieved bandwidth. Mamba-2
and lightning attention are one recurrence: B, C and x are keys, queries and values (section 4 of
arXiv 2405.21060). They compute a prompt in chunks, as mamba_ssm's ``ssd_combined`` and vLLM do:
products within chunks, states of chunks, and a chain that passes states from chunk to chunk. Mamba
has a decay for every element of its state and no such products; mamba_ssm's ``selective_scan``
computes its elements one token after the other within a kernel, at the rate of exponentials.

On a CPU, Transformers runs plain torch: scores are stored for every head, and Mamba is a loop over
tokens of five kernels on the whole state.
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
    read_constants,
    ready,
    states_moved,
)

# times that torch reads or writes each element in fp32 on a CPU, counted in `mamba2_chunk_scan` and
# `mamba2_selective_state_update` of Transformers 5.24: scores per head (masks, sums, exponentials,
# products, copies), x with y, B and C per head (repeats, padding, copies for products, decays),
# states per chunk (sums over chunks, copies), and the state of a decode step (decay, update,
# output)
SCORES_MOVED = 16.0
VALUES_MOVED = 26.0
KEYS_MOVED = 11.0
STATES_MOVED = 10.0
STEP_MOVED = 15.0
# the same for an element of Mamba's state and a token, whose five kernels read strided slices: 14
# to 19 ns on that core
ELEMENTS_MOVED = 96.0
_FP32 = 4.0  # bytes


@dataclass(frozen=True)
class Recurrences(Recurrent):
    """Recurrences on one device."""

    operator = "state_space"
    heads: FloatArray
    groups: FloatArray  # pairs of keys and queries (B and C), which heads share
    channels: FloatArray  # features of a head; Mamba's heads have one
    state: FloatArray  # features of a key
    chunk: FloatArray  # tokens of a chunk; 0: Mamba, which has none

    def estimate(self, c: RowValues) -> Estimate:
        """Return the cost: arithmetic and bytes; the chain of chunks and the
        fixed time are added."""
        m = self.machine
        heads = self.heads
        chunk = self.chunk
        batch, each = self.sequences, self.each
        step = each <= 1.0
        scans = chunk == 0.0
        features = heads * self.channels
        elements = heads * self.channels * self.state
        states = batch * elements * m.weight_bytes * np.where(step, 2.0, 1.0)
        # x and y, B and C, a step size per head; Mamba's kernel also gates its output
        inputs = (2.0 + scans) * features + 2.0 * self.groups * self.state + heads
        stream = m.element_bytes * self.tokens * inputs
        chunks = np.ceil(each / np.maximum(chunk, 1.0))
        padded = batch * chunks * chunk  # tokens in whole chunks
        groups = self.groups
        if m.packs:
            groups = heads  # B and C are repeated for every head
            moved = SCORES_MOVED * heads * chunk + VALUES_MOVED * features
            moved = moved + KEYS_MOVED * 2.0 * heads * self.state
            moved = padded * moved + batch * chunks * STATES_MOVED * elements
            moved = np.where(scans, self.tokens * ELEMENTS_MOVED * elements, moved)
            # the operands of the state are counted below
            moved = np.where(step, batch * (STEP_MOVED - 2.0) * elements, moved)
        else:
            # scores of a group are written and read; states of chunks are written and read twice
            moved = 2.0 * self.groups * chunk + 4.0 * elements / np.maximum(chunk, 1.0)
            moved = np.where(step, 0.0, padded * moved)
        between = _FP32 * moved
        products = 2.0 * elements + chunk * (features + groups * self.state)
        arithmetic = np.where(
            scans, 4.0 * self.tokens * elements / c["e_scan"], 2.0 * padded * products / c["e_tc"]
        )
        compute = np.where(step, 0.0, arithmetic) / m.peak_flop_per_s
        memory = (states + stream + between) / (c["e_d"] * m.bandwidth_bytes_per_s)
        chunks = np.where(scans & (not m.packs), 0.0, chunks)
        bytes_s = (states + stream) / m.bandwidth_bytes_per_s
        flops_s = 4.0 * self.tokens * elements / m.peak_flop_per_s
        position = np.log2(each), np.log2(batch * heads * self.channels), np.log2(self.state)
        return self.cost(c, (compute, memory), chunks, (bytes_s, flops_s), position)


class StateSpace(Cached):
    """Recurrences: ``m`` tokens of ``batch`` sequences in ``heads`` heads of ``value_dim``
    features, with ``kv_heads`` keys of ``head_dim`` features, in chunks of ``block`` tokens (0:
    Mamba); ``weight_dtype`` is the format of the state."""

    code = int(Kind.STATE_SPACE)
    name = "state_space"
    sizes = ("m", "batch", "heads", "kv_heads", "head_dim", "value_dim")
    # no table of kernels fits the constants, so priors are wider than those of the gated delta net
    constants, errors = read_constants("state_space")
    titles = ("state-space recurrences",)
    owned_in = "dtype"

    def flops(self, w: Rows) -> Any:
        """A multiply-add for the update and one for the output per token and element of the
        state."""
        return 4.0 * w.m * w.heads * w.head_dim * w.value_dim

    def bytes(self, w: Rows) -> Any:
        """Inputs and outputs of each token, and states: a step writes them, a decode step also
        reads them."""
        features = (2.0 + (w.block == 0)) * w.heads * w.value_dim
        inputs = features + 2.0 * w.kv_heads * w.head_dim + w.heads
        return DTYPE_BYTES[w.dtype] * w.m * inputs + states_moved(w) * self._state_bytes(w)

    def _state_bytes(self, w: Rows) -> Any:
        return 1.0 * w.heads * w.head_dim * w.value_dim * DTYPE_BYTES[w.weight_dtype]

    def cache_bytes(self, w: Rows, sequences: Any, positions: Any) -> Any:
        return sequences * self._state_bytes(w)

    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        sizes = (w.m, w.batch, w.heads, w.kv_heads, w.value_dim, w.head_dim, w.block)
        yield slice(None), ready(hw, self.name, *formats[:2]).of_sizes(Recurrences, *sizes)
