"""Read aiconfigurator's tables of routed experts (MoE) and refuse unreliable rows.

A row times all products of the experts on one device, including the movement of tokens, without the router. Tokens are
distributed uniformly or by a power law; every replay uses the same weights. ``moe_tp_size`` divides the width of every
expert, ``moe_ep_size`` the number of experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibration.records.screening import Screen
from simulator.arrays import Array

EXPERTS_SHAPE = (
    *("moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"),
    "distribution",
)
"""Columns of such a table."""

PLAIN: frozenset[tuple[int, int]] = frozenset({(5120, 22), (2688, 22), (1856, 6)})
"""(Width, experts per token) of models whose experts have no gate (Nemotron-H). TensorRT-LLM's tables mark them
(``nongated``); other tables do not, and their times would need 1.5 times the memory's bandwidth."""

SLOW = 2.0
"""Largest plausible factor between a time and the times of the same experts at other widths or distributions."""
MANY = 0.3
"""Share of slow times above which a whole configuration counts as an untuned kernel."""


def read_experts(table: Mapping[str, Array], kernel: Array, screen: Screen) -> dict[str, Array]:
    """Return columns of records; refuse rows of several devices and unreliable rows."""
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    m, k, inner, active, experts, tensor, parallel = (np.asarray(table[name], dtype=np.float64) for name in names)
    law = np.asarray(table["distribution"]).astype(str)
    known, which = np.unique(law, return_inverse=True)
    power = [0.0 if v == "balanced" else _number(v.removeprefix("power_law_")) for v in known]
    skew = np.array(power)[which.reshape(-1)]
    screen.refuse(np.isnan(skew), "tokens distributed by another rule")
    screen.refuse(parallel != 1, "experts shared among devices: most tokens use no expert of this device")
    plain = np.isin(inner * 1000 + active, [width * 1000 + top for width, top in PLAIN])
    screen.refuse(plain | (np.char.find(kernel, "nongated") >= 0), "experts without a gate")
    columns = {"m": m, "n": inner / np.maximum(tensor, 1.0), "k": k, "experts": experts, "active": active, "skew": skew}
    kinds = [
        np.unique(np.asarray(c).astype(str), return_inverse=True)[1].reshape(-1) for c in (table["moe_dtype"], kernel)
    ]
    shape = np.stack([k, experts, active, *kinds], axis=1)
    rows = np.flatnonzero(screen.kept & (columns["n"] % 16 == 0))
    times = np.asarray(table["latency"], dtype=np.float64)
    slow = np.zeros(len(m), dtype=np.bool_)
    slow[rows] = too_slow(shape[rows], m[rows], columns["n"][rows], skew[rows], times[rows])
    screen.refuse(slow, f"over {SLOW:g} times the time of the same experts at other widths or loads: untuned kernel")
    return columns | {"copies": np.ones(len(m)), "cold": np.zeros(len(m), np.bool_)}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def too_slow(shape: Array, m: Array, n: Array, skew: Array, seconds: Array) -> Array:
    """Return a mask of implausibly slow rows, with all rows of a configuration that has many slow rows.

    Rows of one ``shape`` (rows, columns) and m differ in the width n and in the distribution of tokens. A wider expert
    takes at least as long. A narrower expert takes at least its share of that time, or half, since its weights may fit
    in L2.
    """
    if not len(m):
        return np.zeros(0, dtype=np.bool_)
    group = np.unique(np.column_stack([shape, m]), axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(group, kind="stable")
    position = np.arange(len(m)) - np.searchsorted(group[order], group[order])
    at = group[order], position
    size = (group.max() + 1, position.max() + 1)
    width, time = np.ones(size), np.full(size, np.inf)
    width[at] = n[order]
    time[at] = seconds[order]
    wider = width[:, :, None] / width[:, None, :]
    least = (time[:, None, :] * np.where(wider > 1.0, 2.0 * wider, 1.0)).min(axis=2)
    slow = np.zeros(len(m), dtype=np.bool_)
    slow[order] = time[at] > SLOW * least[at]
    whole = np.unique(np.column_stack([shape, n, skew]), axis=0, return_inverse=True)[1].reshape(-1)
    share = np.bincount(whole, weights=slow) / np.bincount(whole)
    return np.asarray(slow | (share > MANY)[whole])
