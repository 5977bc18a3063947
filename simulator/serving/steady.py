"""Memory of workloads (:func:`memory_columns`), and rate and waiting times of their requests
(:func:`serving`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from simulator.arrays import FloatArray, IndexArray
from simulator.capacity import (
    DeviceMemory,
    activation_bytes_by_phase,
    cache_parts,
    weights_bytes,
)
from simulator.codes import Phase
from simulator.engines.engine import load_engine
from simulator.uncertainty.forward import PredictedPass
from simulator.uncertainty.intervals import PredictionIntervals
from simulator.workload import WorkloadBatch

if TYPE_CHECKING:
    from simulator.arrays import Array
    from simulator.hardware.profile import HardwareProfile
    from simulator.request import Lowered


def memory_columns(
    batch: WorkloadBatch, rows: IndexArray, hardware: Sequence[HardwareProfile], device: IndexArray
) -> dict[str, Array]:
    """Return the memory columns of some workloads, each on a device (an index), and of their dense
    workloads."""
    memory = DeviceMemory.each(load_engine(batch.rows.meta.engine), hardware, device)
    needs, admitted = _Needs.of(batch), _admitted(batch.rows.meta, hardware)[device]
    columns: dict[str, Array] = {"capacity_bytes": memory.capacity_bytes}
    for name, which in (("dense", batch.dense[rows]), ("pruned", rows)):
        needed = needs.needed(which, memory)
        largest = np.clip(needs.most_that_fit(which, memory), 0.0, admitted)
        columns[f"{name}_memory_bytes"] = needed
        columns[f"{name}_fits"] = needed <= memory.capacity_bytes
        columns[f"{name}_largest_batch"] = largest.astype(np.int64)
    return columns


def _admitted(meta: Lowered, hardware: Sequence[HardwareProfile]) -> IndexArray:
    """Return the most sequences that the engine admits on each device."""
    engine, most = load_engine(meta.engine), np.full(len(hardware), np.iinfo(np.int64).max)
    for i, hw in enumerate(hardware if meta.phase != "prefill" else ()):
        if (limit := engine.limit(hw.memory_bytes, hw.name)) is not None:
            most[i] = limit.sequences
            # each decoding sequence takes a token of the step
            if meta.phase == "serve" and engine.schedule and engine.schedule.decodes_count:
                most[i] = min(limit.sequences, meta.asked.token_budget or limit.tokens)
    return most


@dataclass(frozen=True)
class _Needs:
    """Bytes that each workload of a batch needs."""

    batch: WorkloadBatch
    weights: FloatArray
    each: FloatArray  # the cache of a sequence
    prompts: FloatArray  # further bytes of the cache, of any number of sequences
    activations: Mapping[Phase, FloatArray]

    @classmethod
    def of(cls, batch: WorkloadBatch) -> _Needs:
        return cls(
            batch, weights_bytes(batch), *cache_parts(batch), activation_bytes_by_phase(batch)
        )

    def needed(self, which: IndexArray, memory: DeviceMemory) -> FloatArray:
        """Return the bytes that some workloads need, each on a device."""
        cache = self.each * self.batch.sequences + self.prompts
        activations = np.maximum.reduce([*self.activations.values()])
        needed = memory.needed(self.weights[which], cache[which], activations[which])
        return np.asarray(needed)

    def most_that_fit(self, which: IndexArray, memory: DeviceMemory) -> FloatArray:
        """Return the sequences of some workloads whose caches and activations fill a device."""
        cache, prompts = np.maximum(self.each[which], 1.0), self.prompts[which]
        of_caches = (memory.for_cache(self.weights[which], 0.0) - prompts) / cache
        fixed = self.weights[which] + prompts * memory.per_cache_byte + memory.reserve_bytes
        left = np.maximum(memory.capacity_bytes - fixed, 0.0)
        of_both = self._filling(which, cache * memory.per_cache_byte, left)
        return np.asarray(np.floor(np.minimum(of_caches, of_both) + 1e-9))

    def _filling(self, which: IndexArray, cache: FloatArray, left: FloatArray) -> FloatArray:
        """Return the sequences whose caches (``cache``, bytes per sequence) and activations fill
        the bytes ``left``."""
        growing = {
            Phase.PREFILL: _most_together(self.batch),
            Phase.DECODE: np.full(len(self.batch), np.inf),
        }
        largest = np.full(len(which), np.inf)
        for phase, activation in self.activations.items():
            full = growing[phase][which]
            of_sequence = activation[which] / np.minimum(self.batch.sequences[which], full)
            full_pass = np.where(full < np.inf, full, 0.0) * of_sequence
            beyond = (left - full_pass) / cache
            within = np.minimum(left / (cache + of_sequence), full)
            enough = (beyond > full) & (full < np.inf)
            largest = np.minimum(largest, np.where(enough, beyond, within))
        return largest


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


def serving(p: PredictedPass, times: PredictionIntervals, level: float) -> dict[str, FloatArray]:
    """Return for each workload new tokens/s of all devices, and time to first token and per further
    token, s, with the ends of their intervals; NaN for other phases."""
    meta, none = p.workloads.rows.meta, np.full(len(times.seconds), np.nan)
    ends = {"s": times.seconds, "lower": times.lower, "upper": times.upper}
    ttft, tpot = dict.fromkeys(ends, none), dict.fromkeys(ends, none)
    rate, sequences = none, p.workloads.sequences.astype(np.float64)
    if meta.phase == "prefill":
        ttft = ends
    elif meta.phase == "decode":
        rate, tpot = sequences / times.seconds, ends
    else:
        rate = sequences * meta.new_tokens / times.seconds
        ttft, tpot = _waits(p, times, level)
    out = {"tokens_per_s": rate, **{f"ttft_{name}": part for name, part in ttft.items()}}
    return out | {f"tpot_{name}": part for name, part in tpot.items()}


def _waits(
    p: PredictedPass, times: PredictionIntervals, level: float
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Return the time to the first token and per further token of requests, s, with the ends of
    their intervals. In serve, a request waits for a share of the other prompts before its first
    token, for the rest between its tokens. How long it waits depends on arrivals, so this share is
    uncertain. The interval combines two errors as a root of sum of squares: that of the share
    (limited to none or all of the prompts) and that of the whole time. Measured times to the first
    token have a share of their own, because they include queues of requests that start together,
    and the time of the server around the passes."""
    meta, sequences = p.workloads.rows.meta, p.workloads.sequences.astype(np.float64)
    # a measured time scales all
    prefill, decode, server = np.stack([*p.phase_s.T, p.host.server[:, 0]]) * (
        times.seconds / p.total_s
    )
    prompt = prefill = prefill - server
    if meta.phase == "serve":
        prompt = prefill / np.minimum(prefill_passes(p.workloads), sequences)
    sides = NormalDist().inv_cdf(0.5 + 0.5 * level) * np.array([0.0, -1.0, 1.0])[:, None]
    square = _of_passes(p, times, sides[1:, 0])
    first, before = (
        prompt + np.clip(wait.value + sides * wait.sd, 0.0, 1.0) * (prefill - prompt)
        for wait in (p.engine.first_wait, p.engine.prefill_wait)
    )
    around = server * np.exp(sides * p.host.server_log_sd)
    between = (prefill - before + decode)[[0, 2, 1]] / meta.new_tokens
    return _latency(first + around, square), _latency(between, square)


def _of_passes(p: PredictedPass, times: PredictionIntervals, sides: FloatArray) -> FloatArray:
    """Return squared log deviations (2, W) of the passes at both ends: those of the request without
    what the server's deviation adds."""
    of_host, of_passes = (
        np.log(one.at(*p.host.speeds(sides, 0.0))[0] / p.total_s)
        for one in (p, replace(p, host=replace(p.host, server_log_sd=0.0)))
    )
    square = np.log(np.stack([times.lower, times.upper]) / times.seconds) ** 2
    return np.asarray(np.maximum(square - of_host**2 + of_passes**2, 0.0))


def _latency(part: FloatArray, square: FloatArray) -> dict[str, FloatArray]:
    """Return a part (3, W) of a time, s, at the typical arrival of requests and at both ends, with
    its interval; ``square`` (2, W) are squared log deviations of the passes at both ends."""
    below, above = np.sqrt(square + np.log(part[1:] / part[0]) ** 2)
    return {"s": part[0], "lower": part[0] * np.exp(-below), "upper": part[0] * np.exp(above)}
