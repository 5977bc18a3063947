"""How many query-key pairs attention computes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def attention_pairs(q_len: Array, kv_len: Array, window: Array) -> Array:
    """Query-key pairs under a causal mask, for one sequence and head.

    Query i of q_len (from 0) sits at position p = kv_len - q_len + i and sees min(p + 1, window) keys (window 0: no limit).

    >>> int(attention_pairs(np.array(4), np.array(4), np.array(0)))
    10
    >>> int(attention_pairs(np.array(4), np.array(4), np.array(2)))
    7
    """
    q, kv, w = (np.asarray(x, dtype=np.float64) for x in (q_len, kv_len, window))
    first, last = kv - q + 1, kv  # keys seen by the first and the last query
    full: Array = q * (first + last) / 2
    if not np.count_nonzero(w):
        return full
    capped = np.clip(last - np.maximum(w, first - 1), 0, q)  # queries whose window is shorter than what lies before them
    seen = full - capped * (last - w) + capped * (capped - 1) / 2  # sum of (position + 1 - w) over the capped queries
    return np.where(w > 0, seen, full)
