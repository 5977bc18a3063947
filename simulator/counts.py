"""Count query-key pairs of attention, bytes of gated delta nets, and stored bytes of sparse weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array


def attention_pairs(q_len: Array, kv_len: Array, window: Array) -> Array:
    """Return the query-key pairs under a causal mask, for one sequence and head.

    Query i of q_len (from 0) has the position p = kv_len - q_len + i and sees min(p + 1, window) keys (0: no limit).

    >>> int(attention_pairs(np.array(4), np.array(4), np.array(2)))
    7
    """
    q, kv, w = (np.asarray(x, dtype=np.float64) for x in (q_len, kv_len, window))
    first, last = kv - q + 1, kv  # keys seen by the first and the last query
    full: Array = q * (first + last) / 2
    if not np.count_nonzero(w):
        return full
    # queries whose window is shorter than their position
    capped = np.clip(last - np.maximum(w, first - 1), 0, q)
    seen = full - capped * (last - w) + capped * (capped - 1) / 2  # sum of (position + 1 - w) over the capped queries
    return np.where(w > 0, seen, full)


def delta_state_bytes(
    heads: Array, key_heads: Array, key: Array, value: Array, conv: Array, state_bytes: Array, element_bytes: Array
) -> Array:
    """Return the bytes that a gated delta net keeps of one sequence.

    Each value head has a state of ``key`` x ``value`` elements, each channel of the convolution its last positions.

    >>> float(delta_state_bytes(*map(np.array, (32, 16, 128, 128, 4)), np.array(4.0), np.array(2.0)))
    2146304.0
    """
    channels: Array = 2.0 * key_heads * key + 1.0 * heads * value
    return np.asarray(1.0 * heads * key * value * state_bytes + np.maximum(conv - 1, 0) * channels * element_bytes)


def delta_bytes(tokens: Array, batch: Array, features: Array, states: Array, element_bytes: Array) -> Array:
    """Return the bytes that gated delta nets move: ``features`` of each token, and ``states`` of all sequences.

    States are written; a decode step also reads them. A dynamic method may skip some of the sequences of a step.
    """
    computed = np.minimum(tokens / np.maximum(batch, 1), 1.0)
    return np.asarray(element_bytes * tokens * features + states * computed * np.where(tokens <= batch, 2.0, 1.0))


def spmv_bytes(density: Any, value_bytes: Any) -> Array:
    """Return the bytes per weight, zeros included, that a kernel for scattered zeros stores.

    Each value has four bits for its distance to the previous value; after 16 empty places a zero is stored. This gives
    1 / (1 - zeros^16) stored values per nonzero value (MACKO, github.com/vlejd/macko_spmv).

    >>> spmv_bytes(np.array([1.0, 0.5]), 2.0).round(3).tolist()
    [2.5, 1.25]
    """
    kept = np.clip(np.asarray(density, dtype=np.float64), 1e-6, 1.0)
    return np.asarray(kept / (1.0 - (1.0 - kept) ** 16) * (value_bytes + 0.5))
