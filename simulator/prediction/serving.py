"""Memory of workloads (:func:`memory_columns`), and rate and waiting times of their requests
(:func:`serving`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import FloatArray, IndexArray
from simulator.capacity import (
    RESERVE_BYTES,
    activation_bytes_by_phase,
    cache_parts,
    memory_share,
    weights_bytes,
)
from simulator.codes import Phase
from simulator.engines.engine import load_engine
from simulator.passes import ForwardPass
from simulator.uncertainty.intervals import PredictionIntervals
from simulator.workload import WorkloadBatch

if TYPE_CHECKING:
    from simulator.arrays import Array
    from simulator.hardware.profile import HardwareProfile


def memory_columns(
    batch: WorkloadBatch, at: IndexArray, hardware: Sequence[HardwareProfile], device: IndexArray
) -> dict[str, Array]:
    """Return the memory columns of some workloads, each on a device (an index), and of their dense
    workloads."""
    meta, (each, prompts) = batch.rows.meta, cache_parts(batch)
    fixed = weights_bytes(batch) + prompts + RESERVE_BYTES
    activations = activation_bytes_by_phase(batch)
    needed = fixed + each * batch.sequences + np.maximum.reduce([*activations.values()])
    # sequences up to which the activations of a pass grow
    growing = {Phase.PREFILL: _most_together(batch), Phase.DECODE: np.full(len(batch), np.inf)}
    engine = load_engine(meta.engine)
    capacity = (
        memory_share(batch.rows) * np.array([float(hw.memory_bytes) for hw in hardware])[device]
    )
    limits = [
        engine.limit(hw.memory_bytes, hw.name) if meta.phase != "prefill" else None
        for hw in hardware
    ]
    most = np.array(
        [np.iinfo(np.int64).max if limit is None else limit.sequences for limit in limits]
    )[device]
    which, both = np.concatenate([batch.dense[at], at]), np.concatenate([capacity, capacity])
    left, cache = np.maximum(both - fixed[which], 0.0), np.maximum(each[which], 1.0)
    largest = np.full(len(which), np.inf)
    for phase, activation in activations.items():
        full = growing[phase][which]
        own = activation[which] / np.minimum(batch.sequences[which], full)
        beyond = (left - np.where(full < np.inf, full, 0.0) * own) / cache  # beyond a full pass
        within = np.minimum(left / (cache + own), full)
        largest = np.minimum(largest, np.where((beyond > full) & (full < np.inf), beyond, within))
    largest = np.minimum(
        np.maximum(np.floor(largest + 1e-9), 0.0), np.concatenate([most, most])
    ).astype(np.int64)
    found = {"memory_bytes": needed[which], "fits": needed[which] <= both, "largest_batch": largest}
    columns: dict[str, Array] = {"capacity_bytes": capacity}
    for name, column in found.items():
        columns[f"dense_{name}"], columns[f"pruned_{name}"] = column[: len(at)], column[len(at) :]
    return columns


def _most_together(batch: WorkloadBatch) -> FloatArray:
    """Return the sequences of each workload whose activations a pass can hold at once: beyond the
    token budget of a prefill, activations do not grow; in a steady state they are those of its
    prefill."""
    meta, rows = batch.rows.meta, batch.rows
    if meta.phase == "serve":
        return np.ones(len(batch))
    if not meta.token_budget or meta.phase == "decode":
        return np.full(len(batch), np.inf)
    computed = rows.is_role("embedding") & (rows.phase == Phase.PREFILL)
    # per prompt
    tokens = batch.total(np.where(computed, rows.m * rows.count, 0.0)) / batch.sequences
    return np.asarray(np.maximum(meta.token_budget // np.maximum(tokens, 1.0), 1.0))


def prefill_passes(workloads: WorkloadBatch) -> FloatArray:
    """Return the prefill passes of each workload; in a steady state those during one request, of
    all requests."""
    rows = workloads.rows
    begins = rows.is_role("embedding") & (rows.phase == Phase.PREFILL)
    return np.maximum(workloads.total(np.where(begins, rows.count, 0.0)), 1.0)


def serving(p: ForwardPass, found: PredictionIntervals, level: float) -> dict[str, FloatArray]:
    """Return for each workload new tokens/s of all devices, and time to first token and per further
    token, s, with the ends of their intervals; NaN for other phases. In serve, a request waits for
    a share of the other prompts before its first token, for the rest between its tokens. The share
    depends on how requests arrive; on either side, its deviation, at most to none or all of the
    prompts, and the relative error of the whole time are combined as a root of sum of squares.
    Measured times to the first token have a share of their own, because they include queues of
    requests that start together, and the time of the server around the passes."""
    meta, none = p.workloads.rows.meta, np.full(len(found.seconds), np.nan)
    sequences, seconds = p.workloads.sequences.astype(np.float64), found.seconds
    ends = {"s": seconds, "lower": found.lower, "upper": found.upper}
    ttft, tpot = dict.fromkeys(ends, none), dict.fromkeys(ends, none)
    rate = none
    if meta.phase == "prefill":
        ttft = ends
    elif meta.phase == "decode":
        rate, tpot = sequences / seconds, ends
    else:
        # a measured time scales all
        prefill, decode, server = np.stack([*p.phase_s.T, p.host.server[:, 0]]) * (
            seconds / p.total_s
        )
        own = prefill = prefill - server
        if meta.phase == "serve":
            own = prefill / np.minimum(prefill_passes(p.workloads), sequences)
        rate = sequences * meta.new_tokens / seconds
        sides = NormalDist().inv_cdf(0.5 + 0.5 * level) * np.array([0.0, -1.0, 1.0])[:, None]
        around = server * np.exp(sides * p.host.server_log_sd)
        # squared log deviations of the passes: those of the request without what the server's
        # deviation adds
        of_host, of_passes = (
            np.log(one.at(*p.host.speeds(sides[1:, 0], 0.0))[0] / p.total_s)
            for one in (p, replace(p, host=replace(p.host, server_log_sd=0.0)))
        )
        square = np.log(np.stack([found.lower, found.upper]) / seconds) ** 2
        square = np.maximum(square - of_host**2 + of_passes**2, 0.0)
        first, before = (
            own + np.clip(wait.value + sides * wait.sd, 0.0, 1.0) * (prefill - own)
            for wait in (p.engine.first_wait, p.engine.prefill_wait)
        )
        ttft = _latency(first + around, square)
        tpot = _latency((prefill - before + decode)[[0, 2, 1]] / meta.new_tokens, square)
    out = {"tokens_per_s": rate, **{f"ttft_{name}": part for name, part in ttft.items()}}
    return out | {f"tpot_{name}": part for name, part in tpot.items()}


def _latency(part: FloatArray, square: FloatArray) -> dict[str, FloatArray]:
    """Return a part (3, W) of a time, s, at the typical arrival of requests and at both ends, with
    its interval; ``square`` (2, W) are squared log deviations of the passes at both ends."""
    below, above = np.sqrt(square + np.log(part[1:] / part[0]) ** 2)
    return {"s": part[0], "lower": part[0] * np.exp(-below), "upper": part[0] * np.exp(above)}
