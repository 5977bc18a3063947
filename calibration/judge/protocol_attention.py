"""How accurate attention times are on shapes the fit never saw: the protocol, for one table and one question.

A question is "heads" (pairs of heads and KV heads never seen) or "lengths" (query lengths of prefill, cache lengths of decode, never seen).
Of the groups 70 % by seed are for the fit, every row of the rest is scored: errors, speedups of fewer KV groups or a shorter length,
and what share of the times the 90 % interval holds. Report seeds 0, 1, 2; structure and smoothing were chosen on seeds from 10 on.

``python -m calibration.judge.protocol_attention`` prints the table for the shipped measurements.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.attention import Columns, columns_of, device_of, fit_attention, groups_of, predict, usable, work_of
from simulator.hardware.library import load_hardware
from simulator.kernels.attention import REGIMES
from simulator.kernels.attention_prefill import Device
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


def speedup_errors(c: Columns, predicted: F, phase: str, question: str) -> F:
    """Errors of predicted speedups over all pairs of rows that differ in one thing only, by a ratio in [0.25, 1).

    Parameters
    ----------
    c : Columns
        Measured rows.
    predicted : float64 array, s
        A time for each.
    phase : {"prefill", "decode"}
    question : {"heads", "lengths"}
        What differs: KV groups, with their query heads; or the length.

    Returns
    -------
    float64 array
        predicted speedup / measured speedup - 1, one a pair.
    """
    if question == "heads":
        size = c.kv_heads
        same = [c.batch, c.q_len, c.kv_len, c.heads / c.kv_heads, c.head_dim]
    else:
        size = c.q_len if phase == "prefill" else c.kv_len
        same = [c.batch, c.heads, c.kv_heads, c.head_dim]
    key = np.unique(np.stack(same, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    order = np.lexsort((size, key))
    key, size, predicted, seconds = key[order], size[order], predicted[order], c.seconds[order]
    errors = []
    for gap in range(1, len(key)):
        near = key[gap:] == key[:-gap]
        if not near.any():
            break
        ratio = size[:-gap] / size[gap:]
        pick = near & (ratio >= 0.25) & (ratio < 1.0)
        errors.append((predicted[gap:] / predicted[:-gap] / (seconds[gap:] / seconds[:-gap]) - 1.0)[pick])
    return np.concatenate(errors) if errors else np.zeros(0)


def score(
    phase: str, c: Columns, device: Device, architecture: str, question: str, rows: int, seed: int
) -> Mapping[str, float]:
    """Accuracy on unseen groups of one fit.

    Parameters
    ----------
    phase, question : str
    c : Columns
        A table of one kernel path; unusable rows are dropped.
    device : Device
    architecture : str
    rows : int
        Rows drawn for the fit; 0 for all of the 70 %.
    seed : int

    Returns
    -------
    mapping of str to float
        "mape", "median", "p95", "bias", "roofline" (MAPE of the datasheet roofline), "speedup_median", "speedup_p95" as fractions;
        "coverage" and "width" (geometric half width) of the 90 % interval; "fit_s".
    """
    c = c.take(usable(phase, c, device)[0])
    rng = np.random.default_rng(seed)
    group = groups_of(c, question, phase)
    test = rng.permutation(group.max() + 1)[group] >= round(0.7 * (group.max() + 1))
    train = np.flatnonzero(~test)
    if rows:
        train = rng.choice(train, min(rows, len(train)), replace=False)
    began = time.perf_counter()
    fit = fit_attention(phase, c.take(train), device, architecture, fold_by=(question,), seed=seed)
    took = time.perf_counter() - began
    unseen = c.take(test)
    lattice = Lattice.from_arrays(fit.section.arrays)
    predicted, regime = predict(phase, unseen, device, fit.constants.values, lattice)
    error = predicted / unseen.seconds - 1.0
    low, high = (np.array([getattr(i, side) for i in fit.section.intervals])[regime] for side in ("low", "high"))
    inside = (unseen.seconds >= predicted * low) & (unseen.seconds <= predicted * high)
    pairs = np.abs(speedup_errors(unseen, predicted, phase, question))
    return {
        "mape": float(np.mean(np.abs(error))),
        "median": float(np.median(np.abs(error))),
        "p95": float(np.quantile(np.abs(error), 0.95)),
        "bias": float(np.mean(error)),
        "roofline": float(np.mean(np.abs(roofline(phase, unseen, device) / unseen.seconds - 1.0))),
        "speedup_median": float(np.median(pairs)) if len(pairs) else float("nan"),
        "speedup_p95": float(np.quantile(pairs, 0.95)) if len(pairs) else float("nan"),
        "coverage": float(np.mean(inside)),
        "width": float(np.exp(np.mean(0.5 * np.log(high / low))) - 1.0),
        "fit_s": took,
        **{
            f"coverage_{name}": float(np.mean(inside[regime == i]))
            for i, name in enumerate(REGIMES)
            if (regime == i).any()
        },
    }


def roofline(phase: str, c: Columns, device: Device) -> F:
    """Datasheet roofline of measured rows, s."""
    work: Any = work_of(phase, c, {"packs": 0.0})
    moved = work.io_bytes if phase == "prefill" else work.cache_bytes + work.io_bytes
    return np.asarray(np.maximum(work.flops / device.peak_flop_per_s, moved / device.bandwidth_bytes_per_s))


def protocol(
    seeds: tuple[int, ...] = (0, 1, 2), sizes: tuple[int, ...] = (400, 0), head_dims: tuple[int, ...] = (128,)
) -> list[dict[str, Any]]:
    """Scores of every table of :data:`TABLES`, question, size and seed; needs the shipped measurements (extra ``tables``)."""
    from calibration.measurements import load_measurements

    out = []
    for phase, name, table in TABLES:
        hw = load_hardware(name)
        c = columns_of(load_measurements(table, dtype="bf16"))
        c = c.take(np.isin(c.head_dim, head_dims))
        for question in QUESTIONS:
            for rows in sizes:
                for seed in seeds:
                    result = score(phase, c, device_of(hw), hw.architecture, question, rows, seed)
                    out.append(
                        {"phase": phase, "hardware": name, "question": question, "rows": rows, "seed": seed, **result}
                    )
    return out


def table_text(results: list[dict[str, Any]]) -> str:
    """The scores as text, seeds averaged."""
    lines = [
        f"{'phase':8}{'hardware':15}{'unseen':9}{'rows':>5} {'MAPE':>6}{'p95':>7}{'bias':>7}"
        f"{'speedup med/p95':>17}{'coverage':>10}{'width':>7}{'roofline':>10}"
    ]
    keys = list(dict.fromkeys((r["phase"], r["hardware"], r["question"], r["rows"]) for r in results))
    for key in keys:
        mine = [r for r in results if (r["phase"], r["hardware"], r["question"], r["rows"]) == key]
        mean = {
            name: 100.0 * float(np.mean([r[name] for r in mine]))
            for name in mine[0]
            if isinstance(mine[0][name], float)
        }
        phase, hardware, question, rows = key
        pair = f"{mean['speedup_median']:.1f} / {mean['speedup_p95']:.1f}"
        lines.append(
            f"{phase:8}{hardware:15}{question:9}{rows or 'all':>5} {mean['mape']:6.2f}{mean['p95']:7.1f}{mean['bias']:7.2f}{pair:>17}"
            f"{mean['coverage']:10.1f}{mean['width']:7.1f}{mean['roofline']:10.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table_text(protocol()))
