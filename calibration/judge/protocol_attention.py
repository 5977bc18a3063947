"""How accurate attention times are on shapes the fit never saw: the protocol, for one table and one question.

A question is "heads" (pairs of heads and KV heads never seen) or "lengths" (query lengths of prefill, cache lengths of
decode, never seen). Of the groups 70 % by seed are for the fit, every row of the rest is scored: errors, speedups of
fewer KV groups or a shorter length, and what share of the times the 90 % interval holds. Report seeds 0, 1, 2;
structure and smoothing were chosen on seeds from 10 on.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calibration.fit.attention import Columns, fit_attention, groups_of, predict, usable, work_of
from calibration.judge import scores
from simulator.kernels.attention import REGIMES
from simulator.kernels.gemm_core import Machine
from simulator.kernels.lattice import Lattice

F = NDArray[np.float64]

QUESTIONS: tuple[str, ...] = ("heads", "lengths")

TABLES: tuple[tuple[str, str, str], ...] = (
    ("prefill", "a100_sxm_80gb", "a100_sxm/attention_prefill/trtllm"),
    ("prefill", "h100_sxm", "h100_sxm/attention_prefill/sglang"),
    ("decode", "a100_sxm_80gb", "a100_sxm/attention_decode/sglang"),
    ("decode", "h100_sxm", "h100_sxm/attention_decode/sglang"),
)
"""Phase, profile and table of the accuracy bars: one collection and kernel path each."""


def comparable(c: Columns, phase: str, question: str) -> NDArray[np.intp]:
    """Pairs (smaller, larger) of rows that differ in one thing only, by a ratio in [0.25, 1): KV groups with their
    query heads ("heads"), or the length ("lengths")."""
    if question == "heads":
        return scores.pairs_along(c.kv_heads, [c.batch, c.q_len, c.kv_len, c.heads / c.kv_heads, c.head_dim])
    length = c.q_len if phase == "prefill" else c.kv_len
    return scores.pairs_along(length, [c.batch, c.heads, c.kv_heads, c.head_dim])


def score(
    phase: str, c: Columns, device: Machine, architecture: str, question: str, rows: int, seed: int
) -> Mapping[str, float]:
    """Accuracy on unseen groups of one fit to ``rows`` rows drawn from the 70 % (0: all of them).

    Returns
    -------
    mapping of str to float
        "mape", "median", "p95", "bias", "roofline" (MAPE of the datasheet roofline), "speedup_median", "speedup_p95" as
        fractions; "coverage" and "width" (geometric half width) of the 90 % interval, and "coverage_REGIME".
    """
    c = c.take(usable(phase, c, device)[0])
    rng = np.random.default_rng(seed)
    group = groups_of(c, question, phase)
    test = rng.permutation(group.max() + 1)[group] >= round(0.7 * (group.max() + 1))
    train = np.flatnonzero(~test)
    if rows:
        train = rng.choice(train, min(rows, len(train)), replace=False)
    fit = fit_attention(phase, c.take(train), device, architecture, fold_by=(question,), seed=seed)
    unseen = c.take(test)
    predicted, regime = predict(phase, unseen, device, fit.constants.values, Lattice.from_arrays(fit.section.arrays))
    low, high = (np.array([getattr(i, side) for i in fit.section.intervals])[regime] for side in ("low", "high"))
    inside = (unseen.seconds >= predicted * low) & (unseen.seconds <= predicted * high)
    ratios = scores.speedups(predicted, unseen.seconds, comparable(unseen, phase, question))
    held = {name: float(np.mean(inside[regime == i])) for i, name in enumerate(REGIMES) if (regime == i).any()}
    return {
        **scores.errors(predicted, unseen.seconds),
        "roofline": scores.errors(roofline(phase, unseen, device), unseen.seconds)["mape"],
        "speedup_median": ratios.get("median", float("nan")),
        "speedup_p95": ratios.get("p95", float("nan")),
        "coverage": float(np.mean(inside)),
        "width": float(np.exp(np.mean(0.5 * np.log(high / low))) - 1.0),
        **{f"coverage_{name}": share for name, share in held.items()},
    }


def roofline(phase: str, c: Columns, device: Machine) -> F:
    """Datasheet roofline of measured rows, s."""
    work = work_of(phase, c, {"packs": 0.0})
    return np.asarray(np.maximum(work.flops / device.peak_flop_per_s, work.moved_bytes / device.bandwidth_bytes_per_s))
