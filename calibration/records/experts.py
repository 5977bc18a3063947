"""What a table of routed experts (MoE) of aiconfigurator holds, and which of its rows are sound.

A row times all products of the experts that one device holds, what moves tokens to them and back included, the router
not: tokens dealt out by a rule (in turn, or by a power law), one set of weights again and again. ``moe_tp_size``
divides the width of every expert, ``moe_ep_size`` their number.
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
"""Width and experts a token of models whose experts have no gate (Nemotron-H): TensorRT-LLM's tables say so
(``nongated``), others do not, and show 1.5 times the bandwidth of the memory."""

SLOW, MANY = 2.0, 0.3
"""Factor beyond every explanation between a time and those of the same experts at other widths, or dealt out otherwise;
share of such times above which a whole configuration ran an untuned kernel."""


def read_experts(table: Mapping[str, Array], kernel: Array, screen: Screen) -> dict[str, Array]:
    """Columns of records; rows that are no single device's, or not sound, are refused."""
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    m, k, inner, active, experts, tensor, parallel = (np.asarray(table[name], dtype=np.float64) for name in names)
    law = np.asarray(table["distribution"]).astype(str)
    known, which = np.unique(law, return_inverse=True)
    power = [0.0 if v == "balanced" else _number(v.removeprefix("power_law_")) for v in known]
    skew = np.array(power)[which.reshape(-1)]
    screen.refuse(np.isnan(skew), "tokens dealt out by another rule")
    screen.refuse(parallel != 1, "experts shared among devices: most tokens of a row use none of this device's")
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
    screen.refuse(slow, f"over {SLOW:g} times what the same experts take at other widths or loads: an untuned kernel")
    return columns | {"copies": np.ones(len(m)), "cold": np.zeros(len(m), np.bool_)}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def too_slow(shape: Array, m: Array, n: Array, skew: Array, seconds: Array) -> Array:
    """Mask of rows whose time no width explains, with all rows of a configuration that has many such.

    Rows of one ``shape`` (rows, columns) and m differ in the width n and in how tokens are dealt out. A wider expert
    takes no less, and a narrower one no less than in proportion, but that its weights may lie in L2 (a factor of 2).
    """
    if not len(m):
        return np.zeros(0, dtype=np.bool_)
    group = np.unique(np.column_stack([shape, m]), axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(group, kind="stable")
    place = np.arange(len(m)) - np.searchsorted(group[order], group[order])
    at = group[order], place
    width, time = np.ones((group.max() + 1, place.max() + 1)), np.full((group.max() + 1, place.max() + 1), np.inf)
    width[at], time[at] = n[order], seconds[order]
    wider = width[:, :, None] / width[:, None, :]
    least = (time[:, None, :] * np.where(wider > 1.0, 2.0 * wider, 1.0)).min(axis=2)
    slow = np.zeros(len(m), dtype=np.bool_)
    slow[order] = time[at] > SLOW * least[at]
    whole = np.unique(np.column_stack([shape, n, skew]), axis=0, return_inverse=True)[1].reshape(-1)
    share = np.bincount(whole, weights=slow) / np.bincount(whole)
    return np.asarray(slow | (share > MANY)[whole])
