"""Estimate which routed experts the tokens of a mixture of experts use."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array

EXPERT_RANGE = 200.0
"""Load of the busiest over the least busy expert at a skew of 1, that of the power law with exponent 1.01 in tables."""
EXPERT_SKEW = 0.8
"""Skew of a model that serves mixed requests.

Of the 128 experts of Qwen3-30B-A3B, 51 % take 90 % of the tokens of prose, code and math, and the entropy of their load
is 11 % below that of equal loads; both correspond to 0.8. For code the numbers are 45 % and 15 % (0.95 to 1). Source:
gpu-container handbook, "Routing De-risk", counts of llama-imatrix
(mcp-tool-shop-org.github.io/gpu-container/handbook/derisk)."""
EXPERT_QUANTILES = 16
"""Number of load quantiles that represent all experts."""


def experts_chance(experts: Any, active: Any, skew: Any = 0.0) -> Array:
    """Return the probability (quantiles, ...) that a token uses an expert, from the least busy to the busiest.

    A token uses ``active`` experts on average, each at most once. The log of the load grows evenly; the busiest has
    :data:`EXPERT_RANGE` to the power ``skew`` times the load of the least busy.
    """
    share, skew = np.broadcast_arrays(np.minimum(np.divide(active, experts), 1.0), np.asarray(skew, dtype=np.float64))
    if not skew.any():
        return np.asarray(share[None])
    rank = (np.arange(EXPERT_QUANTILES) + 0.5) / EXPERT_QUANTILES - 0.5
    chance = EXPERT_RANGE ** (rank.reshape(-1, *[1] * share.ndim) * skew)
    for _ in range(16):  # other experts take the share above 1
        chance = np.minimum(chance * (share / chance.mean(axis=0)), 1.0)
    return np.asarray(chance)


def experts_touched(m: Any, experts: Any, active: Any, skew: Any = 0.0) -> Array:
    """Return the expected number of ``experts`` that at least one of ``m`` tokens uses.

    Tokens choose ``active`` experts each, independently; ``skew`` is the imbalance of loads (:func:`experts_chance`).

    >>> experts_touched(np.array([1, 16, 256]), 128, 8).round(1).tolist()
    [8.0, 82.4, 128.0]
    """
    m, experts, active, skew = np.broadcast_arrays(np.asarray(m, dtype=np.float64), experts, active, skew)
    idle = (1.0 - experts_chance(experts, active, skew)) ** m
    return np.asarray(experts * (1.0 - idle.mean(axis=0)))
