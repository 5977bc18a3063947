"""Which routed experts the tokens of a mixture of experts reach."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.arrays import Array

EXPERT_RANGE = 200.0
"""Load of the busiest expert over that of the idlest at a skew of 1: that of the power law of 1.01 of public tables."""
EXPERT_SKEW = 0.8
"""Skew of a model that serves mixed requests: of Qwen3-30B-A3B's 128 experts 51 % take 90 % of the tokens of prose,
code and math, and the entropy of their load is 11 % short of equal ones' (both say 0.8); of code alone 45 % and 15 %
(0.95 to 1). Source: gpu-container handbook, "Routing De-risk", counts of llama-imatrix
(mcp-tool-shop-org.github.io/gpu-container/handbook/derisk)."""
EXPERT_QUANTILES = 16
"""Experts by load that stand for all of them."""


def experts_chance(experts: Any, active: Any, skew: Any = 0.0) -> Array:
    """Chance (quantiles, ...) that a token uses an expert, from the idlest to the busiest; ``active`` on average.

    The load grows evenly in its log, by :data:`EXPERT_RANGE` to the ``skew``; nothing is used more than once a token.
    """
    share, skew = np.broadcast_arrays(np.minimum(np.divide(active, experts), 1.0), np.asarray(skew, dtype=np.float64))
    if not skew.any():
        return np.asarray(share[None])
    rank = (np.arange(EXPERT_QUANTILES) + 0.5) / EXPERT_QUANTILES - 0.5
    chance = EXPERT_RANGE ** (rank.reshape(-1, *[1] * share.ndim) * skew)
    for _ in range(16):  # what is cut off at 1 goes to the others
        chance = np.minimum(chance * (share / chance.mean(axis=0)), 1.0)
    return np.asarray(chance)


def experts_touched(m: Any, experts: Any, active: Any, skew: Any = 0.0) -> Array:
    """Expected number of ``experts`` that at least one of m tokens uses, ``active`` of them a token on average.

    Tokens choose apart from one another; ``skew`` is that of the experts' load (:func:`experts_chance`, 0: alike).

    >>> experts_touched(np.array([1, 16, 256]), 128, 8).round(1).tolist()
    [8.0, 82.4, 128.0]
    """
    m, experts, active, skew = np.broadcast_arrays(np.asarray(m, dtype=np.float64), experts, active, skew)
    idle = (1.0 - experts_chance(experts, active, skew)) ** m
    return np.asarray(experts * (1.0 - idle.mean(axis=0)))
